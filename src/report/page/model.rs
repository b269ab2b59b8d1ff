//! The sections about a packed model: what it is, how large, why so, each tensor, and where everything comes from.

use std::collections::HashMap;

use maud::{Markup, html};
use serde_json::Value;

use super::{
    Section,
    markup::{
        Cell, Table, code, facts, figure, finite, fixed, hash, json, numbers, percent, plain_table, prose, tiles, words,
    },
};
use crate::{
    error::{long, short},
    report::{
        convert::{Line, lines},
        evaluation::Evaluation,
        table::count,
        tensors::{self, Stored, color, size, split},
    },
};

/// A packed model, as its file describes it.
#[derive(Clone, Debug)]
pub struct Model {
    /// The name of the file.
    pub file: String,
    pub architecture: Option<String>,
    pub config: Option<Value>,
    /// Whether the weights are random, so that only sizes mean something.
    pub random_weights: bool,
    pub format_version: u64,
    pub producer: String,
    /// Everything on disk.
    pub file_bytes: u64,
    pub parameters: u64,
    /// What kind of checkpoint it was packed from.
    pub source_kind: String,
    pub source_files: Vec<HashedFile>,
    /// Each file of the packed model with its bytes and its seal: the BLAKE3 of its header, which holds all other hashes.
    pub sealed_files: Vec<HashedFile>,
    /// The files that travel inside.
    pub files: Vec<HashedFile>,
    pub policy: Value,
    /// What the policy does.
    pub policy_sentence: String,
    pub activations: Vec<Activations>,
    pub tensors: Vec<Tensor>,
}

/// A file, or what stands for one.
#[derive(Clone, Debug)]
pub struct HashedFile {
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

/// One logical tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub stored: Stored,
    pub shape: Vec<usize>,
    pub component: String,
    pub parameters: u64,
    /// Why it has this encoding, in a few words.
    pub reason: String,
    /// The name and BLAKE3 of each part.
    pub parts: Vec<(String, String)>,
}

/// How the activations of a component are quantized.
#[derive(Clone, Debug)]
pub struct Activations {
    pub component: String,
    pub bits: u32,
    pub group_size: u64,
    pub positions: u64,
    /// Windows of the calibration text.
    pub samples: u64,
    /// Name and BLAKE3.
    pub text: (String, String),
}

/// Fields of a config that say how large a model is, as the checkpoints of several architectures name them.
const DIMENSIONS: [&str; 25] = [
    "vocab_size",
    "hidden_size",
    "d_model",
    "num_hidden_layers",
    "n_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "n_seq",
    "sliding_window",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "top_k",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "expand",
    "causal",
    "tie_word_embeddings",
    "hidden_act",
    "dtype",
    "torch_dtype",
];

/// Kinds of tensors that are shown at most.
const MOST_KINDS: usize = 100;

impl Model {
    /// The line under the title.
    pub(super) fn lede(&self) -> String {
        let architecture = self.architecture.as_deref().map_or("A model".to_owned(), |name| short(name).to_string());
        format!(
            "{architecture}: {} parameters in {} tensors, packed from {} ({})",
            count(self.parameters),
            count(self.tensors.len() as u64),
            self.source_files.first().map_or("a checkpoint".into(), |file| short(&file.name).to_string()),
            short(&self.source_kind),
        )
    }

    fn bits_per_weight(&self) -> f64 {
        8.0 * self.file_bytes as f64 / self.parameters as f64
    }

