//! INT8 products on AMX tiles: natively where the machine has them, and otherwise on an emulator.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod amx_emulator;

use amx_emulator::{Counts, Instruction, Memory, Tiles, decode};
use bkpack_kernels::bits::{pack_row, pack_stream};
use bkpack_kernels::cpu::activation_blocks;
use bkpack_kernels::reference;
use bkpack_kernels::{Cpu, Data, FloatType, Grid, Isa, Layout, Matrix};
use proptest::prelude::*;

/// `base` with tiles beside it.
fn with_tiles(base: Cpu) -> Cpu {
    if Cpu::with_isa(Isa::Amx).is_none() {
        amx_emulator::install();
    }
    // SAFETY: the machine has the instructions and the process may use them, or the emulator performs them.
    unsafe { base.with_amx_unchecked() }
}

#[test]
fn a_machine_with_amx_uses_it_if_it_may() {
    let description = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = description.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|found| found == flag);
    if has("amx_tile") && has("amx_int8") && Cpu::with_isa(Isa::Avx512).is_some() {
        // A sandbox may refuse the permission; then the vectors multiply.
        assert!([Isa::Amx, Isa::Avx512].contains(&Cpu::detect().isa()));
    } else {
        assert!(Cpu::with_isa(Isa::Amx).is_none());
        assert!(Cpu::available().iter().all(|cpu| cpu.isa() != Isa::Amx));
    }
}

/// A matrix and activations.
#[derive(Debug)]
struct Product {
    rows: usize,
    cols: usize,
    tokens: usize,
    layout: Layout,
    codes: Vec<u8>,
    scales: Vec<u8>, // f32
    zeros: Vec<u8>,
    x: Vec<f32>,
}

