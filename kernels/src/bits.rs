//! How codes lie in bytes: dense little-endian bitstreams of 1 to 8 bits, and ternary codes five to a byte.
//!
//! These are the plain loops that define the layout; the kernels unpack 64 codes at a time.

use crate::matrix::{Grid, Layout, stream_bytes};

/// Ternary codes in a byte: 3^5 = 243 values.
pub const TERNARY_PER_BYTE: usize = 5;

const TERNARY_PLACES: [u8; TERNARY_PER_BYTE] = [1, 3, 9, 27, 81];

/// Code `index` of a dense stream of `bits`-bit codes, first code in the lowest bits.
///
/// # Panics
/// If `bits` is not between 1 and 8 or the stream ends before the code does.
pub fn stream_code(stream: &[u8], bits: u32, index: usize) -> u8 {
    assert!((1..=8).contains(&bits));
    let first = index * bits as usize;
    let last = first + bits as usize - 1;
    let window = u16::from_le_bytes([stream[first / 8], stream[last / 8]]);
    // A code within one byte sees that byte twice; the mask drops the copy.
    (window >> (first % 8)) as u8 & (0xff >> (8 - bits))
}

/// Unpacks the first `codes.len()` codes of a dense stream.
///
/// # Panics
/// If `bits` is not between 1 and 8 or the stream is too short.
pub fn unpack_stream(stream: &[u8], bits: u32, codes: &mut [u8]) {
    for (index, code) in codes.iter_mut().enumerate() {
        *code = stream_code(stream, bits, index);
    }
}

/// Packs codes into a dense stream of whole 32-bit words; unused bits are zero. Higher bits of a code are dropped.
///
/// # Panics
/// If `bits` is not between 1 and 8 or `stream` is not [`stream_bytes`] long.
pub fn pack_stream(codes: &[u8], bits: u32, stream: &mut [u8]) {
    assert!((1..=8).contains(&bits));
    assert_eq!(stream.len(), stream_bytes(codes.len(), bits));
    stream.fill(0);
    for (index, &code) in codes.iter().enumerate() {
        let first = index * bits as usize;
        let window = u16::from(code & (0xff >> (8 - bits))) << (first % 8);
        let [low, high] = window.to_le_bytes();
        stream[first / 8] |= low;
        if high != 0 {
            stream[first / 8 + 1] |= high;
        }
    }
}

/// Ternary code `index`: 0, 1 or 2.
///
/// # Panics
/// If there is no such byte.
pub fn ternary_code(bytes: &[u8], index: usize) -> u8 {
    bytes[index / TERNARY_PER_BYTE] / TERNARY_PLACES[index % TERNARY_PER_BYTE] % 3
}

/// Unpacks the first `codes.len()` ternary codes.
///
/// # Panics
/// If there are too few bytes.
pub fn unpack_ternary(bytes: &[u8], codes: &mut [u8]) {
    for (index, code) in codes.iter_mut().enumerate() {
        *code = ternary_code(bytes, index);
    }
}

/// Packs ternary codes, each 0, 1 or 2, five to a byte; absent digits of the last byte are zero.
///
/// # Panics
/// If a code is larger than 2 or `bytes` is not `codes.len() / 5` long, rounded up.
pub fn pack_ternary(codes: &[u8], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), codes.len().div_ceil(TERNARY_PER_BYTE));
    for (byte, five) in bytes.iter_mut().zip(codes.chunks(TERNARY_PER_BYTE)) {
        *byte = 0;
        for (&code, place) in five.iter().zip(TERNARY_PLACES) {
            assert!(code <= 2);
            *byte += code * place;
        }
    }
}

/// Packs one row of codes as `grid` lays them out.
///
/// # Panics
/// If `row` is not [`Layout::code_bytes`] long, or a ternary code is larger than 2.
pub fn pack_row(grid: Grid, codes: &[u8], row: &mut [u8]) {
    match grid.stream_bits() {
        Some(bits) => pack_stream(codes, bits, row),
        None => pack_ternary(codes, row),
    }
}

/// Unpacks one row of codes laid out as `grid` says.
///
/// # Panics
/// If `row` is too short for `codes`.
pub fn unpack_row(grid: Grid, row: &[u8], codes: &mut [u8]) {
    match grid.stream_bits() {
        Some(bits) => unpack_stream(row, bits, codes),
        None => unpack_ternary(row, codes),
    }
}

