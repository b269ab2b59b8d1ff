//! The sections about results of sweeps: figures, requirements, and a table of everything that was measured.

use maud::{Markup, html};

use super::{
    Section,
    markup::{
        Cell, Column, Table, chip, code, figure, fixed, marks, minus, numbers, percent, plain_table, prose, protocol,
        tiles, words,
    },
};
use crate::{
    error::long,
    report::{
        efficiency::{Efficiency, flops},
        efficiency_figure,
        figure::display_name,
        requirement::{Measured, Requirement},
        results::{Conditions, Configuration, Details, Quantized, Width},
        robustness::{Robustness, width_name},
        robustness_figure::{self, shown},
    },
};

/// Results of sweeps, with the figures of what can be drawn.
#[derive(Clone, Debug)]
pub struct Measurements {
    pub quantized: Vec<Quantized>,
    pub configurations: Vec<Configuration>,
    /// `None` without a result at any width.
    pub robustness: Option<Robustness>,
    /// `None` without a configuration that has a finite perplexity.
    pub efficiency: Option<Efficiency>,
    /// A sentence about each file that is left out.
    pub notes: Vec<String>,
}

impl Measurements {
    fn all(&self) -> impl Iterator<Item = (&str, bool, bool, &Details)> {
        let quantized = self.quantized.iter().map(|it| (it.model.as_str(), it.looks_ahead, it.simulated, &it.details));
        quantized
            .chain(self.configurations.iter().map(|it| (it.model.as_str(), it.looks_ahead, it.simulated, &it.details)))
    }

    pub(super) fn simulated(&self) -> bool {
        self.all().any(|(_, _, simulated, _)| simulated)
    }

    pub(super) fn looks_ahead(&self) -> bool {
        self.all().any(|(_, ahead, ..)| ahead)
    }

    fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = self.all().map(|(model, ..)| model).collect();
        models.sort_unstable();
        models.dedup();
        models
    }

    fn requirements(&self) -> Vec<Requirement> {
        let widths = self.robustness.iter().flat_map(Robustness::requirements);
        widths.chain(self.efficiency.iter().flat_map(Efficiency::requirements)).collect()
    }

    /// The line under the title of a page without a packed model.
    pub(super) fn lede(&self) -> String {
        let names: Vec<String> = self.models().into_iter().take(8).map(display_name).collect();
        format!("Results of sweeps: {}", names.join(", "))
    }

    pub(super) fn tiles(&self) -> Markup {
        let requirements = self.requirements();
        let passed = requirements.iter().filter(|requirement| requirement.status() == "PASS").count();
        let missing = requirements.iter().filter(|requirement| requirement.status() == "MISSING").count();
        let widths = self.robustness.as_ref().map_or(0, |it| it.widths.len());
        let remark = match missing {
            0 => "of what the documents claim".to_owned(),
            missing => format!("of what the documents claim; {missing} not measured"),
        };
        tiles(&[
            ("Models", self.models().len().to_string(), String::new()),
            ("Results at a width", self.quantized.len().to_string(), format!("{widths} widths")),
            ("Amounts of compute", self.configurations.len().to_string(), String::new()),
            ("Requirements met", format!("{passed} of {}", requirements.len()), remark),
        ])
    }

    pub(super) fn sections(&self) -> Vec<Section> {
        let mut sections = Vec::new();
        if let Some(data) = &self.robustness {
            sections.push(Section { id: "robustness", heading: "Perplexity by width", content: robustness(data) });
        }
        if let Some(data) = &self.efficiency {
            sections.push(Section { id: "efficiency", heading: "Perplexity by compute", content: efficiency(data) });
        }
        let requirements = self.requirements();
        if !requirements.is_empty() {
            let content = requirement_table(&requirements);
            sections.push(Section { id: "requirements", heading: "Requirements", content });
        }
        sections.push(Section { id: "results", heading: "All results", content: self.tables() });
        sections
    }

    fn tables(&self) -> Markup {
        let mut protocols: Vec<&Conditions> = Vec::new();
        for (.., details) in self.all() {
            if !protocols.contains(&&details.conditions) {
                protocols.push(&details.conditions);
            }
        }
        let number = |conditions: &Conditions| 1 + protocols.iter().position(|it| *it == conditions).unwrap_or(0);
        html! {
            @if !self.quantized.is_empty() { (self.width_table(number)) }
            @if !self.configurations.is_empty() { (self.compute_table(number)) }
            h3 { "Protocols" }
            ol.protocols { @for conditions in &protocols { li { (protocol(conditions)) "." } } }
            @if !self.notes.is_empty() {
                h3 { "Notes" }
                ul.notes { @for note in &self.notes { li { (long(note)) } } }
            }
        }
    }

    fn width_table(&self, protocol: impl Fn(&Conditions) -> usize) -> Markup {
        let mut results: Vec<&Quantized> = self.quantized.iter().collect();
        results.sort_by(|a, b| a.model.cmp(&b.model).then(b.width.bits.total_cmp(&a.width.bits)));
        let rows = results.into_iter().map(|result| {
            let details = &result.details;
            vec![
                Cell::new(long(&result.model).to_string()),
                Cell::number(Some(result.width.bits), |_| width_name(result.width)),
                Cell::new(details.encoding.as_deref().map_or_else(|| html! {}, fixed)),
                perplexity(result.perplexity, details).with(marks(result.looks_ahead, result.simulated)),
                Cell::number(details.increase_percent, |value| percent(value, 3)),
                Cell::number(details.kld_mean, |value| format!("{value:.6}")),
                Cell::number(details.top1_agreement, |value| format!("{:.2} %", 100.0 * value)),
                Cell::count(details.file_bytes),
                Cell::number(details.bits_per_weight, |value| format!("{value:.3}")),
                Cell::number(details.ratio_fp32, |value| format!("{value:.2}×")),
                Cell::number(Some(protocol(&details.conditions) as f64), |number| number.to_string()),
                Cell::hash(details.source_hash.as_deref()),
                Cell::hash(details.packed_hash.as_deref()),
                Cell::new(code(file_name(&details.file))),
            ]
        });
        let table = Table {
            id: "width-table",
            caption: "Models at widths",
            columns: &[
                words("model"),
                numbers("width"),
                words("encoding"),
                numbers("perplexity"),
                numbers("increase"),
                numbers("mean KLD"),
                numbers("same top token"),
                numbers("bytes"),
                numbers("bits/weight"),
                numbers("ratio to FP32"),
                numbers("protocol"),
                words("source"),
                words("packed"),
                words("file"),
            ],
            rows: rows.collect(),
            sorted: true,
            filter: Some("results"),
        };
        html! { (table) }
    }

    fn compute_table(&self, protocol: impl Fn(&Conditions) -> usize) -> Markup {
        let mut results: Vec<&Configuration> = self.configurations.iter().collect();
        results.sort_by(|a, b| a.model.cmp(&b.model).then(b.flops.total_cmp(&a.flops)));
        let rows = results.into_iter().map(|result| {
            let details = &result.details;
            vec![
                Cell::new(code(&result.id)),
                Cell::new(long(&result.model).to_string()),
                perplexity(result.perplexity, details).with(marks(result.looks_ahead, result.simulated)),
                Cell::number(Some(result.flops), flops),
                Cell::number(result.compute_factor, |value| format!("{value:.3}")),
                Cell::number(details.layers.map(|(run, _)| run as f64), |_| {
                    details.layers.map_or_else(String::new, |(run, all)| format!("{run} of {all}"))
                }),
                Cell::count(details.experts_per_token),
                Cell::count(details.attention_window),
                Cell::count(details.weight_bytes_per_token),
                Cell::number(Some(protocol(&details.conditions) as f64), |number| number.to_string()),
                Cell::hash(details.source_hash.as_deref()),
                Cell::hash(details.packed_hash.as_deref()),
                Cell::new(code(file_name(&details.file))),
            ]
        });
        let table = Table {
            id: "compute-table",
            caption: "Models with amounts of compute",
            columns: &[
                words("configuration"),
                words("model"),
                numbers("perplexity"),
                numbers("compute a token"),
                numbers("factor"),
                numbers("layers"),
                numbers("experts"),
                numbers("window"),
                numbers("weight bytes a token"),
                numbers("protocol"),
                words("source"),
                words("packed"),
                words("file"),
            ],
            rows: rows.collect(),
            sorted: false,
            filter: Some("configurations"),
        };
        html! { (table) }
    }
}

