//! Speed of the kernels, each line with its share of what limits it here.
//!
//! `cargo bench -p bkpack-kernels -- gemv int4` measures the lines that hold both words, `--json` prints an object a line;
//! `BKPACK_ISA` chooses the instruction set and `RAYON_NUM_THREADS` the threads.

mod matmul;
mod measure;
mod sequence;

use measure::Bench;

fn main() {
    let mut bench = Bench::from_arguments();
    bench.limit("limit  f32 multiply-adds", "GOP/s", Bench::fma);
    bench.limit("limit  INT8 products", "GOP/s", Bench::int8);
    bench.limit("limit  exponentials", "G/s", Bench::exp);
    for megabytes in [100, 640] {
        bench.limit(&format!("limit  reading {megabytes} MB"), "GB/s", |bench| bench.read(megabytes * 1_000_000));
    }
    matmul::few_tokens(&mut bench);
    matmul::many_tokens(&mut bench);
    sequence::run(&mut bench);
}