/// Whether the bits of a dense stream after its last code are all zero.
pub fn stream_padding_is_zero(stream: &[u8], bits: u32, count: usize) -> bool {
    let used = count * bits as usize;
    let Some((first, rest)) = stream.get(used / 8..).and_then(<[u8]>::split_first) else { return true };
    first >> (used % 8) == 0 && rest.iter().all(|&byte| byte == 0)
}

/// Whether every byte holds five ternary digits and the digits after code `count` are zero.
pub fn ternary_is_valid(bytes: &[u8], count: usize) -> bool {
    let padding_is_zero = match count % TERNARY_PER_BYTE {
        0 => true,
        digits => bytes.get(count / TERNARY_PER_BYTE).is_none_or(|&last| last < TERNARY_PLACES[digits]),
    };
    padding_is_zero && bytes.iter().all(|&byte| byte <= 242)
}

/// The first row of `codes` that breaks a rule of the layout: unused bits that are not zero, or a byte that is not five
/// ternary digits. `codes` is [rows, code_bytes].
pub fn invalid_code_row(layout: &Layout, cols: usize, codes: &[u8]) -> Option<usize> {
    invalid_row(codes, layout.code_bytes(cols), |row| match layout.grid.stream_bits() {
        Some(bits) => stream_padding_is_zero(row, bits, cols),
        None => ternary_is_valid(row, cols),
    })
}

/// The first row of `zeros` whose unused bits are not zero. `zeros` is [rows, zero_bytes].
pub fn invalid_zero_row(layout: &Layout, cols: usize, zeros: &[u8]) -> Option<usize> {
    let bits = layout.grid.stream_bits()?;
    invalid_row(zeros, layout.zero_bytes(cols), |row| stream_padding_is_zero(row, bits, layout.groups(cols)))
}

fn invalid_row(bytes: &[u8], width: usize, valid: impl Fn(&[u8]) -> bool) -> Option<usize> {
    if width == 0 { None } else { bytes.chunks(width).position(|row| !valid(row)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_code_lies_lowest() {
        let mut stream = [0xff; 4];
        pack_stream(&[1, 2, 3, 4, 5], 3, &mut stream);
        assert_eq!(u32::from_le_bytes(stream), 1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12);
        let mut bytes = [0; 2];
        pack_ternary(&[2, 0, 1, 0, 2, 1, 2], &mut bytes);
        assert_eq!(bytes, [2 + 9 + 2 * 81, 1 + 2 * 3]);
    }

    #[test]
    fn every_width_unpacks_what_it_packed() {
        for bits in 1..=8 {
            for count in 0..70 {
                let codes: Vec<u8> = (0..count).map(|i| (i * 37 + 11) as u8 & (0xff >> (8 - bits))).collect();
                let mut stream = vec![0xff; stream_bytes(count, bits)];
                pack_stream(&codes, bits, &mut stream);
                let mut back = vec![0; count];
                unpack_stream(&stream, bits, &mut back);
                assert_eq!(back, codes, "{count} codes of {bits} bits");
                assert!(stream_padding_is_zero(&stream, bits, count));
            }
        }
    }

    #[test]
    fn every_padding_bit_counts() {
        for bits in 1..=8 {
            for count in 0..40 {
                let mut stream = vec![0; stream_bytes(count, bits)];
                for bit in 0..stream.len() * 8 {
                    stream[bit / 8] = 1 << (bit % 8);
                    assert_eq!(stream_padding_is_zero(&stream, bits, count), bit < count * bits as usize);
                    stream[bit / 8] = 0;
                }
            }
        }
    }

    #[test]
    fn ternary_bytes_and_padding_are_checked() {
        assert!(ternary_is_valid(&[242, 242], 10));
        assert!(!ternary_is_valid(&[243, 0], 10));
        assert!(ternary_is_valid(&[242, 8], 7));
        assert!(!ternary_is_valid(&[242, 9], 7));
        assert!(ternary_is_valid(&[], 0));
    }

    #[test]
    fn invalid_rows_are_named() {
        let layout = Layout { grid: Grid::Int { bits: 3, symmetric: false }, group: 2 };
        let mut codes = [0; 12];
        assert_eq!(invalid_code_row(&layout, 5, &codes), None);
        codes[9] = 0x80;
        assert_eq!(invalid_code_row(&layout, 5, &codes), Some(2));
        let zeros = [0xff, 1, 0, 0, 0, 2, 0, 0];
        assert_eq!(invalid_zero_row(&layout, 5, &zeros), Some(1));
        let ternary = Layout { grid: Grid::Ternary, group: 2 };
        assert_eq!(invalid_code_row(&ternary, 0, &[]), None);
        assert_eq!(invalid_zero_row(&ternary, 5, &[]), None);
    }
}
