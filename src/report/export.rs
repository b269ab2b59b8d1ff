//! What an export makes of the tensors of a packed model, in lines of like ones.

use serde::Serialize;

use super::table::{count, table};

/// Tensors that fare alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// How the packed file holds them.
    pub encoding: String,
    /// How the export holds them.
    pub target: String,
    pub tensors: usize,
    /// Bytes of their data in the export.
    pub bytes: u64,
    /// Why their values are rounded; `None` if they are the same, bit for bit.
    pub rounded: Option<String>,
}

/// Sums up tensors, the largest sums first.
pub fn lines(tensors: impl Iterator<Item = Line>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for tensor in tensors {
        let like = |line: &&mut Line| {
            (&line.encoding, &line.target, &line.rounded) == (&tensor.encoding, &tensor.target, &tensor.rounded)
        };
        match lines.iter_mut().find(like) {
            Some(line) => {
                line.tensors += tensor.tensors;
                line.bytes += tensor.bytes;
            }
            None => lines.push(tensor),
        }
    }
    lines.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| (&a.encoding, &a.target).cmp(&(&b.encoding, &b.target))));
    lines
}

/// The table for people; `file_bytes` counts headers and files too.
pub fn render(lines: &[Line], file_bytes: u64) -> String {
    let mut rows = table(&["packed", "exported", "values", "tensors", "bytes"], 3);
    for line in lines {
        let values = match &line.rounded {
            None => "the same".to_owned(),
            Some(why) => format!("rounded: {why}"),
        };
        rows.add_row([line.encoding.clone(), line.target.clone(), values, line.tensors.to_string(), count(line.bytes)]);
    }
    let (tensors, held) =
        lines.iter().fold((0, 0), |(tensors, held), line| (tensors + line.tensors, held + line.bytes));
    let others = file_bytes.saturating_sub(held);
    rows.add_row(["headers, files".into(), String::new(), String::new(), String::new(), count(others)]);
    rows.add_row(["total".into(), String::new(), String::new(), tensors.to_string(), count(file_bytes)]);
    rows.trim_fmt()
}
