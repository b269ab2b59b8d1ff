//! The options that say which tensor gets which encoding.

use std::path::PathBuf;

use bkpack_kernels::{FloatType, Grid};
use clap::{Args, ValueEnum};

use super::{
    Budget, Choice, ComponentRules, Dynamic, Exceptions, Levels, Policy, PolicyFile, Recipe, SensitivityTable, Target,
};
use crate::{
    encoding::{DEFAULT_GROUP, GroupSize, Request},
    error::{Error, Result},
};

/// How encodings are chosen.
#[derive(Args, Debug, Default)]
pub struct PolicyOptions {
    /// How encodings are chosen [default: uniform]
    #[arg(long, value_enum)]
    pub policy: Option<PolicyName>,

    /// Encode every tensor as this recipe says, see --plan-only
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,

    /// uniform: bits of a weight: 2 to 8, 16 (FP16) or 32; 1 is binary, 1.58 ternary [default: 4]
    #[arg(long, value_name = "BITS", value_parser = parse_bits)]
    pub bits: Option<Bits>,

    /// uniform, dynamic: columns that share a scale: 32, 64, 128, 256, or row for one scale a row [default: 128]
    #[arg(long, value_name = "N", value_parser = |text: &str| text.parse::<GroupSize>().map_err(|_| "use 32, 64, 128, 256 or row"))]
    pub group_size: Option<GroupSize>,

    /// uniform: give each group a zero point of its own
    #[arg(long)]
    pub asymmetric: bool,

    /// dynamic: how important each tensor is, as `bkpack importance` writes it [default: measured on --calib]
    #[arg(long, value_name = "FILE")]
    pub importance: Option<PathBuf>,

    /// dynamic: the share of tensors, the most important, at high precision, to the nearest tensor [default: 0.2]
    #[arg(long, value_name = "SHARE")]
    pub high_ratio: Option<f64>,

    /// dynamic: the share of tensors, the least important, at INT4, to the nearest tensor [default: 0.4]
    #[arg(long, value_name = "SHARE")]
    pub low_ratio: Option<f64>,

    /// dynamic: the high precision [default: fp16]
    #[arg(long, value_enum)]
    pub high: Option<High>,

    /// budget: what each encoding of each tensor costs, as `bkpack sensitivity` writes it [default: measured on --calib]
    #[arg(long, value_name = "FILE")]
    pub sensitivity: Option<PathBuf>,

    /// budget: make the file at least this many times smaller than the weights in FP32
    #[arg(long, value_name = "X")]
    pub target_ratio: Option<f64>,

    /// budget: make the file at most this many bits for a weight, everything counted
    #[arg(long, value_name = "BITS")]
    pub target_bpw: Option<f64>,

    /// budget: make the file at most this large, e.g. 80MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub target_size: Option<u64>,

    /// budget: give one encoding to tensors that work on the same input (q, k and v; gate and up)
    #[arg(long)]
    pub coupled: bool,

    /// Rules from names to components and their encodings, before the built-in ones (TOML, as src/policy/components.toml)
    #[arg(long, value_name = "FILE")]
    pub rules: Option<PathBuf>,

    /// Leave tensors whose name matches at their source precision (may be repeated)
    #[arg(long, value_name = "REGEX")]
    pub keep: Vec<String>,

    /// Encode tensors whose name matches as told, e.g. 'embed=int8:g64' (may be repeated; the last match decides)
    #[arg(long, value_name = "REGEX=ENCODING")]
    pub tensor: Vec<String>,
}

/// The policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyName {
    /// The same encoding for every matrix
    Uniform,
    /// By component: experts INT4, embeddings and head FP16, the rest INT8
    Component,
    /// By importance: the most important tensors FP16, the least INT4, the rest INT8
    Dynamic,
    /// The encodings that cost least in a file of a given size
    Budget,
    /// As a recipe says
    #[value(skip)]
    Recipe,
}

/// The highest precision of the dynamic policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum High {
    Fp16,
    Int8,
}

/// What a policy goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistics {
    Importance,
    Sensitivity,
}