impl Product {
    fn new(layout: Layout, rows: usize, cols: usize, tokens: usize, seed: u64) -> Self {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u32
        };
        let most = u32::from(layout.grid.max_code());
        let mut packed = |count: usize, width: usize, pack: &dyn Fn(&[u8], &mut [u8])| {
            let mut all = vec![0; rows * width];
            for row in all.chunks_mut(width.max(1)) {
                let codes: Vec<u8> = (0..count).map(|_| (next() % (most + 1)) as u8).collect();
                pack(&codes, row);
            }
            all
        };
        let codes = packed(cols, layout.code_bytes(cols), &|codes, row| pack_row(layout.grid, codes, row));
        let zeros = packed(layout.groups(cols), layout.zero_bytes(cols), &|codes, row| {
            pack_stream(codes, layout.grid.stream_bits().unwrap(), row);
        });
        let mut float = || (next() >> 8) as f32 / (1 << 23) as f32 - 1.0;
        let scales = (0..rows * layout.groups(cols)).flat_map(|_| float().to_le_bytes()).collect();
        let x = (0..tokens * cols).map(|_| float()).collect();
        Self { rows, cols, tokens, layout, codes, scales, zeros, x }
    }

    fn matrix(&self) -> Matrix<'_> {
        let Self { layout, codes, scales, zeros, .. } = self;
        let scale_type = FloatType::F32;
        let data = Data::Quantized { layout: *layout, codes, scale_type, scales, zeros };
        Matrix::new(self.rows, self.cols, data).unwrap()
    }

    fn multiply(&self, cpu: Cpu) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.tokens * self.rows];
        cpu.matmul_int8(&self.x, &self.matrix(), &mut out);
        out
    }

    /// Compares with the oracle: three roundings and an addition for each block.
    fn check(&self, found: &[f32]) {
        let (w, expected) = (self.matrix(), reference::matmul_int8(&self.x, self.tokens, &self.matrix()));
        let blocks: Vec<_> = activation_blocks(self.layout.group, self.cols).collect();
        let roundings = (blocks.len() + 3) as f64 * f64::from(f32::EPSILON) / 2.0;
        for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
            let (x, row) = (&self.x[i / self.rows * self.cols..][..self.cols], i % self.rows);
            let magnitude: f64 = blocks
                .iter()
                .map(|block| {
                    let (codes, scale) = reference::quantize_activations(&x[block.clone()]);
                    let levels = block.clone().map(|col| reference::level(&w, row, col).unwrap());
                    let dot: i32 = levels.clone().zip(&codes).map(|((level, _), &code)| level * i32::from(code)).sum();
                    let (_, weight_scale) = reference::level(&w, row, block.start).unwrap();
                    f64::from(dot).abs() * f64::from(weight_scale).abs() * f64::from(scale)
                })
                .sum();
            let bound = roundings / (1.0 - roundings) * magnitude + blocks.len() as f64 * 1e-44;
            assert!((f64::from(found) - expected).abs() <= bound, "{i} is {found} for {expected}");
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn grids() -> impl Strategy<Value = Grid> {
    prop_oneof![
        Just(Grid::Ternary),
        Just(Grid::Binary),
        (2..=8u32, any::<bool>()).prop_map(|(bits, symmetric)| Grid::Int { bits, symmetric }),
        Just(Grid::Int { bits: 8, symmetric: false }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tiles_agree_with_the_oracle_and_with_vectors(
        grid in grids(),
        group in prop_oneof![Just(1usize), Just(7), Just(32), Just(36), Just(64), Just(100), Just(128), Just(1 << 40)],
        rows in prop_oneof![Just(1usize), 2..70usize],
        cols in prop_oneof![Just(1usize), 2..300usize],
        tokens in prop_oneof![8..40usize, 40..100usize],
        seed in any::<u64>(),
    ) {
        let product = Product::new(Layout { grid, group }, rows, cols, tokens, seed);
        let expected = product.multiply(Cpu::with_isa(Isa::Scalar).unwrap());
        product.check(&expected);
        for base in Cpu::available() {
            prop_assert_eq!(bits(&product.multiply(base)), bits(&expected), "{}", base.isa());
            prop_assert_eq!(bits(&product.multiply(with_tiles(base))), bits(&expected), "tiles beside {}", base.isa());
        }
    }
}

#[test]
fn long_rows_are_unpacked_in_parts() {
    for (width, symmetric, group) in [(4, true, 128), (8, false, 64), (4, false, 100), (3, true, 1 << 40)] {
        let layout = Layout { grid: Grid::Int { bits: width, symmetric }, group };
        let product = Product::new(layout, 35, 3333, 19, 11);
        let found = product.multiply(with_tiles(Cpu::detect()));
        product.check(&found);
        assert_eq!(bits(&found), bits(&product.multiply(Cpu::detect())));
    }
}

#[test]
fn what_is_not_finite_poisons_its_token_alone() {
    let layout = Layout { grid: Grid::Int { bits: 4, symmetric: false }, group: 64 };
    let mut product = Product::new(layout, 40, 130, 37, 5);
    product.x[20 * 130 + 129] = f32::INFINITY;
    let out = product.multiply(with_tiles(Cpu::detect()));
    for (i, v) in out.iter().enumerate() {
        assert_eq!(v.is_nan(), i / 40 == 20, "{i}");
    }
}

/// Whatever the shape, each tile of weights meets each tile of tokens once a block, and each load serves two products.
#[test]
fn tiles_are_blocked_two_by_two() {
    if Cpu::with_isa(Isa::Amx).is_some() {
        println!("not run: hardware counts no instructions; where there is none, the emulator does");
        return;
    }
    let layout = Layout { grid: Grid::Int { bits: 4, symmetric: true }, group: 128 };
    let product = Product::new(layout, 96, 320, 64, 3);
    let cpu = with_tiles(Cpu::detect());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(amx_emulator::take_counts);
    pool.install(|| product.multiply(cpu));
    let counts = pool.install(amx_emulator::take_counts);
    let products = (96 / 16) * (64 / 16) * (320 / 64);
    assert_eq!((counts.dots, counts.loads, counts.stores), (products, products, products));
    assert!(counts.configurations >= 1);
}

#[test]
fn the_rate_of_tiles_counts_their_operations() {
    let cpu = with_tiles(Cpu::detect());
    if Cpu::with_isa(Isa::Amx).is_some() {
        // Hardware counts no instructions.
        let rate = cpu.int8_rate();
        assert!((1e6..1e17).contains(&rate), "{rate}");
        return;
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(amx_emulator::take_counts);
    let start = std::time::Instant::now();
    let rate = pool.install(|| cpu.int8_rate());
    let seconds = start.elapsed().as_secs_f64();
    let counts = pool.install(amx_emulator::take_counts);
    let operations = f64::from(u32::try_from(counts.dots).unwrap()) * 2.0 * 16.0 * 16.0 * 64.0;
    assert_eq!((counts.loads, counts.stores), (0, 0));
    // The rate is that of the fastest of all runs but the first, and these take nearly all of the time.
    assert!(operations > 0.0 && rate >= operations / seconds / 2.0, "{rate} for {operations} in {seconds} s");
}

#[test]
fn the_emulator_decodes_what_the_manual_encodes() {
    let mut registers = [0; 16];
    (registers[0], registers[9], registers[12], registers[13]) = (0x1000, 0x40, 0x2000, 0x3000);
    let decoded = |code: &[u8]| decode(code, &registers);
    let memory = |address, stride| Memory { address, stride };
    let dot = |a_signed, b_signed| Instruction::Dot { sums: 1, a: 2, b: 3, a_signed, b_signed };
    assert_eq!(decoded(&[0xc4, 0xe2, 0x63, 0x5e, 0xca]), Some((dot(true, true), 5)));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x62, 0x5e, 0xca]), Some((dot(true, false), 5)));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x61, 0x5e, 0xca]), Some((dot(false, true), 5)));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x60, 0x5e, 0xca]), Some((dot(false, false), 5)));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x78, 0x49, 0xc0]), Some((Instruction::Release, 5)));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x7b, 0x49, 0xf8]), Some((Instruction::Zero(7), 5)));
    let load = Instruction::LoadConfiguration(memory(0x1000, 0));
    assert_eq!(decoded(&[0xc4, 0xe2, 0x78, 0x49, 0x00]), Some((load, 5)));
    // tileloadd tmm2, [r12 + r9*2 + 8]; tilestored [r13 + r9], tmm0
    let load = Instruction::Load(2, memory(0x2008, 0x80));
    assert_eq!(decoded(&[0xc4, 0x82, 0x7b, 0x4b, 0x54, 0x4c, 0x08]), Some((load, 7)));
    let store = Instruction::Store(0, memory(0x3000, 0x40));
    assert_eq!(decoded(&[0xc4, 0x82, 0x7a, 0x4b, 0x44, 0x0d, 0x00]), Some((store, 7)));
    assert_eq!(decoded(&[0x0f, 0x0b, 0, 0, 0]), None);
}

