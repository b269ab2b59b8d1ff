//! The budget policy: the encodings that cost least in a file of at most a given size.

use serde_json::{Value, json};

use super::{
    Alternative, TensorInfo,
    budget::{Candidate, smallest, solve, total_bytes, total_cost},
    components::{ComponentRules, Coupling},
    sensitivity::SensitivityTable,
};
use crate::{
    encoding::Request,
    error::{Error, Result},
};

/// How large the whole packed file may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Bytes of the weights as FP32 over those of the file.
    Ratio(f64),
    /// Bits of the file over the number of weights.
    BitsPerWeight(f64),
    Bytes(u64),
}

impl Target {
    /// Checks that it can be aimed at.
    ///
    /// # Errors
    /// [`Error::Option`] unless it is above zero.
    pub fn check(self) -> Result<()> {
        let (option, value) = match self {
            Target::Ratio(ratio) => ("--target-ratio", ratio),
            Target::BitsPerWeight(bits) => ("--target-bpw", bits),
            Target::Bytes(bytes) => ("--target-size", bytes as f64),
        };
        if !(value > 0.0 && value.is_finite()) {
            return Err(Error::Option { option, why: format!("{value} is not above zero") });
        }
        Ok(())
    }

    /// The most bytes that the file of a model with this many weights may have.
    pub fn bytes(self, parameters: u64) -> u64 {
        match self {
            Target::Ratio(ratio) => (4.0 * parameters as f64 / ratio) as u64,
            Target::BitsPerWeight(bits) => (parameters as f64 * bits / 8.0) as u64,
            Target::Bytes(bytes) => bytes,
        }
    }
}

/// A size, and the costs of what could be left out to meet it.
#[derive(Clone, Debug)]
pub struct Budget {
    sensitivity: SensitivityTable,
    target: Target,
    /// Whether tensors that compute on the same input share an encoding.
    coupled: bool,
}

/// An alternative whose exact size is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SizedAlternative {
    pub alternative: Alternative,
    pub bytes: u64,
}

/// Tensors that share an encoding: for each option the alternative of each of them.
struct Group {
    tensors: Vec<usize>,
    options: Vec<Vec<usize>>, // [options, tensors]
}

/// Rounds of fitting: each finds a better file or halves what is left to try.
const ROUNDS: usize = 16;

impl Budget {
    /// # Errors
    /// A target that is not above zero.
    pub fn new(sensitivity: SensitivityTable, target: Target, coupled: bool) -> Result<Self> {
        target.check()?;
        Ok(Self { sensitivity, target, coupled })
    }

    pub(super) fn alternatives(&self, tensors: &[TensorInfo]) -> Result<Vec<Vec<Alternative>>> {
        self.sensitivity.alternatives(tensors)
    }

    /// The record for the manifest.
    pub(super) fn record(&self) -> Value {
        let target = match self.target {
            Target::Ratio(ratio) => json!({ "ratio": ratio }),
            Target::BitsPerWeight(bits) => json!({ "bits_per_weight": bits }),
            Target::Bytes(bytes) => json!({ "bytes": bytes }),
        };
        let sensitivity = self.sensitivity.record();
        json!({ "name": "budget", "target": target, "coupled": self.coupled, "sensitivity": sensitivity })
    }

    /// Whether a tensor shares its encoding with others, as far as its name tells.
    pub(super) fn couples(&self, rules: &ComponentRules, name: &str) -> bool {
        self.coupled && rules.coupling(name).is_some()
    }

    /// The most bytes that the whole file may have.
    pub fn target_bytes(&self, tensors: &[TensorInfo]) -> u64 {
        self.target.bytes(tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum())
    }

