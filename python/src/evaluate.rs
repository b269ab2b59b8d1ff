//! Measuring a model.

use std::path::PathBuf;

use bkpack::{
    Result,
    eval::{
        perplexity::{Options, evaluate as measure},
        record::EvaluationRecord,
        text::{read_either, read_tokens},
    },
    format::{Opened, PackedFile},
    ops::cpu::Activations,
    tensor::{CalibrationText, TensorSource},
};
use bkpack_kernels::Cpu;
use clap::ValueEnum;
use pyo3::prelude::*;
use serde::Serialize;

use crate::{
    errors::{exception, option, whole},
    packed::Model,
    work,
};

/// What to measure, on what and how; the fields are those of the Python function. Numbers are wider than they may be, so
/// that one out of range is refused by the name of its argument.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Request<'py> {
    model: Model<'py>,
    baseline: Option<Model<'py>>,
    text: Option<PathBuf>,
    tokens: Option<Tokens>,
    ctx: Option<i64>,
    skip: i64,
    limit_tokens: Option<i64>,
    activations: String,
    allow_lookahead: bool,
    verify_hashes: bool,
    threads: Option<i64>,
}

#[derive(FromPyObject)]
enum Tokens {
    Ids(Vec<i64>),
    File(PathBuf),
}

impl Request<'_> {
    fn options(&self) -> Result<Options> {
        let activations = Activations::from_str(&self.activations, false)
            .map_err(|_| option("--activations", "use exact or int8"))?;
        let ctx = self.ctx.map(|ctx| whole("--ctx", ctx, 1)).transpose()?;
        let skip = whole("--skip", self.skip, 1)?;
        Ok(Options { ctx, skip, activations, allow_lookahead: self.allow_lookahead })
    }

    fn limit_tokens(&self) -> Result<usize> {
        self.limit_tokens.map_or(Ok(usize::MAX), |limit| whole("--limit-tokens", limit, 0))
    }
}

/// A model as another thread may have it.
enum Named<'a> {
    Open(&'a PackedFile),
    Path(&'a PathBuf),
}

impl<'a> Named<'a> {
    fn of(model: &'a Model) -> Self {
        match model {
            Model::Open(packed) => Self::Open(&packed.file),
            Model::Path(path) => Self::Path(path),
        }
    }

    fn open(&self) -> Result<Measured<'a>> {
        Ok(match self {
            Self::Open(packed) => Measured::Borrowed(packed),
            Self::Path(path) => Measured::Owned(Opened::open(path)?),
        })
    }
}

/// A model that is borrowed or was opened here.
enum Measured<'a> {
    Borrowed(&'a PackedFile),
    Owned(Opened),
}

impl Measured<'_> {
    fn source(&self) -> &dyn TensorSource {
        match self {
            Self::Borrowed(packed) => *packed,
            Self::Owned(opened) => &**opened,
        }
    }

    fn packed(&self) -> Option<&PackedFile> {
        match self {
            Self::Borrowed(packed) => Some(packed),
            Self::Owned(opened) => opened.packed(),
        }
    }
}

/// What is returned.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    record: EvaluationRecord,
    /// Of the model and the baseline.
    notices: Vec<String>,
}

/// Measures perplexity, and the distance to a baseline; returns JSON.
#[pyfunction]
#[pyo3(signature = (request, progress=None))]
pub fn evaluate(py: Python<'_>, request: Request<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<String> {
    let (options, limit) = (request.options(), request.limit_tokens());
    let (options, limit) = options.and_then(|options| Ok((options, limit?))).map_err(|error| exception(py, &error))?;
    let (model, baseline) = (Named::of(&request.model), request.baseline.as_ref().map(Named::of));
    let Request { text, tokens, verify_hashes, threads, .. } = &request;
    work::run(py, progress, *threads, |observer| {
        let (model, baseline) = (model.open()?, baseline.map(|baseline| baseline.open()).transpose()?);
        if let (Some(packed), true) = (model.packed(), *verify_hashes) {
            packed.check_contents(observer)?;
        }
        let (source, baseline) = (model.source(), baseline.as_ref().map(Measured::source));
        let (path, mut tokens) = match (text, tokens) {
            (None, Some(Tokens::Ids(ids))) => (None, token_ids(ids)?),
            (None, Some(Tokens::File(path))) => (Some(path), read_tokens(path)?),
            (Some(path), None) => (Some(path), read_either(source, text, &None)?.1),
            _ => return Err(option("--text", "give either it or --tokens")),
        };
        tokens.truncate(limit);
        let text = path.map(|path| CalibrationText::of(path)).transpose()?;
        let evaluation = measure(Cpu::from_environment()?, source, baseline, &tokens, &options, observer)?;
        let record = EvaluationRecord::new(evaluation, text, model.packed());
        let notices = [Some(source), baseline].into_iter().flatten().flat_map(TensorSource::notices).cloned().collect();
        Ok(serde_json::to_string(&Report { record, notices }).expect("plain numbers and strings"))
    })
}

fn token_ids(ids: &[i64]) -> Result<Vec<u32>> {
    let refuse = |id| option("--tokens", format!("{id} is no token id"));
    ids.iter().map(|&id| u32::try_from(id).map_err(|_| refuse(id))).collect()
}
