//! The tile and INT8 instructions of AMX on a CPU that lacks them: a handler of the illegal-instruction signal decodes
//! and performs them, as strictly as the manual (Intel SDM, volume 2) says that hardware does.
//!
//! What hardware would refuse ends the test process with a message.

use std::cell::RefCell;
use std::sync::Once;

/// Where an instruction finds memory: `address`, and for tiles the distance of two rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub address: usize,
    pub stride: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    LoadConfiguration(Memory),
    StoreConfiguration(Memory),
    Release,
    Zero(usize),
    Load(usize, Memory),
    Store(usize, Memory),
    Dot { sums: usize, a: usize, b: usize, a_signed: bool, b_signed: bool },
}

/// Decodes one instruction with a VEX prefix of three bytes, and returns its length too; `None` for any other.
/// `registers` are the general ones in the order of their encoding.
pub fn decode(code: &[u8], registers: &[usize; 16]) -> Option<(Instruction, usize)> {
    let &[0xc4, first, second, opcode, modrm, ..] = code else { return None };
    // Map 0F38, W0, 128 bits; the extension bits are stored inverted.
    if first & 0x1f != 2 || second & 0x84 != 0 {
        return None;
    }
    let (prefix, extra) = (second & 3, usize::from(!second >> 3 & 15));
    let extend = |bit: u8| if first & bit == 0 { 8 } else { 0 };
    let reg = usize::from(modrm >> 3 & 7) + extend(0x80);
    let rm = usize::from(modrm & 7);
    if modrm >> 6 == 3 {
        let instruction = match (opcode, prefix) {
            (0x49, 0) if modrm == 0xc0 && extra == 0 => Instruction::Release,
            (0x49, 3) if rm == 0 && reg < 8 && extra == 0 => Instruction::Zero(reg),
            (0x5e, _) if reg < 8 && extra < 8 && extend(0x20) == 0 => {
                let (a_signed, b_signed) = (prefix >= 2, prefix & 1 == 1);
                Instruction::Dot { sums: reg, a: rm, b: extra, a_signed, b_signed }
            }
            _ => return None,
        };
        return Some((instruction, 5));
    }

    let (mut length, mut address, mut stride) = (5, 0usize, 0);
    let mut base = Some(rm + extend(0x20));
    if rm == 4 {
        let sib = *code.get(length)?;
        length += 1;
        base = Some(usize::from(sib & 7) + extend(0x20));
        let index = usize::from(sib >> 3 & 7) + extend(0x40);
        if index != 4 {
            stride = registers[index] << (sib >> 6);
        }
        if sib & 7 == 5 && modrm >> 6 == 0 {
            base = None;
        }
    } else if rm == 5 && modrm >> 6 == 0 {
        // Relative to the instruction pointer: no tile instruction of a kernel is.
        return None;
    }
    if modrm >> 6 == 1 {
        address = *code.get(length)? as i8 as usize;
        length += 1;
    } else if modrm >> 6 == 2 || base.is_none() {
        address = i32::from_le_bytes(*code.get(length..)?.first_chunk()?) as usize;
        length += 4;
    }
    if let Some(base) = base {
        address = address.wrapping_add(registers[base]);
    }
    if extra != 0 {
        return None;
    }
    let instruction = match (opcode, prefix) {
        (0x49, 0 | 1) if reg == 0 => {
            let at = Memory { address: address.wrapping_add(stride), stride: 0 };
            if prefix == 0 { Instruction::LoadConfiguration(at) } else { Instruction::StoreConfiguration(at) }
        }
        // With the hint not to keep the lines, or without.
        (0x4b, 1 | 3) if rm == 4 && reg < 8 => Instruction::Load(reg, Memory { address, stride }),
        (0x4b, 2) if rm == 4 && reg < 8 => Instruction::Store(reg, Memory { address, stride }),
        _ => return None,
    };
    Some((instruction, length))
}

/// How many instructions of each kind ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub configurations: usize,
    pub loads: usize,
    pub stores: usize,
    pub dots: usize,
}

/// The tile state of one thread.
pub struct Tiles {
    /// As `ldtilecfg` read it; `None` in the initial state.
    configuration: Option<[u8; 64]>,
    data: [[[u8; 64]; 16]; 8],
    pub counts: Counts,
}

impl Tiles {
    pub const fn new() -> Self {
        let counts = Counts { configurations: 0, loads: 0, stores: 0, dots: 0 };
        Self { configuration: None, data: [[[0; 64]; 16]; 8], counts }
    }

