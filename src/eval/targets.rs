//! Targets: requirements on what was measured, read from a TOML file, each with its verdict.

mod parse;
mod results;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::results::{Configuration, Protocol, read_configurations, read_result};
use crate::{
    error::{Error, Result, short},
    tensor::TensorSource,
};

/// The name in a file of targets of the packed file that is being verified.
pub const THIS: &str = "this";

/// A file of targets.
#[derive(Debug)]
pub struct Targets {
    path: PathBuf,
    targets: Vec<Target>,
    measurements: BTreeMap<String, Measurement>,
}

/// One requirement.
#[derive(Debug)]
struct Target {
    id: String,
    line: usize,
    what: Option<String>,
    metric: Metric,
    /// The perplexity or the FLOPs per token at which configurations are compared.
    at: Option<f64>,
    of: String,
    relation: Option<(Relation, String)>,
    comparison: Comparison,
    threshold: f64,
}

/// What is measured. The names are those of `bkpack eval --json` and `bkpack sweep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Perplexity; the documents' result files call it `perplexity`.
    Ppl,
    PplIncreasePercent,
    KldMean,
    KldMedian,
    KldP999,
    Top1Agreement,
    RatioFp32,
    BitsPerWeight,
    FileBytes,
    FlopsPerToken,
    /// Of configurations: the fewest FLOPs per token of those whose perplexity is at most `at`.
    LeastFlopsAtPpl,
    /// Of configurations: the lowest perplexity of those whose FLOPs per token are at most `at`.
    LeastPplAtFlops,
}

impl Metric {
    /// Its names in a result, the preferred first.
    const fn keys(self) -> &'static [&'static str] {
        match self {
            Metric::Ppl => &["ppl", "perplexity"],
            Metric::PplIncreasePercent => &["ppl_increase_percent"],
            Metric::KldMean => &["kld_mean"],
            Metric::KldMedian => &["kld_median"],
            Metric::KldP999 => &["kld_p999"],
            Metric::Top1Agreement => &["top1_agreement"],
            Metric::RatioFp32 => &["ratio_fp32"],
            Metric::BitsPerWeight => &["bits_per_weight"],
            Metric::FileBytes => &["file_bytes"],
            Metric::FlopsPerToken => &["flops_per_token"],
            Metric::LeastFlopsAtPpl => &["least_flops_at_ppl"],
            Metric::LeastPplAtFlops => &["least_ppl_at_flops"],
        }
    }

    /// The name in a file of targets.
    pub const fn name(self) -> &'static str {
        self.keys()[0]
    }

    /// Whether it is found among several configurations of a model.
    const fn is_of_configurations(self) -> bool {
        matches!(self, Metric::LeastFlopsAtPpl | Metric::LeastPplAtFlops)
    }

    /// Whether it differs with what was run, so that two of it compare only where that was the same.
    const fn depends_on_the_text(self) -> bool {
        !matches!(self.needs(), Some(Needs::Size))
    }

    /// What must be run to measure it on a packed file; `None` where the result of a sweep is needed.
    const fn needs(self) -> Option<Needs> {
        match self {
            Metric::RatioFp32 | Metric::BitsPerWeight | Metric::FileBytes => Some(Needs::Size),
            Metric::Ppl => Some(Needs::Text),
            Metric::PplIncreasePercent
            | Metric::KldMean
            | Metric::KldMedian
            | Metric::KldP999
            | Metric::Top1Agreement => Some(Needs::Baseline),
            Metric::FlopsPerToken | Metric::LeastFlopsAtPpl | Metric::LeastPplAtFlops => None,
        }
    }
}

/// What it takes to measure a packed file, less first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// The file alone.
    Size,
    /// A text to run it on.
    Text,
    /// A text, and a baseline to compare with.
    Baseline,
}

/// How the metric of two measurements makes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    DividedBy,
    Minus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Below,
    AtMost,
    Above,
    AtLeast,
}