/// The last part of a path: where the results lay says nothing about them.
fn file_name(path: &str) -> &str {
    path.rsplit(['/', std::path::MAIN_SEPARATOR]).next().unwrap_or(path)
}

fn perplexity(value: Option<f64>, details: &Details) -> Cell {
    match (value, &details.failure) {
        (None, Some(failure)) => Cell::number(None, |_| String::new()).with(html! { small { (long(failure)) } }),
        (None, None) => Cell::number(None, |_| String::new()).with(html! { small { "not finite" } }),
        (value, _) => Cell::number(value, |value| format!("{value:.4}")),
    }
}

fn robustness(data: &Robustness) -> Markup {
    let picture = robustness_figure::draw(data, "Quantization robustness");
    html! {
        (figure(&picture, &caption("Perplexity against the precision of the weights", data.simulated)))
        (pivot(data))
        (notes(&data.notes()))
    }
}

/// Models down, widths across: perplexity, and its increase over FP32.
fn pivot(data: &Robustness) -> Markup {
    let names: Vec<String> = data.widths.iter().map(|&width| width_name(width)).collect();
    let columns: Vec<Column> = std::iter::once(words("model")).chain(names.iter().map(|name| numbers(name))).collect();
    let cell = |model: &str, &width: &Width| {
        let Some(point) = data.point(model, width) else { return html! { span.none { "–" } } };
        html! {
            @match point.perplexity {
                Some(ppl) => (shown(ppl)),
                None => "not finite",
            }
            @if let Some(increase) = data.degradation(Some(model), width).finite().filter(|_| width.bits < 32.0) {
                small { (percent(increase, 2)) }
            }
        }
    };
    let rows: Vec<Vec<Markup>> = data
        .models
        .iter()
        .map(|model| {
            let name = html! { (fixed(&display_name(model))) (marks(data.looks_ahead(model), data.simulated)) };
            std::iter::once(name).chain(data.widths.iter().map(|width| cell(model, width))).collect()
        })
        .collect();
    plain_table("Perplexity at each width, and its increase over FP32", &columns, &rows)
}

fn efficiency(data: &Efficiency) -> Markup {
    let picture = efficiency_figure::draw(data, "Efficiency: perplexity against compute");
    html! {
        (figure(&picture, &caption("Perplexity against floating-point operations a token", data.simulated)))
        (notes(data.notes()))
    }
}

fn caption(text: &str, simulated: bool) -> String {
    if simulated { format!("SIMULATED: {text}") } else { text.to_owned() }
}

fn notes(notes: &[String]) -> Markup {
    html! { @if !notes.is_empty() { ul.notes { @for note in notes { li { (long(note)) } } } } }
}

fn requirement_table(requirements: &[Requirement]) -> Markup {
    let value = |requirement: &Requirement| match requirement.value {
        Measured::Finite(value) => minus(&format!("{value:.2}")),
        Measured::NotFinite => "none".to_owned(),
        Measured::Missing => "–".to_owned(),
    };
    let rows: Vec<Vec<Markup>> = requirements
        .iter()
        .map(|requirement| {
            vec![
                html! { (chip(requirement.status())) },
                html! { (value(requirement)) },
                html! { (requirement.side.sign().replace(">=", "≥")) " " (requirement.threshold) },
                prose(requirement.description),
                code(requirement.id),
            ]
        })
        .collect();
    let columns = [words("status"), numbers("measured"), numbers("required"), words("what"), words("requirement")];
    html! {
        p.statement {
            "What the documents that bkpack was asked for claim of ResNet-BK and Mamba, on these results. "
            "MISSING: nothing measured it."
        }
        (plain_table("Requirements by their ids", &columns, &rows))
    }
}
