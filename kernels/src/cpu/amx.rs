//! INT8 matrix tiles (AMX): 16 tokens times 16 weight rows times 64 columns in one instruction.
//!
//! A block of activations is one step of a tile: its integer dot products are exact, and are scaled by vector
//! instructions while the tiles of the next block run. The weights of a panel already lie as the column operand wants
//! them, four columns of 16 rows in 64 bytes; the activations are the row operand, as they are.

use std::marker::PhantomData;
use std::ops::Range;

use super::gemm_int8::Multiply;
use super::gemm_prepare::{Rounded, Tile};
use super::panel::Panel;
use super::rounding::Block;
use super::simd::{Aligned, LANES, Simd};

/// Tokens of a step: two tiles of 16.
pub(super) const TOKENS: usize = 32;

/// Vectors of weight rows of a step: a tile each.
pub(super) const VECTORS: usize = 2;

/// Units of four columns that a tile holds.
const TILE_UNITS: usize = 16;

/// Token for the tile and INT8 parts of AMX.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

impl Amx {
    /// The token, if the CPU has the instructions and the operating system lets this process use them.
    ///
    /// The process asks once. From then on, Linux refuses alternate signal stacks that are too small for the tiles.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn detect() -> Option<Self> {
        use std::sync::OnceLock;
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        ALLOWED.get_or_init(|| supported() && request_permission()).then_some(Self(()))
    }

    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    pub(super) fn detect() -> Option<Self> {
        None
    }

    /// The token without a look at the CPU.
    ///
    /// # Safety
    /// The instructions work on every thread that multiplies with the token, in hardware or by emulation.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Whether the CPU has tiles with INT8, and the operating system saves their state.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn supported() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const TILE_AND_INT8: u32 = 0b11 << 24;
    const TILE_STATE: u64 = 0b11 << 17;
    const OSXSAVE: u32 = 1 << 27;
    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the caller has seen that the operating system enables XGETBV.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE says that the CPU has XSAVE and the operating system uses it.
    let state = unsafe { enabled_state() };
    __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8 && state & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tile data state, for all threads of this process: `arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)`.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request_permission() -> bool {
    let result: i64;
    // SAFETY: the call takes two integers and touches no memory of the process; the kernel changes rax, rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") 158i64 => result,
            in("rdi") 0x1023u64,
            in("rsi") 18u64,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Whether blocks fill enough of a tile.
pub(super) fn pays(blocks: &[Block]) -> bool {
    blocks.first().is_some_and(|block| 2 * block.units().len() >= TILE_UNITS)
}

/// Gives every block as much room as the first, which is the longest, and returns the units of all.
pub(super) fn pad(blocks: &mut [Block]) -> usize {
    let units = blocks.first().map_or(0, |block| block.units().len());
    for (index, block) in blocks.iter_mut().enumerate() {
        block.unit = index * units;
    }
    blocks.len() * units
}

/// What `ldtilecfg` reads.
#[cfg(target_arch = "x86_64")]
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles in the shapes of a product, on this thread until it is dropped.
pub(super) struct Tiles {
    units: usize,
    signed: bool,
    /// Tiles belong to a thread.
    on_this_thread: PhantomData<*const ()>,
}

impl Amx {
    /// Shapes the tiles for blocks of `units`: 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights, which are `signed` or
    /// not.
    pub(super) fn configure(self, units: usize, signed: bool) -> Tiles {
        assert!((1..=TILE_UNITS).contains(&units));
        #[cfg(target_arch = "x86_64")]
        {
            let mut configuration =
                Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
            configuration.row_bytes[..8].fill(64);
            configuration.rows[..8].fill(16);
            configuration.row_bytes[4..6].fill(4 * units as u16);
            configuration.rows[6..8].fill(units as u8);
            // SAFETY: the token exists only where the instruction works; it reads 64 bytes, and the shapes are within
            // the limits of palette 1. No other code of this process keeps anything in tiles.
            unsafe {
                std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags));
            }
        }
        Tiles { units, signed, on_this_thread: PhantomData }
    }
}

/// Operations of one dot product of tiles: a multiplication and an addition for each of 16 tokens, 16 weight rows and 64
/// columns.
const OPERATIONS: usize = 2 * LANES * LANES * 4 * TILE_UNITS;

impl Amx {
    /// Multiplies tiles that stay in registers, `rounds` times, which is not zero; gives how many operations that takes.
    pub(super) fn spin(self, rounds: usize) -> usize {
        assert!(rounds > 0);
        let tiles = self.configure(TILE_UNITS, true);
        // SAFETY: `tiles` is the proof that the tiles have their shapes and the instructions work; no memory is touched.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "tilezero tmm6",
                "tilezero tmm7",
                "2:",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
        drop(tiles);
        4 * OPERATIONS * rounds
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the instruction works, as it did when the tiles were configured.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::asm!("tilerelease", options(nostack, preserves_flags));
        }
    }
}

/// Sums of a step: for each tile of tokens and each vector of weight rows, 16 tokens of 16 rows.
#[repr(align(64))]
struct Sums([[[[i32; LANES]; LANES]; VECTORS]; TOKENS / LANES]);

