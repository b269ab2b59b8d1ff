//! Measuring a model.

use std::path::PathBuf;

use bkpack::{
    eval::{
        perplexity::{Options, evaluate as measure},
        text::read_either,
    },
    ops::cpu::Activations,
    tensor::TensorSource,
};
use bkpack_kernels::Cpu;
use clap::ValueEnum;
use pyo3::prelude::*;

use crate::{
    errors::{exception, option},
    packed::{Model, open_source},
    work,
};

/// What to measure, on what and how; the fields are those of the Python function.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Request<'py> {
    model: Model<'py>,
    baseline: Option<Model<'py>>,
    text: Option<PathBuf>,
    tokens: Option<Tokens>,
    ctx: Option<usize>,
    skip: usize,
    limit_tokens: Option<usize>,
    activations: String,
    allow_lookahead: bool,
    verify_hashes: bool,
    threads: Option<u16>,
}

#[derive(FromPyObject)]
enum Tokens {
    Ids(Vec<u32>),
    File(PathBuf),
}

/// A model that is borrowed or opened here.
enum Opened<'a> {
    Borrowed(&'a dyn TensorSource),
    Owned(Box<dyn TensorSource>),
}

impl Opened<'_> {
    fn source(&self) -> &dyn TensorSource {
        match self {
            Opened::Borrowed(source) => *source,
            Opened::Owned(source) => &**source,
        }
    }
}

/// A model as another thread may have it.
enum Named<'a> {
    Open(&'a bkpack::format::PackedFile),
    Path(&'a PathBuf),
}

impl<'a> Named<'a> {
    fn of(model: &'a Model) -> Self {
        match model {
            Model::Open(packed) => Named::Open(&packed.file),
            Model::Path(path) => Named::Path(path),
        }
    }

    fn open(&self) -> bkpack::Result<Opened<'a>> {
        Ok(match self {
            Named::Open(packed) => Opened::Borrowed(*packed),
            Named::Path(path) => Opened::Owned(open_source(path)?),
        })
    }
}

/// Measures perplexity, and the distance to a baseline; returns JSON.
#[pyfunction]
#[pyo3(signature = (request, progress=None))]
pub fn evaluate(py: Python<'_>, request: Request<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<String> {
    let Request { text, tokens, ctx, skip, limit_tokens, allow_lookahead, verify_hashes, threads, .. } = &request;
    let (model, baseline) = (Named::of(&request.model), request.baseline.as_ref().map(Named::of));
    let activations = Activations::from_str(&request.activations, false)
        .map_err(|_| exception(py, &option("--activations", "use exact or int8")))?;
    let options = Options { ctx: *ctx, skip: *skip, activations, allow_lookahead: *allow_lookahead };
    work::run(py, progress, *threads, |observer| {
        if let (Named::Path(path), true) = (&model, verify_hashes) {
            bkpack::format::PackedFile::open(path)?.check_contents(observer)?;
        }
        let source = model.open()?;
        let baseline = baseline.as_ref().map(Named::open).transpose()?;
        let mut tokens = match (text, tokens) {
            (None, Some(Tokens::Ids(ids))) => ids.clone(),
            (None, Some(Tokens::File(path))) => read_either(source.source(), &None, &Some(path.clone()))?.1,
            (Some(_), None) => read_either(source.source(), text, &None)?.1,
            _ => return Err(option("--text", "give either it or --tokens")),
        };
        tokens.truncate(limit_tokens.unwrap_or(usize::MAX));
        let cpu = Cpu::from_environment()?;
        let baseline = baseline.as_ref().map(Opened::source);
        let evaluation = measure(cpu, source.source(), baseline, &tokens, &options, observer)?;
        Ok(serde_json::to_string(&evaluation).expect("plain numbers and strings"))
    })
}