impl Comparison {
    const fn sign(self) -> &'static str {
        match self {
            Comparison::Below => "<",
            Comparison::AtMost => "<=",
            Comparison::Above => ">",
            Comparison::AtLeast => ">=",
        }
    }

    /// NaN holds for none.
    fn holds(self, value: f64, threshold: f64) -> bool {
        match self {
            Comparison::Below => value < threshold,
            Comparison::AtMost => value <= threshold,
            Comparison::Above => value > threshold,
            Comparison::AtLeast => value >= threshold,
        }
    }
}

/// Where figures come from, as a file of targets says.
#[derive(Debug)]
struct Measurement {
    line: usize,
    origin: Origin,
}

/// Paths are relative to the file of targets.
#[derive(Debug)]
enum Origin {
    /// A result file, and one whose perplexity it is compared with.
    Result { path: PathBuf, baseline: Option<PathBuf> },
    /// A packed file that is measured now, and what it is compared with.
    Packed { path: PathBuf, baseline: Option<PathBuf> },
    /// The configurations of one model among the result files of a folder.
    Configurations { folder: PathBuf, model: String },
}

/// A packed file that is to be measured.
#[derive(Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What [`Targets::check`] knows the measurement by.
    pub name: String,
    pub path: PathBuf,
    pub baseline: Option<PathBuf>,
    pub needs: Needs,
}

/// Figures of one measurement, under the names of `bkpack eval --json`.
pub type Figures = Map<String, Value>;

/// The figures of a packed file that need no run.
pub fn size_figures(source: &dyn TensorSource) -> Figures {
    let (parameters, bytes) = (source.parameters(), source.file_bytes());
    let mut figures = Figures::new();
    figures.insert("file_bytes".into(), bytes.into());
    figures.insert("bits_per_weight".into(), (8.0 * bytes as f64 / parameters as f64).into());
    figures.insert("ratio_fp32".into(), (4.0 * parameters as f64 / bytes as f64).into());
    figures
}

/// The verdict on one target.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub what: Option<String>,
    /// What is measured, in words: `ppl of mamba_int4 / ppl of resnetbk_int4`.
    pub quantity: String,
    pub comparison: &'static str,
    pub threshold: f64,
    /// `None` where no configuration reaches what is asked for.
    pub measured: Option<f64>,
    /// Why there is no number, or what it must not be quoted without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
    pub passed: bool,
}

impl Targets {
    /// Reads a file of targets; with `only`, none but those of these ids.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Targets`] names the line of what is unknown, missing, named twice or no finite number, and
    /// an id of `only` that the file does not have.
    pub fn read(path: &Path, only: &[String]) -> Result<Self> {
        let mut targets = parse::parse(path)?;
        if let Some(missing) = only.iter().find(|&id| targets.targets.iter().all(|target| target.id != *id)) {
            return Err(targets.error(None, format!("has no target {}", short(missing))));
        }
        targets.targets.retain(|target| only.is_empty() || only.contains(&target.id));
        Ok(targets)
    }

    /// What the verified file must be measured on; `None` where no target looks at it.
    pub fn needs_of_this(&self) -> Option<Needs> {
        self.metrics_of(THIS).filter_map(|(metric, _)| metric.needs()).max()
    }

    /// The packed files to measure besides.
    pub fn wanted(&self) -> Vec<Wanted> {
        let wanted = self.measurements.iter().filter_map(|(name, measurement)| {
            let Origin::Packed { path, baseline } = &measurement.origin else { return None };
            let needs = self.metrics_of(name).filter_map(|(metric, _)| metric.needs()).max()?;
            Some(Wanted { name: name.clone(), path: path.clone(), baseline: baseline.clone(), needs })
        });
        wanted.collect()
    }

