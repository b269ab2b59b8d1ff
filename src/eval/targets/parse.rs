//! The file of targets: its structure and its rules.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

use super::{Comparison, Measurement, Metric, Origin, Relation, THIS, Target, Targets};
use crate::{
    error::{Error, Result, short},
    json,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: Spanned<u64>,
    #[serde(default)]
    measurements: BTreeMap<String, Spanned<MeasurementEntry>>,
    #[serde(default)]
    targets: Vec<Spanned<TargetEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MeasurementEntry {
    result: Option<PathBuf>,
    packed: Option<PathBuf>,
    configurations: Option<PathBuf>,
    baseline: Option<PathBuf>,
    model: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetEntry {
    id: String,
    what: Option<String>,
    metric: Metric,
    at: Option<f64>,
    of: Option<String>,
    divided_by: Option<String>,
    minus: Option<String>,
    below: Option<f64>,
    at_most: Option<f64>,
    above: Option<f64>,
    at_least: Option<f64>,
}

/// Reads and checks a file of targets.
pub(super) fn parse(path: &Path) -> Result<Targets> {
    let whole = |why: String| Error::Targets { path: path.to_owned(), line: None, why };
    let text = String::from_utf8(json::read_small(path)?).map_err(|_| whole("is not text in UTF-8".into()))?;
    let line = |span: Range<usize>| {
        1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
    };
    let error_at = |line: usize, why: String| Error::Targets { path: path.to_owned(), line: Some(line), why };
    let document: Document = toml::from_str(&text).map_err(|error| Error::Targets {
        path: path.to_owned(),
        line: error.span().map(line),
        why: error.message().trim_end().replace('\n', ", "),
    })?;
    if *document.version.get_ref() != 1 {
        let why = format!("version {} is not known; this program reads version 1", document.version.get_ref());
        return Err(error_at(line(document.version.span()), why));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut measurements = BTreeMap::new();
    for (name, entry) in document.measurements {
        let line = line(entry.span());
        let origin = check_name(&name).and_then(|()| origin(folder, &name, entry.into_inner()));
        let origin = origin.map_err(|why| error_at(line, format!("measurement {}: {why}", short(&name))))?;
        measurements.insert(name, Measurement { line, origin });
    }
    let (mut targets, mut ids) = (Vec::new(), HashSet::new());
    for entry in document.targets {
        let line = line(entry.span());
        let entry = entry.into_inner();
        let id = entry.id.clone();
        let target = check_name(&id).and_then(|()| target(line, entry, &measurements));
        targets.push(target.map_err(|why| error_at(line, format!("target {}: {why}", short(&id))))?);
        if !ids.insert(id.clone()) {
            return Err(error_at(line, format!("target {id}: there are two of this id")));
        }
    }
    if targets.is_empty() {
        return Err(whole("has no targets".into()));
    }
    Ok(Targets { path: path.to_owned(), targets, measurements })
}

/// Names are shown in tables and given on the command line.
fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    match !name.is_empty() && name.len() <= 100 && name.chars().all(allowed) {
        true => Ok(()),
        false => Err("a name is 1 to 100 letters, digits and _-.".into()),
    }
}

fn origin(folder: &Path, name: &str, entry: MeasurementEntry) -> Result<Origin, String> {
    let MeasurementEntry { result, packed, configurations, baseline, model } = entry;
    if name == THIS {
        return Err("is the file that is being verified".into());
    }
    let at = |path: PathBuf| folder.join(path);
    match (result, packed, configurations, model) {
        (Some(path), None, None, None) => Ok(Origin::Result { path: at(path), baseline: baseline.map(at) }),
        (None, Some(path), None, None) => Ok(Origin::Packed { path: at(path), baseline: baseline.map(at) }),
        (None, None, Some(path), Some(model)) if baseline.is_none() => {
            Ok(Origin::Configurations { folder: at(path), model })
        }
        _ => {
            Err("has one of result, packed (each with a baseline, if need be) and configurations (with a model)".into())
        }
    }
}

fn target(line: usize, entry: TargetEntry, measurements: &BTreeMap<String, Measurement>) -> Result<Target, String> {
    use Comparison::{Above, AtLeast, AtMost, Below};
    let metric = entry.metric;
    let bounds = [(Below, entry.below), (AtMost, entry.at_most), (Above, entry.above), (AtLeast, entry.at_least)];
    let mut bounds = bounds.into_iter().filter_map(|(comparison, bound)| Some((comparison, bound?)));
    let (Some((comparison, threshold)), None) = (bounds.next(), bounds.next()) else {
        return Err("has one of below, at_most, above and at_least".into());
    };
    let relation = match (entry.divided_by, entry.minus) {
        (None, None) => None,
        (Some(other), None) => Some((Relation::DividedBy, other)),
        (None, Some(other)) => Some((Relation::Minus, other)),
        (Some(_), Some(_)) => return Err("has one of divided_by and minus".into()),
    };
    if metric.is_of_configurations() != entry.at.is_some() {
        return Err("at belongs to least_flops_at_ppl and least_ppl_at_flops, and they need it".into());
    }
    if !threshold.is_finite() || entry.at.is_some_and(|at| !at.is_finite()) {
        return Err("a bound is a finite number".into());
    }
    let of = entry.of.unwrap_or_else(|| THIS.into());
    for name in std::iter::once(&of).chain(relation.as_ref().map(|(_, other)| other)) {
        let fits = match measurements.get(name).map(|measurement| &measurement.origin) {
            None if name == THIS => metric.needs().is_some(),
            None => return Err(format!("there is no measurement {}", short(name))),
            Some(Origin::Packed { .. }) => metric.needs().is_some(),
            Some(Origin::Result { .. }) => !metric.is_of_configurations(),
            Some(Origin::Configurations { .. }) => metric.is_of_configurations(),
        };
        if !fits {
            return Err(format!("{} is not measured on {}", metric.name(), short(name)));
        }
    }
    Ok(Target { id: entry.id, line, what: entry.what, metric, at: entry.at, of, relation, comparison, threshold })
}
