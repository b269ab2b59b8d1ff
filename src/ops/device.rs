//! Where a model runs: on the CPU, or on a card.

use std::rc::Rc;

use bkpack_kernels::cuda::Cuda;
use serde::Serialize;

use super::cpu::Activations;
use crate::error::{Error, Result, short};

/// Where the user wants it to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// On the CPU: the same figures on every machine.
    #[default]
    Cpu,
    /// On the NVIDIA GPU; an error where none can be used.
    Cuda,
    /// On the NVIDIA GPU if one can be used for the weights and the activations, else on the CPU.
    Auto,
}

/// Where it runs.
#[derive(Clone, Debug)]
pub enum Device {
    Cpu,
    Cuda(Rc<Cuda>),
}

/// What a record says of it, so that figures of different devices are told apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceRecord {
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// The name of the card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub card: Option<String>,
}

impl std::fmt::Display for DeviceRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.card {
            Some(card) => write!(f, "{}, {}", self.device, short(card)),
            None => f.write_str(self.device),
        }
    }
}

impl DeviceChoice {
    /// Makes the device ready for weights of so many bytes, and says what the user should know of it.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU is asked for and cannot be used, or has no room for the weights; what `weight_bytes`
    /// returns, which is asked only of a GPU.
    pub fn open(
        self,
        activations: Activations,
        weight_bytes: impl FnOnce() -> Result<u64>,
    ) -> Result<(Device, Option<String>)> {
        let on_cpu = |why: &str| Ok((Device::Cpu, Some(format!("running on the CPU: {why}"))));
        if self == DeviceChoice::Cpu {
            return Ok((Device::Cpu, None));
        }
        if self == DeviceChoice::Auto && activations == Activations::Int8 {
            return on_cpu("int8 activations are computed on it alone");
        }
        let opened = match Cuda::open() {
            Ok(cuda) => {
                let needed = weight_bytes()?;
                cuda.check_room(needed).map(|()| cuda)
            }
            Err(error) => Err(error),
        };
        match opened {
            Ok(cuda) => {
                let notice = format!("running on the GPU: {}", cuda.card().name);
                Ok((Device::Cuda(Rc::new(cuda)), Some(notice)))
            }
            Err(error) if self == DeviceChoice::Auto => on_cpu(&error.to_string()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Device {
    /// What records say.
    pub fn record(&self) -> DeviceRecord {
        match self {
            Device::Cpu => DeviceRecord { device: "cpu", card: None },
            Device::Cuda(cuda) => DeviceRecord { device: "cuda", card: Some(cuda.card().name.clone()) },
        }
    }

    /// Checks that so many bytes of weights fit the card before any is copied.
    ///
    /// # Errors
    /// [`Error::Cuda`] with what is needed and what is free.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(cuda) => cuda.check_room(bytes).map_err(Error::from),
        }
    }
}
