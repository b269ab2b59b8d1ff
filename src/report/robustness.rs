//! Perplexity against bit width: the statistics, and what the documents claim of them. `robustness_figure` draws it.

use serde_json::{Value, json};

use super::{
    figure::{display_name, is_mamba, is_resnet_bk},
    requirement::{Measured, Requirement, Side},
    results::{Quantized, Width, protocol_notes},
};

/// Below this perplexity the documents call a model deployable.
pub const DEPLOYABLE_PPL: f64 = 100.0;

/// Results of several models at several widths, in order.
#[derive(Clone, Debug)]
pub struct Robustness {
    /// The series, ResNet-BK and Mamba first unless the user names an order.
    pub models: Vec<String>,
    /// The widths, the widest first.
    pub widths: Vec<Width>,
    /// Below this perplexity a model is deployable.
    pub threshold: f64,
    pub simulated: bool,
    points: Vec<Quantized>,
}

impl Robustness {
    /// Orders `points`; `models`, where it names any, chooses and orders the series, and `widths` chooses the widths.
    ///
    /// # Errors
    /// A sentence that names a model or the widths that no point has.
    pub fn new(mut points: Vec<Quantized>, models: &[String], widths: &[f64], threshold: f64) -> Result<Self, String> {
        let models = choose(points.iter().map(|point| point.model.as_str()), models)?;
        points
            .retain(|point| models.contains(&point.model) && (widths.is_empty() || widths.contains(&point.width.bits)));
        if points.is_empty() {
            return Err("none of these models was measured at any of these widths".into());
        }
        let mut found: Vec<Width> = points.iter().map(|point| point.width).collect();
        found.sort_by(|a, b| b.bits.total_cmp(&a.bits).then(a.bf16.cmp(&b.bf16)));
        found.dedup();
        let simulated = points.iter().any(|point| point.simulated);
        Ok(Self { models, widths: found, threshold, simulated, points })
    }

    /// What was measured of a model at a width.
    pub fn point(&self, model: &str, width: Width) -> Option<&Quantized> {
        self.points.iter().find(|point| point.model == model && point.width == width)
    }

    /// Whether the perplexities of a model are those of no language model.
    pub fn looks_ahead(&self, model: &str) -> bool {
        self.points.iter().any(|point| point.model == model && point.looks_ahead)
    }

    /// A sentence about each model and width that is missing or is not finite, and about results that do not compare.
    pub fn notes(&self) -> Vec<String> {
        let protocols = self.points.iter().map(|point| (point.model.as_str(), point.protocol.as_deref()));
        let mut notes = protocol_notes(protocols);
        for model in &self.models {
            for &width in &self.widths {
                let name = format!("{} at {}", display_name(model), width_name(width));
                match self.point(model, width) {
                    None => notes.push(format!("{name} is missing")),
                    Some(Quantized { perplexity: None, .. }) => {
                        notes.push(format!("the perplexity of {name} is not finite"));
                    }
                    Some(_) => {}
                }
            }
        }
        notes
    }

    fn measured(&self, model: Option<&str>, width: impl Into<Width>) -> Measured {
        let width = width.into();
        match model.and_then(|model| self.point(model, width)) {
            None => Measured::Missing,
            Some(point) => point.perplexity.map_or(Measured::NotFinite, Measured::from),
        }
    }

    /// By how many percent a model's perplexity is above that at FP32.
    pub fn degradation(&self, model: Option<&str>, width: impl Into<Width>) -> Measured {
        self.measured(model, width).with(self.measured(model, 32.0), |ppl, base| 100.0 * (ppl / base - 1.0))
    }

    /// The documents' claims about ResNet-BK and Mamba.
    pub fn requirements(&self) -> Vec<Requirement> {
        let bk = self.models.iter().map(String::as_str).find(|model| is_resnet_bk(model));
        let mamba = self.models.iter().map(String::as_str).find(|model| is_mamba(model));
        let requirement =
            |id, description, value, side, threshold| Requirement { id, description, value, side, threshold };
        vec![
            requirement(
                "req_7_2_int8_degradation_lt_5pct",
                "ResNet-BK at INT8: increase of perplexity over FP32, percent",
                self.degradation(bk, 8.0),
                Side::Below,
                5.0,
            ),
            requirement(
                "req_7_6_int4_degradation_lt_15pct",
                "ResNet-BK at INT4: increase of perplexity over FP32, percent",
                self.degradation(bk, 4.0),
                Side::Below,
                15.0,
            ),
            requirement(
                "req_8_6_resnetbk_int4_lt_50",
                "ResNet-BK at INT4: perplexity",
                self.measured(bk, 4.0),
                Side::Below,
                50.0,
            ),
            requirement(
                "req_8_7_mamba_int4_gt_200",
                "Mamba at INT4: perplexity",
                self.measured(mamba, 4.0),
                Side::Above,
                200.0,
            ),
            requirement(
                "req_7_8_int8_10pct_better",
                "INT8: increase of Mamba's perplexity less that of ResNet-BK's, percentage points",
                self.degradation(mamba, 8.0).with(self.degradation(bk, 8.0), |mamba, bk| mamba - bk),
                Side::AtLeast,
                10.0,
            ),
            requirement(
                "req_7_9_mamba_4x_worse_int4",
                "INT4: perplexity of Mamba over that of ResNet-BK",
                self.measured(mamba, 4.0).with(self.measured(bk, 4.0), |mamba, bk| mamba / bk),
                Side::AtLeast,
                4.0,
            ),
        ]
    }

