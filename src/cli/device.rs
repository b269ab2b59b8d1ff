//! The option of every subcommand that runs a model on the CPU or on a GPU.

use bkpack::{
    Result,
    model::weight_bytes,
    ops::{
        cpu::Activations,
        device::{Device, DeviceChoice},
    },
    report::table::count,
    tensor::TensorSource,
};
use clap::Args;

use super::Common;

/// Where the model runs.
#[derive(Args, Debug)]
pub struct DeviceArgs {
    /// Where the model runs: auto takes the GPU if one can be used, and says which device it took
    #[arg(long, value_enum, value_name = "cpu|cuda|auto", default_value_t, hide_possible_values = true)]
    device: DeviceChoice,
}

impl DeviceArgs {
    /// Makes the device ready and says which it is, what the models need of its memory and what is free.
    ///
    /// # Errors
    /// As [`DeviceChoice::open`].
    pub fn open<'a>(
        &self,
        sources: impl IntoIterator<Item = &'a dyn TensorSource>,
        activations: Activations,
        common: &Common,
    ) -> Result<Device> {
        let mut needed = 0;
        let (device, notice) = self.device.open(activations, || {
            needed = sources.into_iter().map(weight_bytes).sum::<Result<u64>>()?;
            Ok(needed)
        })?;
        notice.iter().for_each(|notice| common.notice(notice));
        if let Device::Cuda(cuda) = &device {
            let free = cuda.free_memory()?;
            common.notice(&format!(
                "the weights take {} bytes of {} that are free on the GPU",
                count(needed),
                count(free)
            ));
        }
        Ok(device)
    }

    /// Whether the GPU is asked for, or allowed.
    pub fn choice(&self) -> DeviceChoice {
        self.device
    }
}