/// A uniform width before group and symmetry are known.
#[derive(Clone, Copy, Debug)]
pub enum Bits {
    Int(u32),
    Ternary,
    Binary,
    Float(FloatType),
}

/// Reads a uniform width: 1, 1.58, 2 to 8, 16 or 32.
///
/// # Errors
/// A sentence that names these.
pub fn parse_bits(text: &str) -> Result<Bits, &'static str> {
    Ok(match text {
        "1" | "binary" => Bits::Binary,
        "1.58" | "ternary" => Bits::Ternary,
        "16" => Bits::Float(FloatType::F16),
        "32" => Bits::Float(FloatType::F32),
        _ => match text.parse() {
            Ok(bits @ 2..=8) => Bits::Int(bits),
            _ => return Err("use 1, 1.58, 2 to 8, 16 or 32"),
        },
    })
}

/// Reads a size with its unit, e.g. `2GB`.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" => 1_000,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        unit => return Err(format!("unknown unit {unit:?}; use B, KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("{digits:?} is not a whole number"))?;
    number.checked_mul(unit).filter(|&size| size > 0).ok_or_else(|| "a size is at least one byte".into())
}

impl PolicyOptions {
    fn name(&self) -> PolicyName {
        match self.recipe {
            Some(_) => PolicyName::Recipe,
            None => self.policy.unwrap_or(PolicyName::Uniform),
        }
    }

    /// What must be measured before the policy can choose; `None` where a file holds it or nothing is needed.
    pub fn missing(&self) -> Option<Statistics> {
        match self.name() {
            PolicyName::Dynamic if self.importance.is_none() => Some(Statistics::Importance),
            PolicyName::Budget if self.sensitivity.is_none() => Some(Statistics::Sensitivity),
            _ => None,
        }
    }

    /// Whether the policy looks at a calibration text that is there.
    pub fn goes_by_text(&self) -> bool {
        self.is_budget() || self.missing().is_some()
    }

    /// Whether a text lets the policy's choice be measured against others.
    pub fn is_budget(&self) -> bool {
        self.name() == PolicyName::Budget
    }

    /// The policy that these options describe; reads the files that they name and has [measured](Self::missing) what none
    /// of them holds.
    ///
    /// # Errors
    /// An option that does not belong to the policy or is missing, a file that does not parse.
    pub fn policy(&self, measure: impl FnOnce(Statistics, &ComponentRules) -> Result<PolicyFile>) -> Result<Policy> {
        let name = self.name();
        self.refuse_options_of_others(name)?;
        let exceptions = Exceptions::new(&self.keep, &self.tensor)?;
        let components = match &self.rules {
            Some(path) => ComponentRules::with_file(PolicyFile::read(path)?)?,
            None => ComponentRules::builtin(),
        };
        let measure = |statistics| measure(statistics, &components);
        let choice = match name {
            PolicyName::Uniform => Choice::Uniform(self.uniform()?),
            PolicyName::Component => Choice::Component,
            PolicyName::Dynamic => Choice::Dynamic(self.dynamic(measure)?),
            PolicyName::Budget => Choice::Budget(self.budget(measure)?),
            PolicyName::Recipe => {
                let path = self.recipe.as_ref().expect("a recipe was named");
                Choice::Recipe(Recipe::parse(PolicyFile::read(path)?)?)
            }
        };
        Ok(Policy { components, choice, exceptions })
    }

