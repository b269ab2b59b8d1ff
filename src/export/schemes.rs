//! Which linear layer of an export is quantized how.

use std::collections::{BTreeMap, HashMap};

use super::{Refusal, integers::Integers};
use crate::{encoding::Encoding, format::PackedTensor};

/// One quantized layer.
#[derive(Clone, Debug)]
pub(super) struct Scheme {
    pub module: String,
    pub integers: Integers,
    pub rows: usize,
    pub cols: usize,
    encoding: Encoding,
}

/// Every quantized layer, in the order of the packed file.
#[derive(Debug, Default)]
pub(super) struct Schemes {
    layers: Vec<Scheme>,
    by_module: HashMap<String, usize>,
    /// Why quantized tensors are dequantized: how many for each reason, and the first.
    plain: BTreeMap<&'static str, (usize, String)>,
}

impl Schemes {
    /// Adds the layer that a tensor belongs to.
    pub fn add(&mut self, module: &str, integers: Integers, tensor: &PackedTensor) {
        let [rows, cols] = tensor.shape[..] else { unreachable!("only matrices are added") };
        self.by_module.insert(module.to_owned(), self.layers.len());
        self.layers.push(Scheme { module: module.to_owned(), integers, rows, cols, encoding: tensor.encoding });
    }

    /// Notes why a tensor is dequantized, if it is quantized at all.
    pub fn leave_plain(&mut self, tensor: &PackedTensor, why: &'static str) {
        if tensor.encoding.layout().is_some() {
            self.plain.entry(why).or_insert_with(|| (0, tensor.name.clone())).0 += 1;
        }
    }

    pub fn get(&self, module: &str) -> Option<&Integers> {
        self.by_module.get(module).map(|&index| &self.layers[index].integers)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Scheme> {
        self.layers.iter()
    }

    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// The different ways, those of the most weights first, each with the names of its layers.
    pub fn sorted(&self) -> Vec<(Integers, Vec<&str>)> {
        let mut groups: Vec<(Integers, usize, Vec<&str>)> = Vec::new();
        for Scheme { module, integers, rows, cols, .. } in &self.layers {
            let found = match groups.iter().position(|(known, ..)| known == &scheme_of(integers)) {
                Some(found) => found,
                None => {
                    groups.push((scheme_of(integers), 0, Vec::new()));
                    groups.len() - 1
                }
            };
            groups[found].1 += rows * cols;
            groups[found].2.push(module);
        }
        groups.sort_by_key(|(_, weights, _)| std::cmp::Reverse(*weights));
        groups.into_iter().map(|(integers, _, names)| (integers, names)).collect()
    }

    /// Why there is nothing to export, where no layer is quantized.
    pub fn refusal(&self, layout: &str) -> Option<Refusal> {
        let why = "no linear layer is quantized; export to safetensors, or pack with fewer bits".to_owned();
        self.layers.is_empty().then(|| Refusal { runtime: layout.into(), why })
    }

    /// What the layout made larger, with the values as they are or dequantized.
    pub fn notices(&self) -> Vec<String> {
        let bits = |encoding: &Encoding| match encoding {
            Encoding::Int { bits, .. } => Some(*bits),
            _ => None,
        };
        let wider = self.layers.iter().filter(|layer| bits(&layer.encoding) != Some(layer.integers.bits)).count();
        let split = |layer: &&Scheme| {
            let group = layer.encoding.layout().map_or(0, |(layout, _)| layout.group.min(layer.cols));
            group != layer.integers.group
        };
        let split = self.layers.iter().filter(split).count();
        let mut notices = Vec::new();
        if wider > 0 {
            notices.push(format!(
                "codes become wider in {wider} of {} layers, the same values in more bits",
                self.layers.len()
            ));
        }
        if split > 0 {
            notices.push(format!(
                "groups are split in {split} of {} layers, each part with the scale of the whole",
                self.layers.len()
            ));
        }
        notices.extend(self.plain.iter().map(|(why, (count, name))| match count {
            1 => format!("tensor {name} is dequantized: {why}"),
            _ => format!("{count} tensors are dequantized, the first {name}: {why}"),
        }));
        notices
    }
}

/// Two layers with one group a row have one scheme, however long their rows are.
pub(super) fn scheme_of(integers: &Integers) -> Integers {
    Integers { group: if integers.whole_row { 0 } else { integers.group }, ..*integers }
}
