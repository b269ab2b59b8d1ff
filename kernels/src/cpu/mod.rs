//! Kernels on the CPU: one algorithm for all instruction sets, chosen when the program starts.

mod activation;
mod ahead;
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_codes;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_codes;
#[cfg(target_arch = "x86_64")]
mod avx512_transpose;
mod cholesky;
mod convolution;
mod dequantize;
pub mod describe;
mod elementwise;
mod feedback;
mod gemm_exact;
mod gemm_int8;
mod gemm_prepare;
mod gemv;
mod gemv_codes;
mod gemv_eights;
mod gemv_exact;
mod gemv_int8;
mod gemv_prepare;
mod gemv_row;
mod gemv_short;
mod gemv_wide;
mod gram;
mod loss;
mod matmul;
mod norm;
mod panel;
mod pool;
pub mod probe;
pub mod quantize;
mod resolvent;
mod rounding;
mod route;
mod scalar;
mod scale_search;
mod scan;
mod scratch;
pub mod simd;

use std::fmt;
use std::str::FromStr;

pub use attention::KeyValueCache;
pub use feedback::Feedback;
pub use gemv::Arithmetic;
pub use gram::{gram_index, gram_len};
pub use loss::Comparison;
pub use rounding::activation_blocks;
pub use route::top_k;
pub use scan::SelectiveScan;

use amx::Amx;
#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use scalar::Scalar;
use simd::Simd;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// No vector instructions: every CPU.
    Scalar,
    /// x86-64 with AVX2, FMA, F16C and BMI2.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI.
    Avx512,
    /// AVX-512 with the tiles of AMX for INT8 products of many tokens: Sapphire Rapids upward, on Linux.
    ///
    /// A process that may use tiles cannot install alternate signal stacks below about 11 KB any more; where that matters,
    /// choose [`Isa::Avx512`].
    Amx,
}

impl Isa {
    /// Every instruction set, slowest first, whether or not this CPU has it.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The name that [`Display`](fmt::Display) prints and [`FromStr`] reads.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| IsaError::Unknown(name.to_owned()))
    }
}

/// Why the instruction set that the user asked for cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    #[error("`{0}` is not an instruction set: use scalar, avx2, avx512 or amx")]
    Unknown(String),
    #[error("this CPU does not support {0}")]
    Unsupported(Isa),
}

/// The token of the instruction set that a [`Cpu`] runs on.
#[derive(Clone, Copy, Debug)]
enum Token {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// The CPU back end on one instruction set: every operation is a method.
///
/// Results are bit-identical on all instruction sets and for any number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    token: Token,
    /// Tiles beside the vectors of `token`.
    amx: Option<Amx>,
}

/// An algorithm over the logical vector.
///
/// Closures and functions without `#[inline(always)]` are not compiled with the features of the instruction set, so the
/// body of [`run`](Self::run) and what it calls carry that attribute, and parallel loops dispatch inside their tasks.
pub trait Kernel {
    type Output;
    /// Runs on the instruction set of `simd`. Mark it `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Cpu {
    /// The environment variable that [`from_environment`](Self::from_environment) reads.
    pub const ENVIRONMENT: &'static str = "BKPACK_ISA";

    /// The fastest instruction set of this CPU.
    pub fn detect() -> Self {
        Isa::ALL.into_iter().rev().find_map(Self::with_isa).unwrap_or(Self { token: Token::Scalar(Scalar), amx: None })
    }

    /// The back end on `isa`, or `None` if this CPU lacks it. The one place where features are detected.
    pub fn with_isa(isa: Isa) -> Option<Self> {
        let token = match isa {
            Isa::Scalar => Token::Scalar(Scalar),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Token::Avx2(Avx2::detect()?),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => Token::Avx512(Avx512::detect()?),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Amx => return None,
        };
        let amx = if isa == Isa::Amx { Some(Amx::detect()?) } else { None };
        Some(Self { token, amx })
    }

    /// This back end with AMX tiles beside it, whether or not the CPU has them: for tests that emulate them.
    ///
    /// # Safety
    /// On every thread that uses the result, the tile and INT8 instructions of AMX work: in hardware, after the operating
    /// system has allowed the state, or because a handler of the illegal-instruction signal performs them.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    pub unsafe fn with_amx_unchecked(self) -> Self {
        // SAFETY: the caller's promise.
        Self { amx: Some(unsafe { Amx::assume() }), ..self }
    }

    /// The instruction set that the environment variable `BKPACK_ISA` names, or the fastest one where it is not set.
    ///
    /// # Errors
    /// The variable holds no instruction set, or one that this CPU lacks.
    pub fn from_environment() -> Result<Self, IsaError> {
        match std::env::var_os(Self::ENVIRONMENT) {
            None => Ok(Self::detect()),
            Some(name) => {
                let isa = name.to_string_lossy().parse()?;
                Self::with_isa(isa).ok_or(IsaError::Unsupported(isa))
            }
        }
    }

    /// The back end on every instruction set that this CPU has, slowest first.
    pub fn available() -> Vec<Self> {
        Isa::ALL.into_iter().filter_map(Self::with_isa).collect()
    }

    /// The instruction set that kernels run on.
    pub fn isa(self) -> Isa {
        if self.amx.is_some() {
            return Isa::Amx;
        }
        match self.token {
            Token::Scalar(_) => Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => Isa::Avx512,
        }
    }

    /// Runs `kernel` in a function compiled for the instruction set.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.token {
            Token::Scalar(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(simd) => simd.run(kernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse".parse::<Isa>().unwrap_err();
        assert_eq!(error.to_string(), "`sse` is not an instruction set: use scalar, avx2, avx512 or amx");
    }

    #[test]
    fn detection_finds_the_fastest() {
        let available = Cpu::available();
        assert_eq!(available.first().map(|cpu| cpu.isa()), Some(Isa::Scalar));
        assert_eq!(available.last().map(|cpu| cpu.isa()), Some(Cpu::detect().isa()));
    }
}