    /// An option that a policy would not look at is most likely a mistake, and so is one that another contradicts.
    fn refuse_options_of_others(&self, name: PolicyName) -> Result<()> {
        use PolicyName::{Budget, Dynamic, Uniform};
        if self.recipe.is_some() && self.policy.is_some() {
            return Err(Error::Option { option: "--recipe", why: "takes the place of --policy".into() });
        }
        let targets = [self.target_ratio.is_some(), self.target_bpw.is_some(), self.target_size.is_some()];
        if targets.into_iter().filter(|given| *given).count() > 1 {
            let why = "only one of it, --target-bpw and --target-size can be met";
            return Err(Error::Option { option: "--target-ratio", why: why.into() });
        }
        let options: [(_, bool, &[PolicyName]); 12] = [
            ("--bits", self.bits.is_some(), &[Uniform]),
            ("--group-size", self.group_size.is_some(), &[Uniform, Dynamic]),
            ("--asymmetric", self.asymmetric, &[Uniform]),
            ("--importance", self.importance.is_some(), &[Dynamic]),
            ("--high-ratio", self.high_ratio.is_some(), &[Dynamic]),
            ("--low-ratio", self.low_ratio.is_some(), &[Dynamic]),
            ("--high", self.high.is_some(), &[Dynamic]),
            ("--sensitivity", self.sensitivity.is_some(), &[Budget]),
            ("--target-ratio", self.target_ratio.is_some(), &[Budget]),
            ("--target-bpw", self.target_bpw.is_some(), &[Budget]),
            ("--target-size", self.target_size.is_some(), &[Budget]),
            ("--coupled", self.coupled, &[Budget]),
        ];
        match options.into_iter().find(|(_, given, policies)| *given && !policies.contains(&name)) {
            None => Ok(()),
            Some((option, _, policies)) => {
                let names = policies.iter().filter_map(PolicyName::to_possible_value);
                let names: Vec<_> = names.map(|value| format!("--policy {}", value.get_name())).collect();
                Err(Error::Option { option, why: format!("belongs to {}", names.join(" and ")) })
            }
        }
    }

    fn uniform(&self) -> Result<Request> {
        let symmetric = !self.asymmetric;
        let grid = match self.bits.unwrap_or(Bits::Int(4)) {
            Bits::Float(dtype) => return Ok(Request::Float(dtype)),
            Bits::Int(bits) => Grid::Int { bits, symmetric },
            _ if self.asymmetric => {
                return Err(Error::Option {
                    option: "--asymmetric",
                    why: "only integers of 2 to 8 bits have zero points".into(),
                });
            }
            Bits::Ternary => Grid::Ternary,
            Bits::Binary => Grid::Binary,
        };
        Ok(Request::Quantize { grid, group: self.group_size.unwrap_or(DEFAULT_GROUP) })
    }

    fn dynamic(&self, measure: impl FnOnce(Statistics) -> Result<PolicyFile>) -> Result<Dynamic> {
        let group = self.group_size.unwrap_or(DEFAULT_GROUP);
        let int = |bits| Request::Quantize { grid: Grid::Int { bits, symmetric: true }, group };
        let levels = Levels {
            high_ratio: self.high_ratio.unwrap_or(0.2),
            low_ratio: self.low_ratio.unwrap_or(0.4),
            high: match self.high.unwrap_or(High::Fp16) {
                High::Fp16 => Request::Float(FloatType::F16),
                High::Int8 => int(8),
            },
            middle: int(8),
            low: int(4),
        };
        let file = match &self.importance {
            Some(path) => PolicyFile::read(path)?,
            None => measure(Statistics::Importance)?,
        };
        Dynamic::parse(file, levels)
    }

    fn budget(&self, measure: impl FnOnce(Statistics) -> Result<PolicyFile>) -> Result<Budget> {
        let target = match (self.target_ratio, self.target_bpw, self.target_size) {
            (Some(ratio), _, _) => Target::Ratio(ratio),
            (_, Some(bits), _) => Target::BitsPerWeight(bits),
            (_, _, Some(bytes)) => Target::Bytes(bytes),
            _ => {
                let why = "is needed for --policy budget, or --target-bpw, or --target-size";
                return Err(Error::Option { option: "--target-ratio", why: why.into() });
            }
        };
        target.check()?;
        let file = match &self.sensitivity {
            Some(path) => PolicyFile::read(path)?,
            None => measure(Statistics::Sensitivity)?,
        };
        Budget::new(SensitivityTable::parse(file)?, target, self.coupled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_size("2GB"), Ok(2_000_000_000));
        assert_eq!(parse_size("3MiB"), Ok(3 << 20));
        assert_eq!(parse_size("17"), Ok(17));
        for text in ["", "GB", "1.5GB", "-1", "0", "9XB", "99999999999GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
