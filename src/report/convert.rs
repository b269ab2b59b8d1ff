//! What a conversion made: sizes by component and encoding, everything counted.

use std::collections::HashMap;

use serde::Serialize;

use super::table::{count, facts, table};

/// One line of the summary: tensors of one component with one encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub component: String,
    pub encoding: String,
    pub tensors: usize,
    pub parameters: u64,
    pub bytes: u64,
}

/// The sizes of a packed model and how long it took to make.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Bytes on disk, everything counted: weights, scales, header, tokenizer.
    pub file_bytes: u64,
    /// Eight times `file_bytes` over `parameters`.
    pub bits_per_weight: f64,
    /// Bytes of the same parameters as FP32 over `file_bytes`.
    pub ratio_fp32: f64,
    /// Bytes of the checkpoint's weight files over `file_bytes`.
    pub ratio_source: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Gigabytes (10^9) of checkpoint read a second.
    pub gb_per_second: f64,
    /// Logical tensors.
    pub tensors: usize,
    pub parameters: u64,
    pub source_bytes: u64,
    /// Whether nothing was written.
    pub dry_run: bool,
    pub components: Vec<Line>,
}

/// Sums up tensors `(component, encoding, parameters, bytes)`, a line for each component and encoding, the largest first.
pub fn lines(tensors: impl Iterator<Item = (String, String, u64, u64)>) -> Vec<Line> {
    let mut found: HashMap<(String, String), Line> = HashMap::new();
    for (component, encoding, parameters, bytes) in tensors {
        let line = found.entry((component, encoding)).or_insert_with_key(|(component, encoding)| Line {
            component: component.clone(),
            encoding: encoding.clone(),
            tensors: 0,
            parameters: 0,
            bytes: 0,
        });
        line.tensors += 1;
        line.parameters += parameters;
        line.bytes += bytes;
    }
    let mut lines: Vec<Line> = found.into_values().collect();
    lines.sort_by(|a, b| {
        b.bytes.cmp(&a.bytes).then_with(|| (&a.component, &a.encoding).cmp(&(&b.component, &b.encoding)))
    });
    lines
}

impl Summary {
    /// Sums up tensors `(component, encoding, parameters, bytes)`.
    pub fn new(
        tensors: impl Iterator<Item = (String, String, u64, u64)>,
        file_bytes: u64,
        source_bytes: u64,
        seconds: f64,
        dry_run: bool,
    ) -> Self {
        let components = lines(tensors);
        let parameters: u64 = components.iter().map(|line| line.parameters).sum();
        let (size, weights) = (file_bytes as f64, parameters as f64);
        Self {
            file_bytes,
            bits_per_weight: 8.0 * size / weights,
            ratio_fp32: 4.0 * weights / size,
            ratio_source: source_bytes as f64 / size,
            seconds,
            gb_per_second: source_bytes as f64 / seconds / 1e9,
            tensors: components.iter().map(|line| line.tensors).sum(),
            parameters,
            source_bytes,
            dry_run,
            components,
        }
    }

    /// The tables for people.
    pub fn render(&self) -> String {
        let mut lines = table(&["component", "encoding", "tensors", "parameters", "bytes", "bits/weight"], 2);
        let mut add = |component: &str, encoding: &str, tensors: String, parameters: u64, bytes: u64| {
            let bits =
                if parameters == 0 { String::new() } else { format!("{:.3}", 8.0 * bytes as f64 / parameters as f64) };
            let parameters = if parameters == 0 { String::new() } else { count(parameters) };
            lines.add_row([component.into(), encoding.into(), tensors, parameters, count(bytes), bits]);
        };
        for line in &self.components {
            add(&line.component, &line.encoding, line.tensors.to_string(), line.parameters, line.bytes);
        }
        let held: u64 = self.components.iter().map(|line| line.bytes).sum();
        add("header, tokenizer", "", String::new(), 0, self.file_bytes.saturating_sub(held));
        add("total", "", self.tensors.to_string(), self.parameters, self.file_bytes);
        let mut rows = vec![
            (if self.dry_run { "file bytes, predicted" } else { "file bytes" }, count(self.file_bytes)),
            ("bits per weight", format!("{:.3}", self.bits_per_weight)),
            ("ratio to FP32", format!("{:.3}", self.ratio_fp32)),
            ("ratio to the source", format!("{:.3}  ({} bytes)", self.ratio_source, count(self.source_bytes))),
        ];
        if !self.dry_run {
            // A conversion that calibrates takes its time for other things than reading.
            let rate = match self.gb_per_second {
                rate if rate >= 0.01 => format!("  ({rate:.2} GB/s)"),
                _ => String::new(),
            };
            rows.push(("time", format!("{:.2} s{rate}", self.seconds)));
        }
        format!("{}\n\n{}", lines.trim_fmt(), facts(rows).trim_fmt())
    }
}
