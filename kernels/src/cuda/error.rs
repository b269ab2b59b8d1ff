//! What can go wrong between this program and the card, each with what to do about it.

use super::driver::Version;

/// Result of the CUDA back end.
pub type Result<T, E = CudaError> = std::result::Result<T, E>;

/// Why the card cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// The dynamic linker finds no driver library.
    #[error("no NVIDIA driver library (libcuda.so.1) was found: install the NVIDIA driver, or run on the CPU")]
    NoDriver,
    /// The library is the link-time stand-in of a toolkit.
    #[error("the driver library that was found is a stub of the CUDA toolkit: take its folder out of LD_LIBRARY_PATH")]
    StubDriver,
    /// The driver cannot compile the kernels of this program.
    #[error(
        "the NVIDIA driver knows CUDA up to {found}, but {needed} is needed: update the driver to {release} or newer"
    )]
    OldDriver { found: Version, needed: Version, release: &'static str },
    /// The driver library lacks a function.
    #[error("the NVIDIA driver has no function {name}: update the driver")]
    MissingFunction { name: &'static str },
    /// The driver sees no card.
    #[error(
        "the NVIDIA driver finds no GPU: check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
    )]
    NoDevice,
    /// A card without the tensor cores that the kernels use.
    #[error("{name} has compute capability {major}.{minor}, but 8.0 or newer (Ampere) is needed: run on the CPU")]
    OldCard { name: String, major: u32, minor: u32 },
    /// The card's memory is full.
    #[error(
        "{asked} bytes of GPU memory are needed where {free} are free: close other programs on the GPU, pack the model \
         smaller, shorten the context, or run on the CPU"
    )]
    OutOfMemory { asked: u64, free: u64 },
    /// The kernels take sizes and positions of 32 bits.
    #[error("{what} of {found} exceeds what a kernel takes on the GPU ({most}): run on the CPU")]
    TooLarge { what: &'static str, found: usize, most: usize },
    /// The driver refused a call for another reason.
    #[error("the NVIDIA driver refused {call}: {why}")]
    Call { call: &'static str, why: String },
}