    /// Chooses an alternative for every tensor. `file_bytes` says how large the whole file of a choice would be, which is
    /// what the target bounds.
    ///
    /// # Errors
    /// [`Error::Budget`] if even the smallest file is larger than the target; coupled tensors without a common encoding.
    pub fn choose(
        &self,
        rules: &ComponentRules,
        tensors: &[TensorInfo],
        alternatives: &[Vec<SizedAlternative>],
        file_bytes: impl Fn(&[usize]) -> u64,
    ) -> Result<Vec<usize>> {
        let groups = self.groups(rules, tensors, alternatives)?;
        let items: Vec<Vec<Candidate>> = groups
            .iter()
            .map(|group| {
                let options = group.options.iter().map(|option| {
                    let members =
                        || group.tensors.iter().zip(option).map(|(&tensor, &index)| &alternatives[tensor][index]);
                    Candidate {
                        bytes: members().map(|member| member.bytes).sum(),
                        cost: members().filter_map(|member| member.alternative.cost).sum(),
                    }
                });
                options.collect()
            })
            .collect();
        let spread = |chosen: &[usize]| {
            let mut spread = vec![0; tensors.len()];
            for (group, &option) in groups.iter().zip(chosen) {
                for (&tensor, &index) in group.tensors.iter().zip(&group.options[option]) {
                    spread[tensor] = index;
                }
            }
            spread
        };
        let chosen = fit(&items, self.target_bytes(tensors), |chosen| file_bytes(&spread(chosen)))?;
        Ok(spread(&chosen))
    }

    fn groups(
        &self,
        rules: &ComponentRules,
        tensors: &[TensorInfo],
        alternatives: &[Vec<SizedAlternative>],
    ) -> Result<Vec<Group>> {
        let mut members: Vec<(Option<Coupling>, Vec<usize>)> = Vec::new();
        for (index, tensor) in tensors.iter().enumerate() {
            // What the user decided by name is bound to nothing else.
            let free = self.coupled && alternatives[index].len() > 1;
            let coupling = if free { rules.coupling(&tensor.name) } else { None };
            match members.iter_mut().find(|(known, _)| coupling.is_some() && *known == coupling) {
                Some((_, tensors)) => tensors.push(index),
                None => members.push((coupling, vec![index])),
            }
        }
        let group = |tensors: Vec<usize>| {
            let place = |tensor: usize, request: Request| {
                alternatives[tensor].iter().position(|option| option.alternative.request == request)
            };
            let options = alternatives[tensors[0]]
                .iter()
                .filter_map(|option| tensors.iter().map(|&tensor| place(tensor, option.alternative.request)).collect());
            Group { options: options.collect(), tensors }
        };
        let groups: Vec<Group> = members.into_iter().map(|(_, tensors)| group(tensors)).collect();
        match groups.iter().find(|group| group.options.is_empty()) {
            None => Ok(groups),
            Some(group) => {
                let names: Vec<_> = group.tensors.iter().map(|&tensor| tensors[tensor].name.as_str()).collect();
                Err(self.sensitivity.error(format!("no encoding is listed for all of {}", names.join(", "))))
            }
        }
    }
}