/// The instructions of one block: tiles are zeroed, multiplied and stored.
#[cfg(target_arch = "x86_64")]
macro_rules! step {
    (one, $dot:literal, $a:expr, $stride:expr, $b:expr, $to:expr) => {
        std::arch::asm!(
            "tileloadd tmm4, [{a} + {stride}*1]",
            "tileloadd tmm6, [{b} + {panel}*1]",
            "tileloadd tmm7, [{b} + {panel}*1 + 64]",
            "tilezero tmm0",
            "tilezero tmm1",
            concat!($dot, " tmm0, tmm4, tmm6"),
            concat!($dot, " tmm1, tmm4, tmm7"),
            "tilestored [{to} + {row}*1], tmm0",
            "tilestored [{to} + {row}*1 + 1024], tmm1",
            a = in(reg) $a, stride = in(reg) $stride, b = in(reg) $b, panel = in(reg) 64 * VECTORS,
            to = in(reg) $to, row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
    (two, $dot:literal, $a:expr, $stride:expr, $b:expr, $to:expr) => {
        std::arch::asm!(
            "tileloadd tmm4, [{a} + {stride}*1]",
            "tileloadd tmm6, [{b} + {panel}*1]",
            "tileloadd tmm7, [{b} + {panel}*1 + 64]",
            "tileloadd tmm5, [{second} + {stride}*1]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            concat!($dot, " tmm0, tmm4, tmm6"),
            concat!($dot, " tmm1, tmm4, tmm7"),
            concat!($dot, " tmm2, tmm5, tmm6"),
            concat!($dot, " tmm3, tmm5, tmm7"),
            "tilestored [{to} + {row}*1], tmm0",
            "tilestored [{to} + {row}*1 + 1024], tmm1",
            "tilestored [{to} + {row}*1 + 2048], tmm2",
            "tilestored [{to} + {row}*1 + 3072], tmm3",
            a = in(reg) $a, second = in(reg) $a.wrapping_byte_add(16 * $stride), stride = in(reg) $stride,
            b = in(reg) $b, panel = in(reg) 64 * VECTORS, to = in(reg) $to, row = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

impl Tiles {
    /// Multiplies one block of the weights of `panel`, from `panel_unit` on, with `activations` from `unit` on: `high` tiles
    /// of 16 rows of `units` each.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn step(
        &self,
        (activations, units, high): (&[i32], usize, usize),
        unit: usize,
        panel: &Panel,
        panel_unit: usize,
        sums: &mut Sums,
    ) {
        assert!(high == 1 || high == 2);
        assert!(unit + self.units <= units && high * LANES * units <= activations.len());
        assert!((panel_unit + self.units) * VECTORS <= panel.codes.len());
        let stride = 4 * units;
        let to = sums.0.as_mut_ptr();
        // SAFETY: `self` is the proof that the tiles have their shapes and the instructions work. Rows of activations are
        // `stride` bytes apart, 16 for each of `high` tiles, and `4 * self.units` bytes of each are read from `unit` on;
        // `self.units` rows of 64 bytes of the panel are read, and 16 rows of 64 bytes written for each of the
        // `high * VECTORS` tiles of sums: all within the slices, as asserted above.
        unsafe {
            let (a, b) = (activations.as_ptr().add(unit), panel.codes.as_ptr().add(panel_unit * VECTORS));
            match (high, self.signed) {
                (1, true) => step!(one, "tdpbssd", a, stride, b, to),
                (1, false) => step!(one, "tdpbsud", a, stride, b, to),
                (_, true) => step!(two, "tdpbssd", a, stride, b, to),
                (_, false) => step!(two, "tdpbsud", a, stride, b, to),
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn step(&self, _: (&[i32], usize, usize), _: usize, _: &Panel, _: usize, _: &mut Sums) {
        unreachable!("there are tiles on x86-64 only")
    }
}

impl Multiply for Tiles {
    const VECTORS: usize = VECTORS;

    fn signed(&self) -> bool {
        self.signed
    }

    #[inline(always)]
    fn add<S: Simd>(
        &self,
        simd: S,
        (x, tile): (&Rounded, &Tile),
        panel: &Panel,
        range: Range<usize>,
        results: &mut [Aligned<[f32; LANES]>],
    ) {
        let high = tile.tokens.div_ceil(LANES);
        let codes = &tile.codes[..TOKENS * x.units];
        let scales = &tile.scales.as_chunks::<TOKENS>().0[range.clone()];
        let code_sums = &tile.sums.as_chunks::<TOKENS>().0[range.clone()];
        let blocks = &x.blocks[range];
        let Some(first) = blocks.first() else { return };
        let results = results.as_chunks_mut::<VECTORS>().0;
        // While the tiles of one block run, the sums of the one before are scaled.
        let mut sums = [const { Sums([[[[0; LANES]; LANES]; VECTORS]; TOKENS / LANES]) }; 2];
        for step in 0..=blocks.len() {
            if let Some(block) = blocks.get(step) {
                self.step((codes, x.units, high), block.unit, panel, block.unit - first.unit, &mut sums[step % 2]);
            }
            let Some(index) = step.checked_sub(1) else { continue };
            let group = blocks[index].group - first.group;
            let weight_scales = &panel.scales[group * VECTORS..][..VECTORS];
            let minus_zeros = &panel.minus_zeros[group * VECTORS..][..VECTORS];
            for (high, sums) in sums[index % 2].0[..high].iter().enumerate() {
                for (row, &scale) in scales[index][high * LANES..][..LANES].iter().enumerate() {
                    let token = high * LANES + row;
                    let scale = simd.splat(scale);
                    for vector in 0..VECTORS {
                        let mut dot = simd.i32_to_f32(simd.load_i32(&sums[vector][row]));
                        if !self.signed {
                            // Both terms and their sum are integers below 2^24, so this is exact.
                            let minus_zero = simd.i32_to_f32(simd.load_i32(&minus_zeros[vector]));
                            dot = simd.mul_add(minus_zero, simd.splat(code_sums[index][token]), dot);
                        }
                        let result = &mut results[token][vector];
                        let scale = simd.mul(simd.load(&weight_scales[vector]), scale);
                        simd.store(simd.mul_add(dot, scale, simd.load(result)), result);
                    }
                }
            }
        }
    }
}
