//! Configurations of varying compute: fewer layers, fewer experts for a token, narrower windows of attention.

use std::{path::PathBuf, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Measured, Packed, Precision, Subject, Sweep, store};
use crate::{
    error::{Error, Result},
    eval::{
        flops::{TokenCost, token_cost},
        perplexity::{Options, evaluate_reduced},
    },
    model::{
        Model,
        reduce::{Compute, Reduction},
    },
    ops::{count::CountOps, cpu::Activations},
    progress::Observer,
    tensor::CalibrationText,
};

/// Of the layers at most a half is skipped, in so many steps.
const DEPTH_STEPS: usize = 4;

/// One amount of compute for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    /// 0 is the model as it is; the others come with falling FLOPs.
    pub index: usize,
    pub reduction: Reduction,
    pub flops_per_token: u64,
    /// FLOPs over those of the model as it is.
    pub compute_factor: f64,
}

/// How much a text's loss grows where one layer is skipped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRanking {
    pub model: String,
    pub calibration: CalibrationText,
    pub ctx: usize,
    pub windows: usize,
    /// Mean negative log-likelihood of a token in nats, every layer in place.
    pub nll: f64,
    /// The same without each layer; null where it is not finite.
    pub nll_without: Vec<Option<f64>>, // [layers]
    pub key: String,
}

/// The result of one model with one amount of compute.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComputeResult {
    pub config_id: String,
    pub model: String,
    #[serde(flatten)]
    pub cost: TokenCost,
    pub compute_factor: f64,
    /// Layers that run.
    pub layers: usize,
    pub layers_total: usize,
    pub layers_skipped: Vec<usize>,
    pub experts_per_token: Option<usize>,
    pub experts_per_token_total: Option<usize>,
    /// Where it is narrower than the model's own.
    pub attention_window: Option<usize>,
    /// What the skipped layers were chosen on.
    pub calibration: Option<CalibrationText>,
    #[serde(flatten)]
    pub measured: Measured,
}

impl LayerRanking {
    /// The layers, the one that is missed least first.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.nll_without.len()).collect();
        let loss = |layer: usize| self.nll_without[layer].unwrap_or(f64::INFINITY);
        order.sort_by(|&a, &b| loss(a).total_cmp(&loss(b)));
        order
    }
}

impl Subject {
    /// What of the model can be reduced.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn compute(&self) -> Result<Compute> {
        Ok(Model::load(&self.checkpoint, &CountOps::default())?.compute())
    }

    /// The number of configurations, which does not depend on how layers rank.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn configurations_count(&self) -> Result<usize> {
        Ok(reductions(self.compute()?, &[], self.ctx).len())
    }

    /// Every amount of compute for the model, by falling FLOPs.
    ///
    /// # Errors
    /// As [`token_cost`].
    pub fn configurations(&self, ranking: &LayerRanking) -> Result<Vec<Configuration>> {
        let mut configurations = Vec::new();
        for reduction in reductions(self.compute()?, &ranking.order(), self.ctx) {
            let flops_per_token = token_cost(&self.checkpoint, &reduction, self.ctx)?.flops_per_token;
            configurations.push(Configuration { index: 0, reduction, flops_per_token, compute_factor: 1.0 });
        }
        configurations.sort_by_key(|configuration| std::cmp::Reverse(configuration.flops_per_token));
        let whole = configurations[0].flops_per_token as f64;
        for (index, configuration) in configurations.iter_mut().enumerate() {
            configuration.index = index;
            configuration.compute_factor = configuration.flops_per_token as f64 / whole;
        }
        Ok(configurations)
    }
}

/// Every combination of depths, experts and windows, the model as it is first; layers are skipped in `order`.
fn reductions(compute: Compute, order: &[usize], ctx: usize) -> Vec<Reduction> {
    let mut depths: Vec<usize> = (0..=DEPTH_STEPS).map(|step| compute.layers * step / (2 * DEPTH_STEPS)).collect();
    depths.dedup();
    let mut experts = vec![None];
    let mut chosen = compute.experts_per_token.unwrap_or(1) / 2;
    while chosen > 0 {
        experts.push(Some(chosen));
        chosen /= 2;
    }
    let mut windows = vec![None];
    if let Some(widest) = compute.attention_window {
        let narrower = [ctx / 4, ctx / 16].into_iter().filter(|&window| window > 0 && window < widest);
        windows.extend(narrower.map(Some));
    }
    let mut reductions = Vec::new();
    for &depth in &depths {
        let mut skipped_layers: Vec<usize> = order.iter().copied().take(depth).collect();
        skipped_layers.sort_unstable();
        for &experts_per_token in &experts {
            for &attention_window in &windows {
                let skipped_layers = skipped_layers.clone();
                reductions.push(Reduction { skipped_layers, experts_per_token, attention_window });
            }
        }
    }
    reductions
}

impl Sweep {
    fn ranking_path(&self, subject: &Subject) -> PathBuf {
        self.folder.join(format!("{}_layer_ranking.json", subject.name))
    }

    fn config_id(&self, subject: &Subject, configuration: &Configuration) -> String {
        format!("{}_config_{}", subject.name, configuration.index)
    }

    fn compute_key(&self, subject: &Subject, precision: Precision, configuration: &Configuration) -> String {
        self.key(subject, precision, &json!(configuration.reduction))
    }