    /// The numbers at the top, the first evaluation's among them.
    pub(super) fn tiles(&self, evaluations: &[Evaluation]) -> Markup {
        let ratio = 4.0 * self.parameters as f64 / self.file_bytes as f64;
        let mut found = vec![
            ("On disk", size(self.file_bytes), format!("{} bytes, everything counted", count(self.file_bytes))),
            ("Ratio to FP32", format!("{ratio:.2}×"), format!("{} of weights alone", size(4 * self.parameters))),
            ("Bits per weight", format!("{:.3}", self.bits_per_weight()), "of the whole file".to_owned()),
        ];
        if let Some(evaluation) = evaluations.first() {
            let ahead = if evaluation.looks_ahead { "LOOKS AHEAD; " } else { "" };
            let baseline = evaluation.baseline.as_ref();
            let remark = baseline.map_or("no baseline".to_owned(), |it| {
                let increase = finite(it.ppl_increase_percent, |value| percent(value, 2));
                format!("{increase} over {} of the baseline", finite(it.baseline_ppl, |value| format!("{value:.2}")))
            });
            found.push((
                "Perplexity",
                finite(evaluation.perplexity, |value| format!("{value:.2}")),
                format!("{ahead}{remark}"),
            ));
            if let Some(baseline) = baseline {
                let agreement = 100.0 * baseline.top1_agreement;
                let remark = format!("{ahead}same top token at {agreement:.1} % of positions");
                found.push(("Mean KL divergence", format!("{:.4}", baseline.kld_mean), remark));
            }
        }
        tiles(&found)
    }

    pub(super) fn overview(&self) -> Vec<Section> {
        vec![
            Section { id: "model", heading: "The model", content: self.description() },
            Section { id: "size", heading: "Size", content: self.sizes() },
            Section { id: "policy", heading: "Why these encodings", content: self.policy() },
        ]
    }

    pub(super) fn tensors_and_provenance(&self) -> Vec<Section> {
        vec![
            Section { id: "tensors", heading: "Tensors", content: self.tensors() },
            Section { id: "provenance", heading: "Provenance", content: self.provenance() },
        ]
    }

