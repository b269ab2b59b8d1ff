//! bkpack: packs a full-precision language-model checkpoint into one verified file, runs it, and measures the cost.
//!
//! Start at [`checkpoint::open`] and [`pack::Packing`] to pack, at [`format::PackedFile`] to read, at
//! [`model::Model`] to run, at [`eval::perplexity::evaluate`] to measure, at [`export::export`] to hand a packed model to
//! another runtime. The library never prints and never exits.
//!
//! ```
//! use bkpack::{checkpoint, format::PackedFile, pack::{PackOptions, Packing}, policy::Policy, progress::Silent};
//! use bkpack::{eval::{perplexity::{Options, evaluate}, text}, ops::cpu::Activations, tensor::TensorSource};
//! use bkpack_kernels::Cpu;
//!
//! # let folder = tempfile::tempdir().unwrap();
//! # let output = folder.path().join("model.bkpack");
//! # let output = output.as_path();
//! let cpu = Cpu::detect();
//! let checkpoint = checkpoint::open("fixtures/llama".as_ref())?;
//! let options = PackOptions::new(Policy::uniform("int4:g64".parse()?, &[], &["embed=int8".into()])?);
//! Packing::plan(&checkpoint, &options, output, cpu, &Silent)?.write(cpu, false, &Silent)?;
//!
//! let packed = PackedFile::open(output)?;
//! packed.check_contents(&Silent)?; // every hash
//! let tensor = packed.tensor("model.embed_tokens.weight")?; // borrowed from the memory map
//! let mut row = vec![0.0; 256];
//! cpu.dequantize(&tensor.matrix(), 17, &mut row); // row 17 in f32
//!
//! let tokens = text::Tokenizer::load(&packed)?.encode("Once upon a time there was a king who had twelve daughters.")?;
//! let options = Options { ctx: Some(8), skip: 1, activations: Activations::Exact, allow_lookahead: false };
//! let measured = evaluate(cpu, &packed, Some(&checkpoint), &tokens, &options, &Silent)?;
//! println!("perplexity {:.2}, {:.2} bits a weight", measured.ppl, measured.bits_per_weight);
//! # assert!(measured.baseline.is_some());
//! # Ok::<_, bkpack::Error>(())
//! ```
//!
//! `examples/` has whole programs: `pack`, `dequantize`, and `candle`, which loads a packed model into candle tensors.

pub mod checkpoint;
pub mod encoding;
pub mod error;
pub mod eval;
pub mod export;
mod folder;
pub mod format;
mod json;
mod mmap;
pub mod model;
pub mod ops;
pub mod pack;
pub mod policy;
pub mod progress;
pub mod quant;
pub mod report;
pub mod synth;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