    /// The result that is there already.
    ///
    /// # Errors
    /// As [`Sweep::done`].
    pub fn compute_done(
        &self,
        subject: &Subject,
        precision: Precision,
        configuration: &Configuration,
    ) -> Result<Option<Value>> {
        let path = self.folder.join(format!("{}.json", self.config_id(subject, configuration)));
        self.found(&path, &self.compute_key(subject, precision, configuration))
    }

    /// Removes results of an earlier sweep with more configurations than `count`: they belong to none of these.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_beyond(&self, subject: &Subject, count: usize) -> Result<()> {
        let prefix = format!("{}_config_", subject.name);
        for entry in std::fs::read_dir(&self.folder).map_err(Error::io(&self.folder))? {
            let path = entry.map_err(Error::io(&self.folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let index = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".json"));
            if index.and_then(|index| index.parse().ok()).is_some_and(|index: usize| index >= count) {
                std::fs::remove_file(&path).map_err(Error::io(&path))?;
            }
        }
        Ok(())
    }

    /// The ranking of the layers that is there already.
    ///
    /// # Errors
    /// [`Error::BadOutput`] as [`Sweep::done`].
    pub fn ranking_done(
        &self,
        subject: &Subject,
        (text, tokens): (&CalibrationText, &[u32]),
    ) -> Result<Option<LayerRanking>> {
        let path = self.ranking_path(subject);
        let Some(found) = self.found(&path, &self.ranking_key(subject, text, tokens))? else { return Ok(None) };
        let ranking: Option<LayerRanking> = serde_json::from_value(found).ok();
        let layers = subject.compute()?.layers;
        match ranking.filter(|ranking| ranking.nll_without.len() == layers) {
            Some(ranking) => Ok(Some(ranking)),
            None => {
                let why = "is no ranking of this model's layers; pass --force to replace it";
                Err(Error::BadOutput { path, why: why.into() })
            }
        }
    }

    /// Measures which layers a model misses least, on a text of its own.
    ///
    /// # Errors
    /// As [`evaluate_reduced`], for the whole model.
    pub fn rank_layers(
        &self,
        subject: &Subject,
        (text, tokens): (&CalibrationText, &[u32]),
        observer: &dyn Observer,
    ) -> Result<LayerRanking> {
        let options = Options { ctx: Some(subject.ctx), activations: Activations::Exact, ..self.options };
        let without = |skipped_layers: Vec<usize>| {
            let reduction = Reduction { skipped_layers, ..Reduction::default() };
            // Of the source, so that every width skips the same layers.
            evaluate_reduced(self.cpu, (&subject.checkpoint, &reduction), None, tokens, &options, observer)
        };
        let whole = without(Vec::new())?;
        let layers = subject.compute()?.layers;
        let mut nll_without = Vec::with_capacity(layers);
        for layer in 0..layers {
            nll_without.push(match without(vec![layer]) {
                // The only layer of a model is never skipped.
                _ if layers == 1 => None,
                Ok(evaluation) => Some(evaluation.nll),
                Err(Error::Output { .. }) => None,
                Err(error) => return Err(error),
            });
        }
        let ranking = LayerRanking {
            model: subject.name.clone(),
            calibration: text.clone(),
            ctx: subject.ctx,
            windows: whole.windows,
            nll: whole.nll,
            nll_without,
            key: self.ranking_key(subject, text, tokens),
        };
        store(&self.ranking_path(subject), &ranking)?;
        Ok(ranking)
    }

    /// A hash of everything that a ranking depends on.
    fn ranking_key(&self, subject: &Subject, text: &CalibrationText, tokens: &[u32]) -> String {
        let options = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "source": subject.blake3,
            "text": text,
            "ctx": subject.ctx,
            "skip": self.options.skip,
            "allow_lookahead": self.options.allow_lookahead,
        });
        let mut hasher = blake3::Hasher::new();
        hasher.update(options.to_string().as_bytes()).update(bytemuck::cast_slice(tokens));
        hasher.finalize().to_hex().to_string()
    }

    /// Measures one configuration on a packed file of the model, and writes the result.
    ///
    /// # Errors
    /// As [`evaluate_reduced`]; a model that computes NaN or infinity is a result.
    pub fn configuration(
        &self,
        subject: &Subject,
        packed: &Packed,
        configuration: &Configuration,
        ranking: &LayerRanking,
        observer: &dyn Observer,
    ) -> Result<ComputeResult> {
        let Configuration { reduction, compute_factor, .. } = configuration;
        let start = Instant::now();
        let run = (&packed.file as _, reduction);
        let evaluated = evaluate_reduced(self.cpu, run, None, &subject.tokens, &self.options, observer);
        let seconds = start.elapsed().as_secs_f64();
        let key = self.compute_key(subject, packed.precision, configuration);
        let compute = subject.compute()?;
        let skipped = reduction.skipped_layers.len();
        let result = ComputeResult {
            config_id: self.config_id(subject, configuration),
            model: subject.name.clone(),
            cost: token_cost(&packed.file, reduction, subject.ctx)?,
            compute_factor: *compute_factor,
            layers: compute.layers - skipped,
            layers_total: compute.layers,
            layers_skipped: reduction.skipped_layers.clone(),
            experts_per_token: reduction.experts_per_token.or(compute.experts_per_token),
            experts_per_token_total: compute.experts_per_token,
            attention_window: reduction.attention_window,
            calibration: (skipped > 0).then(|| ranking.calibration.clone()),
            measured: self.measured(subject, packed, evaluated, seconds, key)?,
        };
        store(&self.folder.join(format!("{}.json", result.config_id)), &result)?;
        Ok(result)
    }
}