    /// Everything for machines; `notes` are those of reading and drawing.
    pub fn summary(&self, notes: &[String]) -> Value {
        let mut models = serde_json::Map::new();
        for model in &self.models {
            let mut results = serde_json::Map::new();
            for &width in &self.widths {
                let Some(point) = self.point(model, width) else { continue };
                let finite = point.perplexity;
                let value = json!({
                    "bit_width": width.bits,
                    "perplexity": finite,
                    "degradation_percent": self.degradation(Some(model), width).finite(),
                    "deployable": finite.is_some_and(|ppl| ppl < self.threshold),
                });
                results.insert(width_name(width).to_lowercase(), value);
            }
            let object = json!({
                "name": display_name(model),
                "looks_ahead": self.looks_ahead(model),
                "results": results,
            });
            models.insert(model.clone(), object);
        }
        json!({
            "figure": "robustness",
            "simulated": self.simulated,
            "deployment_threshold": self.threshold,
            "models": models,
            "requirements": by_id(&self.requirements()),
            "notes": notes,
        })
    }

    /// The summary for people.
    pub fn render(&self) -> String {
        let rule = |mark: char| mark.to_string().repeat(80);
        let mut lines = vec!["Quantization Robustness Summary".to_owned(), rule('=')];
        if self.simulated {
            lines.push("SIMULATED data: nothing here was measured".into());
        }
        for model in &self.models {
            let ahead = if self.looks_ahead(model) { " (LOOKS AHEAD: not a language model's perplexity)" } else { "" };
            lines.extend([String::new(), format!("{} Results{ahead}:", display_name(model)), rule('-')]);
            lines.push(format!("{:<12} {:<12} {:<13} Deployable", "Precision", "PPL", "Increase"));
            lines.push(rule('-'));
            for &width in &self.widths {
                let Some(point) = self.point(model, width) else { continue };
                let ppl = point.perplexity.map_or("not finite".into(), |ppl| format!("{ppl:.2}"));
                let increase =
                    self.degradation(Some(model), width).finite().map_or("".into(), |it| format!("{it:+.2} %"));
                let deployable =
                    if point.perplexity.is_some_and(|ppl| ppl < self.threshold) { "✓ Yes" } else { "✗ No" };
                lines.push(format!("{:<12} {ppl:<12} {increase:<13} {deployable}", width_name(width)));
            }
        }
        lines.extend([String::new(), "Requirements Verification:".into(), rule('-')]);
        lines.extend(self.requirements().iter().map(Requirement::line));
        lines.join("\n")
    }
}

/// Requirements as an object by their ids.
pub(super) fn by_id(requirements: &[Requirement]) -> Value {
    let fields = requirements.iter().map(|requirement| {
        (requirement.id.to_owned(), serde_json::to_value(requirement).expect("plain numbers and strings"))
    });
    Value::Object(fields.collect())
}

/// The models that are there, ResNet-BK and Mamba first; or those of `asked`, in that order.
pub(super) fn choose<'a>(found: impl Iterator<Item = &'a str>, asked: &[String]) -> Result<Vec<String>, String> {
    let mut models: Vec<String> = Vec::new();
    for model in found {
        if !models.iter().any(|other| other == model) {
            models.push(model.to_owned());
        }
    }
    models.sort_by_key(|model| (!is_resnet_bk(model), !is_mamba(model)));
    if asked.is_empty() {
        return Ok(models);
    }
    let mut chosen: Vec<String> = Vec::new();
    for model in asked {
        if !models.contains(model) {
            return Err(format!("there is no result of {model}; there are those of {}", models.join(", ")));
        }
        if !chosen.contains(model) {
            chosen.push(model.clone());
        }
    }
    Ok(chosen)
}

/// `FP32`, `BF16`, `INT4`, `ternary` ...
pub fn width_name(width: Width) -> String {
    match width.bits {
        32.0 => "FP32".into(),
        16.0 if width.bf16 => "BF16".into(),
        16.0 => "FP16".into(),
        1.0 => "binary".into(),
        bits if (1.5..1.7).contains(&bits) => "ternary".into(),
        bits if bits.fract() == 0.0 => format!("INT{bits}"),
        bits => format!("{bits:.2} bit"),
    }
}
