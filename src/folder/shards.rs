//! The files of weights of a folder, planned to the byte.

use std::ops::Range;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{SINGLE, to_json};

/// A tensor of a safetensors file that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl StoredTensor {
    /// Bytes of one value.
    pub fn element_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element_bytes()
    }
}

/// Every file of weights, and their index where there are several.
#[derive(Clone, Debug)]
pub(crate) struct Shards {
    pub files: Vec<Shard>,
    pub index: Option<Vec<u8>>,
}

/// One file of weights.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub name: String,
    /// The file up to its data.
    pub header: Vec<u8>,
    /// Which groups of tensors it holds.
    pub groups: Range<usize>,
    /// Where the data of each tensor of each of these groups begins in the file.
    pub offsets: Vec<Vec<u64>>,
    /// Bytes of the whole file.
    pub bytes: u64,
}

impl Shards {
    /// Fills file after file with groups of tensors, each file up to `shard_bytes` of data (more where one group alone
    /// is larger). Each carries the same `metadata`.
    ///
    /// In a file, tensors lie by falling element size, so that each is aligned; those of one size in the groups' order.
    pub fn plan(groups: &[Vec<StoredTensor>], shard_bytes: u64, metadata: &[(&str, &str)]) -> Self {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let (mut start, mut filled) = (0, 0);
        for (index, group) in groups.iter().enumerate() {
            let bytes: u64 = group.iter().map(|tensor| tensor.bytes() as u64).sum();
            if index > start && filled + bytes > shard_bytes {
                ranges.push(start..index);
                (start, filled) = (index, 0);
            }
            filled += bytes;
        }
        ranges.push(start..groups.len());
        let count = ranges.len();
        let name = |index: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let plan = |(index, range)| Shard::plan(name(index), groups, range, metadata);
        let files: Vec<Shard> = ranges.into_iter().enumerate().map(plan).collect();
        let index = (count > 1).then(|| render_index(&files, groups));
        Self { files, index }
    }

    /// Bytes of all files, the index included.
    pub fn file_bytes(&self) -> u64 {
        let index = self.index.as_ref().map_or(0, Vec::len) as u64;
        self.files.iter().map(|file| file.bytes).sum::<u64>() + index
    }
}

impl Shard {
    fn plan(name: String, groups: &[Vec<StoredTensor>], range: Range<usize>, metadata: &[(&str, &str)]) -> Self {
        let mut order: Vec<(usize, usize, &StoredTensor)> = Vec::new();
        for (group, tensors) in groups[range.clone()].iter().enumerate() {
            order.extend(tensors.iter().enumerate().map(|(index, tensor)| (group, index, tensor)));
        }
        order.sort_by_key(|(_, _, tensor)| std::cmp::Reverse(tensor.element_bytes()));
        let mut entries = Map::new();
        let metadata: Map<String, Value> = metadata.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        entries.insert("__metadata__".into(), metadata.into());
        let mut offsets: Vec<Vec<u64>> = groups[range.clone()].iter().map(|tensors| vec![0; tensors.len()]).collect();
        let mut end = 0;
        for (group, index, tensor) in order {
            let begin = end;
            end += tensor.bytes();
            offsets[group][index] = begin as u64;
            let entry =
                json!({ "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [begin, end] });
            entries.insert(tensor.name.clone(), entry);
        }
        let mut header = vec![0; 8];
        serde_json::to_writer(&mut header, &entries).expect("writing to memory");
        header.resize(header.len().next_multiple_of(8), b' ');
        let length = (header.len() - 8) as u64;
        header[..8].copy_from_slice(&length.to_le_bytes());
        let data_start = header.len() as u64;
        offsets.iter_mut().flatten().for_each(|offset| *offset += data_start);
        Self { name, groups: range, offsets, bytes: data_start + end as u64, header }
    }
}

fn render_index(files: &[Shard], groups: &[Vec<StoredTensor>]) -> Vec<u8> {
    let (mut weight_map, mut total_size) = (Map::new(), 0);
    for file in files {
        for tensor in groups[file.groups.clone()].iter().flatten() {
            total_size += tensor.bytes();
            weight_map.insert(tensor.name.clone(), Value::String(file.name.clone()));
        }
    }
    to_json(&json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_any_type_are_aligned_and_leave_no_hole() {
        let tensor =
            |name: &str, dtype, shape: &[usize]| StoredTensor { name: name.into(), dtype, shape: shape.into() };
        let groups = [
            vec![tensor("a.packed", Dtype::I32, &[3, 5]), tensor("a.scale", Dtype::F16, &[3, 1])],
            vec![tensor("b.scale", Dtype::F16, &[1, 1]), tensor("b.shape", Dtype::I64, &[2])],
        ];
        let one = Shards::plan(&groups, u64::MAX, &[("format", "pt")]);
        assert!(one.index.is_none());
        let file = &one.files[0];
        assert_eq!((file.name.as_str(), file.header.len() % 8), (SINGLE, 0));
        let mut taken = Vec::new();
        for (tensor, offset) in groups.iter().flatten().zip(file.offsets.iter().flatten()) {
            assert_eq!(offset % tensor.element_bytes() as u64, 0, "{}", tensor.name);
            taken.push((*offset, offset + tensor.bytes() as u64));
        }
        taken.sort_unstable();
        assert_eq!(taken[0].0, file.header.len() as u64);
        assert!(taken.windows(2).all(|pair| pair[0].1 == pair[1].0));
        assert_eq!(taken.last().unwrap().1, file.bytes);

        let two = Shards::plan(&groups, 60, &[("format", "pt")]);
        assert_eq!(two.files.iter().map(|file| file.groups.clone()).collect::<Vec<_>>(), [0..1, 1..2]);
        let index: Value = serde_json::from_slice(two.index.as_ref().unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 84);
        assert_eq!(index["weight_map"]["b.shape"], "model-00002-of-00002.safetensors");
    }
}
