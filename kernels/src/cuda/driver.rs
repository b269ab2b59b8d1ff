//! The driver: found when the program runs, asked once whether it can be used.

use std::{ffi::CStr, fmt};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice, CUdevice_attribute, CUresult},
};

use super::error::{CudaError, Result};

/// The oldest compute capability that the kernels are compiled for.
pub const OLDEST_CARD: (u32, u32) = (8, 0);

/// The functions that are called; an old driver may lack some.
const FUNCTIONS: [&CStr; 32] = [
    c"cuInit",
    c"cuDriverGetVersion",
    c"cuGetErrorName",
    c"cuGetErrorString",
    c"cuDeviceGetCount",
    c"cuDeviceGet",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxSetCurrent",
    c"cuStreamCreate",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamBeginCapture_v2",
    c"cuStreamEndCapture",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuGraphDestroy",
    c"cuGraphExecDestroy",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuModuleGetFunction",
    c"cuFuncSetAttribute",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemGetInfo_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuLaunchKernel",
];

/// A version of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The version of CUDA that came with each version of the PTX language, and the first driver for Linux that reads it
/// (PTX ISA, release notes; CUDA Toolkit, release notes).
const RELEASES: [((u32, u32), Version, &str); 13] = [
    ((7, 8), Version { major: 11, minor: 8 }, "520"),
    ((8, 0), Version { major: 12, minor: 0 }, "525"),
    ((8, 1), Version { major: 12, minor: 1 }, "530"),
    ((8, 2), Version { major: 12, minor: 2 }, "535"),
    ((8, 3), Version { major: 12, minor: 3 }, "545"),
    ((8, 4), Version { major: 12, minor: 4 }, "550"),
    ((8, 5), Version { major: 12, minor: 5 }, "555"),
    ((8, 6), Version { major: 12, minor: 7 }, "565"),
    ((8, 7), Version { major: 12, minor: 8 }, "570"),
    ((8, 8), Version { major: 12, minor: 9 }, "575"),
    ((9, 0), Version { major: 13, minor: 0 }, "580"),
    ((9, 1), Version { major: 13, minor: 1 }, "590"),
    ((9, 2), Version { major: 13, minor: 2 }, "595"),
];

/// What a text of PTX needs: the version of CUDA and the first driver that has it; `None` for a text that is no PTX or
/// newer than this table.
fn needed(ptx: &str) -> Option<(Version, &'static str)> {
    let version = ptx.lines().find_map(|line| line.trim().strip_prefix(".version"))?.trim();
    let (major, minor) = version.split_once('.')?;
    let language = (major.parse().ok()?, minor.parse().ok()?);
    RELEASES.iter().find(|(known, ..)| *known >= language).map(|&(_, version, release)| (version, release))
}

/// Turns what the driver said about a call into an error.
pub(super) fn refused(call: &'static str) -> impl FnOnce(DriverError) -> CudaError {
    move |error| {
        let text = |text: std::result::Result<&CStr, DriverError>| match text {
            Ok(text) => text.to_string_lossy().into_owned(),
            Err(_) => format!("error {}", error.0 as u32),
        };
        CudaError::Call { call, why: format!("{} ({})", text(error.error_string()), text(error.error_name())) }
    }
}

/// Loads the driver and checks that it can compile all of `kernels`, texts of PTX.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::StubDriver`], [`CudaError::MissingFunction`], [`CudaError::OldDriver`],
/// [`CudaError::NoDevice`].
pub(super) fn start<'a>(kernels: impl IntoIterator<Item = &'a str>) -> Result<()> {
    // The bindings panic without the library or a function of it, so each is looked for first.
    // SAFETY: opening the driver's library runs its initializers, which is what any CUDA program does first.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // SAFETY: as above; the library is there, so that this does not panic.
    let library = unsafe { sys::culib() };
    let has = |name: &CStr| {
        // SAFETY: the symbol is looked for and never called or read.
        unsafe { library.get::<*const ()>(name.to_bytes_with_nul()) }.is_ok()
    };
    let missing = |name: &&&'static CStr| !has(name);
    if !has(c"cuDriverGetVersion") || !has(c"cuInit") {
        return Err(CudaError::MissingFunction { name: "cuDriverGetVersion" });
    }
    let mut version = 0;
    // SAFETY: the version is written to a live integer; this call is allowed before cuInit.
    let told = unsafe { sys::cuDriverGetVersion(&mut version) };
    if told == CUresult::CUDA_ERROR_STUB_LIBRARY {
        return Err(CudaError::StubDriver);
    }
    let found = Version { major: version as u32 / 1000, minor: version as u32 % 1000 / 10 };
    let newest = kernels.into_iter().filter_map(needed).max();
    if let Some((needed, release)) = newest.filter(|(needed, _)| *needed > found) {
        return Err(CudaError::OldDriver { found, needed, release });
    }
    if let Some(name) = FUNCTIONS.iter().find(missing) {
        return Err(CudaError::MissingFunction { name: name.to_str().unwrap_or_default() });
    }
    match result::init() {
        Ok(()) => Ok(()),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err(CudaError::NoDevice),
        Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => Err(CudaError::StubDriver),
        Err(error) => Err(refused("cuInit")(error)),
    }
}

/// A card as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// The name that its maker gave it: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Bytes of shared memory that a block may ask for.
    pub shared_memory: u32,
}

/// The first card that the driver shows.
///
/// # Errors
/// [`CudaError::NoDevice`], [`CudaError::OldCard`], [`CudaError::Call`].
pub(super) fn first_card() -> Result<(CUdevice, Card)> {
    let count = result::device::get_count().map_err(refused("cuDeviceGetCount"))?;
    if count < 1 {
        return Err(CudaError::NoDevice);
    }
    let device = result::device::get(0).map_err(refused("cuDeviceGet"))?;
    let name = result::device::get_name(device).map_err(refused("cuDeviceGetName"))?;
    let attribute = |which| {
        // SAFETY: the device is the one that the driver gave.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.map(|value| value as u32).map_err(refused("cuDeviceGetAttribute"))
    };
    use CUdevice_attribute as Attribute;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if (major, minor) < OLDEST_CARD {
        return Err(CudaError::OldCard { name, major, minor });
    }
    let card =
        Card { name, shared_memory: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? };
    Ok((device, card))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptx_says_which_driver_it_needs() {
        let of = |text: &str| needed(&format!("//\n\n.version {text}\n.target sm_80\n"));
        assert_eq!(of("8.0"), Some((Version { major: 12, minor: 0 }, "525")));
        assert_eq!(of("8.7"), Some((Version { major: 12, minor: 8 }, "570")));
        assert_eq!(of("7.0"), Some((Version { major: 11, minor: 8 }, "520")));
        assert_eq!((of("99.0"), needed("nothing")), (None, None));
    }
}