#[test]
fn the_emulator_is_as_strict_as_hardware() {
    let configuration = |shapes: &[(u8, u8)]| {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        for (tile, &(rows, width)) in shapes.iter().enumerate() {
            (bytes[48 + tile], bytes[16 + 2 * tile]) = (rows, width);
        }
        bytes
    };
    let dot = Instruction::Dot { sums: 0, a: 1, b: 2, a_signed: true, b_signed: true };
    // SAFETY: no instruction here touches memory.
    let perform = |tiles: &mut Tiles, instruction| unsafe { tiles.perform(instruction) };
    let mut tiles = Tiles::new();
    assert!(perform(&mut tiles, Instruction::Zero(0)).is_err());
    assert!(tiles.configure(configuration(&[(17, 64)])).is_err());
    assert!(tiles.configure(configuration(&[(16, 65)])).is_err());
    assert!(tiles.configure(configuration(&[(16, 0)])).is_err());
    assert!(tiles.configure([0; 64]).is_err());
    assert_eq!(tiles.configure(configuration(&[(16, 64), (16, 32), (8, 64)])), Ok(()));
    assert_eq!(perform(&mut tiles, dot), Ok(()));
    assert!(perform(&mut tiles, Instruction::Zero(3)).is_err());
    for wrong in [[(15, 64), (16, 32), (8, 64)], [(16, 60), (16, 32), (8, 64)], [(16, 64), (16, 32), (9, 64)]] {
        assert_eq!(tiles.configure(configuration(&wrong)), Ok(()));
        assert!(perform(&mut tiles, dot).is_err());
    }
    assert_eq!(tiles.counts, Counts { dots: 1, ..Counts::default() });
    assert_eq!(perform(&mut tiles, Instruction::Release), Ok(()));
    assert!(perform(&mut tiles, Instruction::Zero(0)).is_err());
}