    /// The error that a measurement's target asks for what cannot be measured with what was given.
    pub fn unmeasurable(&self, name: &str, why: impl fmt::Display) -> Error {
        let most = self.metrics_of(name).max_by_key(|(metric, _)| metric.needs());
        match most {
            Some((metric, target)) => {
                let why = format!("target {} looks at {} of {name}: {why}", target.id, metric.name());
                self.error(Some(target.line), why)
            }
            None => self.error(None, why.to_string()),
        }
    }

    /// The verdict on every target, from the figures of what was measured and the result files.
    ///
    /// # Errors
    /// [`Error::Targets`] names the line of a target or a measurement whose file is missing, is no result, or holds no
    /// such number.
    pub fn check(&self, measured: &BTreeMap<String, Figures>) -> Result<Vec<Verdict>> {
        self.targets.iter().map(|target| self.verdict(target, measured)).collect()
    }

    fn verdict(&self, target: &Target, measured: &BTreeMap<String, Figures>) -> Result<Verdict> {
        let mut found = Found::default();
        let mut quantity = target.quantity(&target.of);
        let mut value = self.value(target, &target.of, measured, &mut found)?;
        if let Some((relation, other)) = &target.relation {
            let sign = if *relation == Relation::DividedBy { '/' } else { '-' };
            quantity = format!("{quantity} {sign} {}", target.quantity(other));
            let other = self.value(target, other, measured, &mut found)?;
            value = value.zip(other).map(|(value, other)| match relation {
                Relation::DividedBy => value / other,
                Relation::Minus => value - other,
            });
        }
        if let Some(number) = value
            && !number.is_finite()
        {
            return Err(self.error(Some(target.line), format!("{quantity} is {number}, not a finite number")));
        }
        if target.metric.depends_on_the_text() {
            found.compare().map_err(|why| self.error(Some(target.line), format!("target {}: {why}", target.id)))?;
        }
        let Found { remarks, marked, .. } = found;
        Ok(Verdict {
            id: target.id.clone(),
            what: target.what.clone(),
            quantity,
            comparison: target.comparison.sign(),
            threshold: target.threshold,
            measured: value,
            remark: (!remarks.is_empty()).then(|| remarks.join("; ")),
            passed: !marked && value.is_some_and(|value| target.comparison.holds(value, target.threshold)),
        })
    }

    /// One number of one measurement; `None`, with a remark, where no configuration has it.
    fn value(
        &self,
        target: &Target,
        name: &str,
        measured: &BTreeMap<String, Figures>,
        found: &mut Found,
    ) -> Result<Option<f64>> {
        let lacks = |why: String| self.error(Some(target.line), format!("target {}: {why}", target.id));
        if let Some(figures) = measured.get(name) {
            found.add(name, &results::marks(figures), results::protocol(figures));
            let number = number(figures, target.metric);
            return number.map(Some).ok_or_else(|| lacks(format!("{name} has no {}", target.metric.name())));
        }
        let Some(measurement) = self.measurements.get(name) else {
            return Err(lacks(format!("{name} was not measured")));
        };
        let told = |why: String| self.error(Some(measurement.line), format!("measurement {name}: {why}"));
        match &measurement.origin {
            Origin::Packed { .. } => Err(lacks(format!("{name} was not measured"))),
            Origin::Result { path, baseline } => {
                let figures = read_result(path).map_err(told)?;
                found.add(path.display(), &results::marks(&figures), results::protocol(&figures));
                let get = |path: &Path, figures: &Figures, metric: Metric| {
                    let why = || told(format!("{} holds no number {:?}", path.display(), metric.name()));
                    number(figures, metric).ok_or_else(why)
                };
                let Some(baseline) = baseline.as_ref().filter(|_| target.metric == Metric::PplIncreasePercent) else {
                    return get(path, &figures, target.metric).map(Some);
                };
                let of_baseline = read_result(baseline).map_err(told)?;
                found.add(baseline.display(), &results::marks(&of_baseline), results::protocol(&of_baseline));
                let ratio = get(path, &figures, Metric::Ppl)? / get(baseline, &of_baseline, Metric::Ppl)?;
                Ok(Some(100.0 * (ratio - 1.0)))
            }
            Origin::Configurations { folder, model } => {
                let at = target.at.expect("parsed with the metric");
                let configurations = read_configurations(folder, model).map_err(told)?;
                for Configuration { path, marks, protocol, .. } in &configurations {
                    found.add(path.display(), marks, protocol.clone());
                }
                let best = best(&configurations, target.metric, at);
                if best.is_none() {
                    let what = if target.metric == Metric::LeastFlopsAtPpl { "perplexity" } else { "FLOPs per token" };
                    found.remarks.push(format!("no configuration of {name} has a {what} of at most {at}"));
                }
                Ok(best)
            }
        }
    }

