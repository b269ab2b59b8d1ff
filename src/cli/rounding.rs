//! How weights are rounded where no text is looked at, by name.

use bkpack_kernels::cpu::quantize::Rounding;
use clap::ValueEnum;

/// The ways to round by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoundingName {
    Rtn,
    Search,
}

impl From<RoundingName> for Rounding {
    fn from(name: RoundingName) -> Self {
        match name {
            RoundingName::Rtn => Self::Nearest,
            RoundingName::Search => Self::Search,
        }
    }
}