    fn description(&self) -> Markup {
        let field = |name: &&'static str| {
            let value = self.config.as_ref()?.get(*name)?;
            let shown = match value {
                Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), count),
                Value::String(text) => short(text).to_string(),
                Value::Bool(flag) => flag.to_string(),
                _ => return None,
            };
            Some((*name, html! { (shown) }))
        };
        let dimensions: Vec<(&str, Markup)> = DIMENSIONS.iter().filter_map(field).collect();
        let kinds = self.kinds();
        let left_out = kinds.len().saturating_sub(MOST_KINDS);
        let rows = kinds.into_iter().take(MOST_KINDS).map(|(kind, shape, tensors, parameters)| {
            vec![
                code(&kind),
                html! { (shown_shape(&shape)) },
                html! { (count(tensors)) },
                html! { (count(parameters)) },
                html! { (format!("{:.2} %", 100.0 * parameters as f64 / self.parameters as f64)) },
            ]
        });
        html! {
            @if dimensions.is_empty() { p { "The file holds no config.json with its dimensions." } }
            @else { (facts(&dimensions)) }
            (plain_table(
                "Tensors by kind, those of all layers together",
                &[words("kind"), numbers("shape"), numbers("tensors"), numbers("parameters"), numbers("share")],
                &rows.collect::<Vec<_>>(),
            ))
            @if left_out > 0 { p { (count(left_out as u64)) " more kinds are in the table of tensors below." } }
            @if let Some(config) = &self.config { (json("config.json", config)) }
        }
    }

    /// Kinds of tensors with their shape, how many there are, and their parameters, in the order of the file.
    fn kinds(&self) -> Vec<(String, Vec<usize>, u64, u64)> {
        let mut kinds: Vec<(String, Vec<usize>, u64, u64)> = Vec::new();
        let mut places = HashMap::new();
        for tensor in &self.tensors {
            let name = &tensor.stored.name;
            let kind = split(name).map_or_else(|| name.clone(), |(stack, _, kind)| format!("{stack}.*.{kind}"));
            let place = *places.entry((kind.clone(), &tensor.shape)).or_insert_with(|| {
                kinds.push((kind, tensor.shape.clone(), 0, 0));
                kinds.len() - 1
            });
            kinds[place].2 += 1;
            kinds[place].3 += tensor.parameters;
        }
        kinds
    }

    fn sizes(&self) -> Markup {
        let lines = lines(self.tensors.iter().map(|tensor| {
            (tensor.component.clone(), tensor.stored.encoding.clone(), tensor.parameters, tensor.stored.bytes)
        }));
        let bits: HashMap<&str, f64> =
            self.tensors.iter().map(|tensor| (tensor.stored.encoding.as_str(), tensor.stored.bits)).collect();
        let color = |line: &Line| color(bits.get(line.encoding.as_str()).copied().unwrap_or(32.0));
        let held: u64 = lines.iter().map(|line| line.bytes).sum();
        let rest = self.file_bytes.saturating_sub(held);
        let share = |bytes: u64| 100.0 * bytes as f64 / self.file_bytes as f64;
        let row = |name: Markup, encoding: &str, tensors: Option<u64>, parameters: Option<u64>, bytes: u64| {
            let ratio = |of: &dyn Fn(f64) -> String| match parameters {
                Some(parameters) if bytes > 0 => of(parameters as f64 / bytes as f64),
                _ => String::new(),
            };
            vec![
                name,
                fixed(encoding),
                html! { @if let Some(tensors) = tensors { (count(tensors)) } },
                html! { @if let Some(parameters) = parameters { (count(parameters)) } },
                html! { (count(bytes)) },
                html! { (format!("{:.2} %", share(bytes))) },
                html! { (ratio(&|weights| format!("{:.3}", 8.0 / weights))) },
                html! { (ratio(&|weights| format!("{:.2}×", 4.0 * weights))) },
            ]
        };
        let mut rows: Vec<Vec<Markup>> = lines
            .iter()
            .map(|line| {
                let name = html! {
                    span.fixed {
                        span.swatch aria-hidden="true" style={ "background:" (color(line)) } {}
                        (short(&line.component))
                    }
                };
                row(name, &line.encoding, Some(line.tensors as u64), Some(line.parameters), line.bytes)
            })
            .collect();
        let rest_name = html! { span.fixed { span.swatch.rest aria-hidden="true" {} "header, tokenizer" } };
        rows.push(row(rest_name, "", None, None, rest));
        let total = html! { span.swatch.none aria-hidden="true" {} "total" };
        rows.push(row(total, "", Some(self.tensors.len() as u64), Some(self.parameters), self.file_bytes));
        let columns = [
            words("component"),
            words("encoding"),
            numbers("tensors"),
            numbers("parameters"),
            numbers("bytes"),
            numbers("share"),
            numbers("bits/weight"),
            numbers("ratio to FP32"),
        ];
        let source: u64 = self.source_files.iter().map(|file| file.bytes).sum();
        html! {
            div.bar role="img" aria-label="Bytes of the file by component and encoding, as in the table below" {
                @for line in &lines { span style={ "width:" (share(line.bytes)) "%;background:" (color(line)) } {} }
                span.rest style={ "width:" (share(rest)) "%" } {}
            }
            (plain_table("Bytes by component and encoding", &columns, &rows))
            @if source > 0 {
                p {
                    "The checkpoint's files of weights have " (count(source)) " bytes, "
                    (format!("{:.2}", source as f64 / self.file_bytes as f64)) " times as many."
                }
            }
        }
    }

    fn policy(&self) -> Markup {
        let (mut reasons, mut places): (Vec<(&str, &str, u64, u64)>, _) = (Vec::new(), HashMap::new());
        for tensor in &self.tensors {
            let (reason, encoding) = (tensor.reason.as_str(), tensor.stored.encoding.as_str());
            let place = *places.entry((reason, encoding)).or_insert_with(|| {
                reasons.push((reason, encoding, 0, 0));
                reasons.len() - 1
            });
            reasons[place].2 += 1;
            reasons[place].3 += tensor.stored.bytes;
        }
        let few = reasons.len() <= 20;
        let rows: Vec<Vec<Markup>> = reasons
            .into_iter()
            .map(|(reason, encoding, tensors, bytes)| {
                vec![prose(reason), fixed(encoding), html! { (count(tensors)) }, html! { (count(bytes)) }]
            })
            .collect();
        let columns = [words("reason"), words("encoding"), numbers("tensors"), numbers("bytes")];
        html! {
            p.statement { (long(&self.policy_sentence)) }
            @if few { (plain_table("Tensors by reason", &columns, &rows)) }
            @else { p { "What decided about each tensor is in the " a href="#tensors" { "table of tensors" } "." } }
            (json("The policy as the file records it", &self.policy))
        }
    }

    fn tensors(&self) -> Markup {
        let stored: Vec<Stored> = self.tensors.iter().map(|tensor| tensor.stored.clone()).collect();
        let subtitle = tensors::subtitle(&self.file, self.parameters, self.file_bytes);
        let picture = tensors::draw("Encodings and bytes of the tensors", &subtitle, &stored);
        let rows = self.tensors.iter().map(|tensor| {
            let Tensor { stored, shape, component, parameters, reason, .. } = tensor;
            let bits = 8.0 * stored.bytes as f64 / *parameters as f64;
            vec![
                Cell::new(code(&stored.name)),
                Cell::number(Some(*parameters as f64), |_| shown_shape(shape)),
                Cell::new(fixed(component)),
                Cell::new(fixed(&stored.encoding)),
                Cell::count(Some(stored.bytes)),
                Cell::number(Some(bits), |bits| format!("{bits:.3}")),
                Cell::new(prose(reason)),
            ]
        });
        let table = Table {
            id: "tensor-table",
            caption: "Every tensor: what it is stored as, what it takes, and why",
            columns: &[
                words("tensor"),
                numbers("shape"),
                words("component"),
                words("encoding"),
                numbers("bytes"),
                numbers("bits/weight"),
                words("reason"),
            ],
            rows: rows.collect(),
            sorted: true,
            filter: Some("tensors"),
        };
        html! {
            (figure(&picture, "Encoding and bytes of each tensor: layers down, kinds of tensors across"))
            (table)
        }
    }

    fn provenance(&self) -> Markup {
        let hashed = |caption: &str, files: &[HashedFile], name: &'static str| {
            let rows: Vec<Vec<Markup>> = files
                .iter()
                .map(|file| vec![code(&file.name), html! { (count(file.bytes)) }, hash(&file.blake3)])
                .collect();
            plain_table(caption, &[words("file"), numbers("bytes"), words(name)], &rows)
        };
        let parts: Vec<Vec<Cell>> = self
            .tensors
            .iter()
            .flat_map(|tensor| &tensor.parts)
            .map(|(name, blake3)| vec![Cell::new(code(name)), Cell::new(hash(blake3))])
            .collect();
        let summary = format!("The BLAKE3 of each of the {} parts", count(parts.len() as u64));
        let table = Table {
            id: "part-table",
            caption: "Parts of the tensors and the BLAKE3 of their bytes",
            columns: &[words("part"), words("BLAKE3")],
            rows: parts,
            sorted: false,
            filter: Some("parts"),
        };
        html! {
            p.statement {
                "Every byte of the packed model was read, and its hashes were checked, when this page was made; those of the "
                "source are as the model records them. A seal is the BLAKE3 of a header, which holds the hashes of all parts: "
                "whoever knows it can tell that nothing was changed."
            }
            (facts(&[
                ("written by", html! { (short(&self.producer)) }),
                ("format", html! { "version " (self.format_version) }),
                ("packed from", html! { (short(&self.source_kind)) }),
            ]))
            (hashed("The packed model", &self.sealed_files, "seal"))
            (hashed("Packed from", &self.source_files, "BLAKE3"))
            @if !self.files.is_empty() { (hashed("Files inside", &self.files, "BLAKE3")) }
            @if !self.activations.is_empty() { (self.activation_table()) }
            details { summary { (summary) } (table) }
        }
    }

    fn activation_table(&self) -> Markup {
        let rows: Vec<Vec<Markup>> = self
            .activations
            .iter()
            .map(|record| {
                let (text, blake3) = &record.text;
                vec![
                    html! { (short(&record.component)) },
                    html! { "INT" (record.bits) },
                    html! { (count(record.group_size)) },
                    html! { (count(record.positions)) },
                    html! { (count(record.samples)) },
                    html! { (code(text)) " " (hash(blake3)) },
                ]
            })
            .collect();
        let columns = [
            words("component"),
            words("width"),
            numbers("positions a scale"),
            numbers("positions"),
            numbers("windows"),
            words("calibrated on"),
        ];
        plain_table("Quantized activations", &columns, &rows)
    }
}

/// `[256, 704]` as `256 × 704`.
fn shown_shape(shape: &[usize]) -> String {
    let sides: Vec<String> = shape.iter().map(|&side| count(side as u64)).collect();
    if sides.is_empty() { "scalar".into() } else { sides.join(" × ") }
}