    /// Rows and bytes of a row.
    fn shape(&self, tile: usize) -> Result<(usize, usize), &'static str> {
        let configuration = self.configuration.as_ref().ok_or("no tiles are configured")?;
        let bytes = u16::from_le_bytes([configuration[16 + 2 * tile], configuration[17 + 2 * tile]]);
        let shape = (usize::from(configuration[48 + tile]), usize::from(bytes));
        if shape.0 == 0 { Err("a tile without a shape is used") } else { Ok(shape) }
    }

    /// Performs one instruction, or says why hardware would not.
    ///
    /// # Safety
    /// What it reads and writes in memory may be read and written.
    pub unsafe fn perform(&mut self, instruction: Instruction) -> Result<(), &'static str> {
        match instruction {
            Instruction::LoadConfiguration(memory) => {
                // SAFETY: the caller's promise.
                let bytes = unsafe { (memory.address as *const [u8; 64]).read_unaligned() };
                self.configure(bytes)?;
                self.counts.configurations += 1;
            }
            Instruction::StoreConfiguration(memory) => {
                // SAFETY: the caller's promise.
                unsafe { (memory.address as *mut [u8; 64]).write_unaligned(self.configuration.unwrap_or([0; 64])) };
            }
            Instruction::Release => self.configuration = None,
            Instruction::Zero(tile) => {
                self.shape(tile)?;
                self.data[tile] = [[0; 64]; 16];
            }
            Instruction::Load(tile, memory) => {
                let (rows, bytes) = self.shape(tile)?;
                self.data[tile] = [[0; 64]; 16];
                for (index, row) in self.data[tile][..rows].iter_mut().enumerate() {
                    let from = memory.address.wrapping_add(index.wrapping_mul(memory.stride)) as *const u8;
                    // SAFETY: the caller's promise; a shape has at most 64 bytes a row.
                    unsafe { from.copy_to_nonoverlapping(row.as_mut_ptr(), bytes) };
                }
                self.counts.loads += 1;
            }
            Instruction::Store(tile, memory) => {
                let (rows, bytes) = self.shape(tile)?;
                for (index, row) in self.data[tile][..rows].iter().enumerate() {
                    let to = memory.address.wrapping_add(index.wrapping_mul(memory.stride)) as *mut u8;
                    // SAFETY: the caller's promise; a shape has at most 64 bytes a row.
                    unsafe { to.copy_from_nonoverlapping(row.as_ptr(), bytes) };
                }
                self.counts.stores += 1;
            }
            Instruction::Dot { sums, a, b, a_signed, b_signed } => {
                if sums == a || sums == b || a == b {
                    return Err("a product names one tile twice");
                }
                let [(rows, width), (a_rows, a_bytes), (b_rows, b_bytes)] =
                    [self.shape(sums)?, self.shape(a)?, self.shape(b)?];
                if rows != a_rows || width != b_bytes || a_bytes != 4 * b_rows || width % 4 != 0 {
                    return Err("the shapes of a product do not agree");
                }
                let number = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
                for row in 0..rows {
                    for column in 0..width / 4 {
                        let sum: &mut [u8; 4] = self.data[sums][row][4 * column..].first_chunk_mut().unwrap();
                        let mut total = i32::from_le_bytes(*sum);
                        for k in 0..a_bytes {
                            let b = self.data[b][k / 4][4 * column + k % 4];
                            let product = number(self.data[a][row][k], a_signed) * number(b, b_signed);
                            total = total.wrapping_add(product);
                        }
                        let sum: &mut [u8; 4] = self.data[sums][row][4 * column..].first_chunk_mut().unwrap();
                        *sum = total.to_le_bytes();
                    }
                }
                self.counts.dots += 1;
            }
        }
        Ok(())
    }

    /// What `ldtilecfg` does with the 64 bytes it reads.
    pub fn configure(&mut self, bytes: [u8; 64]) -> Result<(), &'static str> {
        if bytes[0] != 1 || bytes[1] != 0 {
            return Err("the palette is not 1, or a start row is set");
        }
        if bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]).any(|&byte| byte != 0) {
            return Err("reserved bytes or tiles that do not exist are configured");
        }
        for tile in 0..8 {
            let width = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]);
            let rows = bytes[48 + tile];
            if rows > 16 || width > 64 || (rows == 0) != (width == 0) {
                return Err("a tile is larger than the palette allows, or half configured");
            }
        }
        self.configuration = Some(bytes);
        self.data = [[[0; 64]; 16]; 8];
        Ok(())
    }
}

thread_local! {
    // Without a destructor, so the handler may use it at any time.
    static TILES: RefCell<Tiles> = const { RefCell::new(Tiles::new()) };
}

/// What the emulator performed on the calling thread since the last call.
pub fn take_counts() -> Counts {
    TILES.with_borrow_mut(|tiles| std::mem::take(&mut tiles.counts))
}

/// Installs the handler, once in the process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is zero but for the handler, which has the signature that `SA_SIGINFO` asks for and touches
        // nothing but its thread's tiles, its context and the memory that the instruction names.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
        };
        assert_eq!(result, 0, "the handler was not installed");
    });
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const ORDER: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the kernel passes a context that lives as long as the handler runs.
    let saved = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let registers = ORDER.map(|register| saved[register as usize] as usize);
    let rip = &mut saved[libc::REG_RIP as usize];
    // SAFETY: the longest tile instruction has ten bytes, and code of the test and of the libraries follows any.
    let code = unsafe { std::slice::from_raw_parts(*rip as *const u8, 10) };
    let Some((instruction, length)) = decode(code, &registers) else {
        // Back to what happens without a handler, when the instruction runs again.
        // SAFETY: `SIG_DFL` is a valid action.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        return;
    };
    // SAFETY: the memory is what the interrupted code gave the instruction, and that code vouches for it.
    if let Err(reason) = TILES.with_borrow_mut(|tiles| unsafe { tiles.perform(instruction) }) {
        let message = format!("{instruction:?} at {rip:#x}: {reason}\n");
        // SAFETY: the bytes are those of the message; the process ends.
        unsafe {
            libc::write(2, message.as_ptr().cast(), message.len());
            libc::abort();
        }
    }
    *rip += length as i64;
}