    /// Every metric that is asked of a measurement, with the target that asks.
    fn metrics_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (Metric, &'a Target)> {
        let asks = move |target: &&Target| {
            target.of == name || target.relation.as_ref().is_some_and(|(_, other)| other == name)
        };
        self.targets.iter().filter(asks).map(|target| (target.metric, target))
    }

    fn error(&self, line: Option<usize>, why: impl Into<String>) -> Error {
        Error::Targets { path: self.path.clone(), line, why: why.into() }
    }
}

impl Target {
    fn quantity(&self, name: &str) -> String {
        match self.at {
            Some(at) => format!("{} {at} of {name}", self.metric.name()),
            None => format!("{} of {name}", self.metric.name()),
        }
    }
}

/// The best of the configurations within a limit; those without a perplexity count for nothing.
fn best(configurations: &[Configuration], metric: Metric, at: f64) -> Option<f64> {
    let within = configurations.iter().filter_map(|&Configuration { ppl, flops_per_token, .. }| {
        let (limited, value) = match metric {
            Metric::LeastFlopsAtPpl => (ppl?, flops_per_token),
            _ => (flops_per_token, ppl?),
        };
        (limited <= at).then_some(value)
    });
    within.min_by(f64::total_cmp)
}

fn number(figures: &Figures, metric: Metric) -> Option<f64> {
    let value = metric.keys().iter().find_map(|&key| figures.get(key))?;
    value.as_f64().filter(|number| number.is_finite())
}

/// What comes with the numbers of one target.
#[derive(Default)]
struct Found {
    remarks: Vec<String>,
    /// A figure of simulated data, or of a model that sees later tokens, proves nothing.
    marked: bool,
    /// Of each result that the target looks at.
    protocols: Vec<(String, Option<Protocol>)>,
}

impl Found {
    fn add(&mut self, name: impl fmt::Display, marks: &[&'static str], protocol: Option<Protocol>) {
        self.marked |= !marks.is_empty();
        for mark in marks {
            if !self.remarks.iter().any(|remark| remark == mark) {
                self.remarks.push((*mark).to_owned());
            }
        }
        self.protocols.push((name.to_string(), protocol));
    }

    /// Remarks on a result that does not say how it was measured beside one that does; two that say different things are
    /// an error, in a sentence.
    fn compare(&mut self) -> Result<(), String> {
        let known = |(name, protocol): &'_ (String, Option<Protocol>)| Some((name.clone(), protocol.clone()?));
        let Some((first, protocol)) = self.protocols.iter().find_map(known) else { return Ok(()) };
        for (name, other) in self.protocols.iter().filter_map(known) {
            let differing = protocol.iter().zip(&other).filter(|(one, other)| one != other);
            let differing: Vec<String> = differing
                .map(|((field, one), (_, other))| {
                    format!("{field} {} and {}", short(&one.to_string()), short(&other.to_string()))
                })
                .collect();
            if !differing.is_empty() {
                return Err(format!("{first} and {name} do not compare: {}", differing.join(", ")));
            }
        }
        if let Some((name, _)) = self.protocols.iter().find(|(_, protocol)| protocol.is_none()) {
            self.remarks.push(format!("{name} does not say how it was measured, {first} does"));
        }
        Ok(())
    }
}