/// Solves for the tensors' bytes such that the whole file meets the target.
///
/// What a file holds besides depends a little on the choice, and its header grows by whole pages, so the budget of the
/// tensors is narrowed down between one whose file fits and one whose file does not.
fn fit(items: &[Vec<Candidate>], target: u64, file_bytes: impl Fn(&[usize]) -> u64) -> Result<Vec<usize>> {
    let mut best = smallest(items);
    let least = total_bytes(items, &best);
    let floor = file_bytes(&best);
    if floor > target {
        return Err(Error::Budget { asked: target, floor });
    }
    let (mut fits, mut exceeds) = (least, u64::MAX);
    let mut budget = least + (target - floor);
    for _ in 0..ROUNDS {
        let chosen = solve(items, budget).expect("the smallest options fit");
        let bytes = file_bytes(&chosen);
        let held = total_bytes(items, &chosen);
        let guess = if bytes <= target {
            if total_cost(items, &chosen) < total_cost(items, &best) {
                best = chosen;
            }
            fits = budget;
            held + (target - bytes)
        } else {
            exceeds = budget;
            held.saturating_sub(bytes - target)
        };
        budget = match guess {
            guess if guess > fits && guess < exceeds => guess,
            _ if exceeds == u64::MAX => break,
            _ => fits + (exceeds - fits) / 2,
        };
        if budget <= fits {
            break;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::{PolicyFile, tests::tensor};

    #[test]
    fn targets_count_the_whole_file() {
        assert_eq!(Target::Ratio(6.0).bytes(3_000_000), 2_000_000);
        assert_eq!(Target::BitsPerWeight(4.5).bytes(1_000), 562);
        assert_eq!(Target::Bytes(7).bytes(1_000), 7);
    }

    #[test]
    fn files_meet_the_target_from_below_whatever_else_they_hold() {
        let item = |item: u64| {
            let option =
                |step: u64| Candidate { bytes: 1000 + step * (97 + item), cost: 1.0 / (1 + step + item) as f64 };
            (0..20).map(option).collect::<Vec<_>>()
        };
        let items: Vec<_> = (0..40).map(item).collect();
        // A header in pages that is larger for larger choices, or for smaller ones.
        for growing in [true, false] {
            let file_bytes = |chosen: &[usize]| {
                let steps: usize = chosen.iter().map(|&step| if growing { step } else { 19 - step }).sum();
                total_bytes(&items, chosen) + (10_000 + 7 * steps as u64).next_multiple_of(256)
            };
            let floor = file_bytes(&smallest(&items));
            assert!(
                matches!(fit(&items, floor - 1, file_bytes), Err(Error::Budget { floor: named, .. }) if named == floor)
            );
            for target in (floor..file_bytes(&[19; 40])).step_by(9001) {
                let bytes = file_bytes(&fit(&items, target, file_bytes).unwrap());
                assert!(bytes <= target && bytes as f64 >= 0.995 * target as f64, "{bytes} of {target}");
            }
        }
    }

    #[test]
    fn coupled_tensors_share_an_encoding() {
        let names = ["l.self_attn.q_proj.weight", "l.self_attn.k_proj.weight", "l.self_attn.o_proj.weight"];
        let tensors = names.map(|name| tensor(name, &[64, 64], "other"));
        let entry = |name: &str, costs: [f64; 2]| json!({ "name": name, "options": [{ "encoding": "int4", "cost": costs[0] }, { "encoding": "int8", "cost": costs[1] }] });
        let table = json!({ "version": 1, "tensors": [
            entry(names[0], [9.0, 0.0]), entry(names[1], [0.5, 0.4]), entry(names[2], [5.0, 0.0]),
        ] });
        let table = PolicyFile::new(Path::new("costs.json"), table.to_string().into()).unwrap();
        let table = SensitivityTable::parse(table).unwrap();
        let choose = |coupled: bool, target: u64| {
            let budget = Budget::new(table.clone(), Target::Bytes(target), coupled).unwrap();
            let alternatives: Vec<Vec<SizedAlternative>> = budget
                .alternatives(&tensors)
                .unwrap()
                .iter()
                .map(|options| {
                    options
                        .iter()
                        .zip([4, 8])
                        .map(|(&alternative, bytes)| SizedAlternative { alternative, bytes })
                        .collect()
                })
                .collect();
            let file_bytes = |chosen: &[usize]| chosen.iter().map(|&option| 4 + 4 * option as u64).sum();
            budget.choose(&ComponentRules::builtin(), &tensors, &alternatives, file_bytes).unwrap()
        };
        assert_eq!(choose(false, 20), [1, 0, 1]);
        assert_eq!(choose(true, 20), [1, 1, 0]);
        assert_eq!(choose(true, 16), [0, 0, 1]);
    }

    #[test]
    fn a_target_is_above_zero() {
        let table = PolicyFile::new(Path::new("x"), br#"{"version": 1, "tensors": []}"#.to_vec()).unwrap();
        let table = SensitivityTable::parse(table).unwrap();
        for target in [Target::Ratio(0.0), Target::BitsPerWeight(f64::NAN), Target::Ratio(f64::INFINITY)] {
            assert!(Budget::new(table.clone(), target, false).is_err(), "{target:?}");
        }
    }
}
