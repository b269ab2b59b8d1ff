//! The Llama architecture against the textbook formulas in f64, in the variants that no reference checkpoint has; and
//! what is refused.

use std::{
    borrow::Cow,
    collections::HashMap,
    path::{Path, PathBuf},
};

use bkpack::{
    Error, Result,
    eval::perplexity::{Options, evaluate},
    model::{self, Architecture, Model, config::LlamaConfig},
    ops::{
        Ops,
        cpu::{Activations, CpuOps},
    },
    progress::{Observer, Silent, Unit},
    tensor::{Tensor, TensorData, TensorSource},
};
use bkpack_kernels::{
    Cpu, FloatType,
    reference_ops::{self as reference, Heads},
};
use serde_json::{Value, json};

const VOCAB: usize = 24;

/// A model made of random numbers, in memory.
struct Random {
    config: Value,
    names: Vec<String>,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Random {
    /// Every tensor that the configuration asks for.
    fn new(config: Value) -> Self {
        let mut source = Self { config, names: Vec::new(), tensors: HashMap::new() };
        let mut state = 1u64;
        let mut expected = Vec::new();
        let mut visit = |name: String, shape: &[usize]| {
            expected.push((name, shape.to_vec()));
            Ok(())
        };
        model::visit_tensors(&source, &mut visit).unwrap();
        for (name, shape) in expected {
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 40) as f32 / (1 << 24) as f32 - 0.5
            };
            let values = (0..shape.iter().product()).map(|_| next()).collect();
            source.names.push(name.clone());
            source.tensors.insert(name, (shape, values));
        }
        source
    }

    fn values(&self, name: &str) -> &[f32] {
        &self.tensors[name].1
    }

    /// `x * weight^T + bias`, the bias where there is one.
    fn linear(&self, x: &[f32], name: &str) -> Vec<f32> {
        let (shape, weight) = &self.tensors[&format!("{name}.weight")];
        let bias = self.tensors.get(&format!("{name}.bias"));
        let mut out = Vec::new();
        for row in x.chunks(shape[1]) {
            for (index, weights) in weight.chunks(shape[1]).enumerate() {
                let dot: f64 = row.iter().zip(weights).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                out.push((dot + bias.map_or(0.0, |(_, bias)| f64::from(bias[index]))) as f32);
            }
        }
        out
    }

    /// The whole forward pass, written down a second time.
    fn logits(&self, tokens: &[u32], shape: Heads, frequencies: &[f32], head: &str) -> Vec<f32> {
        let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<f32>>();
        let Heads { heads, kv_heads, head_dim } = shape;
        let angles = (0..tokens.len()).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let norm = |x: &[f32], name: &str| narrow(reference::rms_norm(x, self.values(name), 1e-5));
        let embedding = self.values("model.embed_tokens.weight");
        let hidden = embedding.len() / VOCAB;
        let mut x: Vec<f32> =
            tokens.iter().flat_map(|&token| &embedding[token as usize * hidden..][..hidden]).copied().collect();
        for layer in 0..self.config["num_hidden_layers"].as_u64().unwrap() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = norm(&x, &name("input_layernorm.weight"));
            let q = reference::rope(&self.linear(&normed, &name("self_attn.q_proj")), heads, head_dim, &cos, &sin);
            let k = reference::rope(&self.linear(&normed, &name("self_attn.k_proj")), kv_heads, head_dim, &cos, &sin);
            let v = self.linear(&normed, &name("self_attn.v_proj"));
            let scale = 1.0 / (head_dim as f32).sqrt();
            let attended = narrow(reference::attention(&narrow(q), &narrow(k), &v, shape, scale, usize::MAX));
            x = narrow(reference::add(&x, &self.linear(&attended, &name("self_attn.o_proj"))));
            let normed = norm(&x, &name("post_attention_layernorm.weight"));
            let (gate, up) = (self.linear(&normed, &name("mlp.gate_proj")), self.linear(&normed, &name("mlp.up_proj")));
            let gated = narrow(reference::silu_multiply(&gate, &up));
            x = narrow(reference::add(&x, &self.linear(&gated, &name("mlp.down_proj"))));
        }
        self.linear(&norm(&x, "model.norm.weight"), head)
    }
}

impl TensorSource for Random {
    fn path(&self) -> &Path {
        Path::new("random")
    }

    fn config(&self) -> Option<&Value> {
        Some(&self.config)
    }

    fn names(&self) -> &[String] {
        &self.names
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|(shape, _)| shape.as_slice())
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || Error::MissingTensor { path: PathBuf::from("random"), tensor: name.to_owned() };
        let (shape, values) = self.tensors.get(name).ok_or_else(missing)?;
        let values = Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect());
        Ok(Tensor::new(shape.clone(), TensorData::Float { dtype: FloatType::F32, values }).unwrap())
    }

    fn file(&self, _: &str) -> Result<Option<Cow<'_, [u8]>>> {
        Ok(None)
    }

    fn file_bytes(&self) -> u64 {
        1000
    }
}

fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 28,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32, "tie_word_embeddings": true
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

#[test]
fn every_variant_computes_the_textbook_formulas() {
    let tokens = [3, 0, 23, 7, 7, 11, 19, 2, 5];
    let shape = Heads { heads: 4, kv_heads: 2, head_dim: 6 };
    let head = "model.embed_tokens";
    for (changes, shape, head) in [
        (json!({}), shape, head),
        (json!({"tie_word_embeddings": false}), shape, "lm_head"),
        (json!({"attention_bias": true}), shape, head),
        (json!({"mlp_bias": true}), shape, head),
        (json!({"num_key_value_heads": 4, "head_dim": 2}), Heads { heads: 4, kv_heads: 4, head_dim: 2 }, head),
        (json!({"num_key_value_heads": 1, "head_dim": 10}), Heads { heads: 4, kv_heads: 1, head_dim: 10 }, head),
        (json!({"rope_scaling": {"type": "linear", "factor": 3.0}}), shape, head),
    ] {
        let source = Random::new(config(changes.clone()));
        for cpu in Cpu::available() {
            let ops = CpuOps::new(cpu, Activations::Exact);
            let model = Model::load(&source, &ops).unwrap();
            let frequencies = rotations_of(&source, shape.head_dim);
            let expected = source.logits(&tokens, shape, &frequencies, head);
            let mut state = model.state(tokens.len()).unwrap();
            let hidden = model.forward(&tokens, &mut state).unwrap();
            let mut found = Vec::new();
            ops.read(&model.logits(&hidden, 0, tokens.len()).unwrap(), &mut found).unwrap();
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 2e-5, "{changes}, {}: {found} {expected}", cpu.isa());
            }
        }
    }
}

#[test]
fn tensors_that_do_not_fit_the_configuration_are_named() {
    let mut source = Random::new(config(json!({"attention_bias": true})));
    let name = "model.layers.1.self_attn.k_proj.bias";
    source.tensors.get_mut(name).unwrap().0 = vec![1, 12];
    let error = model::check_shapes(&source).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { tensor, found, expected, .. }
        if tensor == name && found == [1, 12] && expected == [12]));
    source.tensors.remove(name);
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    assert!(matches!(Model::load(&source, &ops), Err(Error::MissingTensor { tensor, .. }) if tensor == name));

    let mut untied = Random::new(config(json!({"tie_word_embeddings": true})));
    untied.config["tie_word_embeddings"] = json!(false);
    assert!(
        matches!(model::check_shapes(&untied), Err(Error::MissingTensor { tensor, .. }) if tensor == "lm_head.weight")
    );
}

#[test]
fn a_config_that_claims_millions_of_tensors_is_refused_at_the_first() {
    let start = std::time::Instant::now();
    for claims in [
        json!({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4096, "num_experts_per_tok": 2,
            "num_hidden_layers": 4096}),
        json!({"architectures": ["ResNetBKForCausalLM"], "d_model": 20, "n_layers": 4096, "n_seq": 1 << 24,
            "num_experts": 4096}),
        json!({"architectures": ["MambaForCausalLM"], "num_hidden_layers": 4096}),
    ] {
        let mut source = Random::new(config(json!({})));
        source.config = config(claims);
        assert!(matches!(model::check_shapes(&source), Err(Error::MissingTensor { .. } | Error::ShapeMismatch { .. })));
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(2));
}

#[test]
fn unknown_architectures_are_named() {
    for architectures in [json!(["BertModel"]), json!([]), json!(null), json!("LlamaForCausalLM")] {
        let mut source = Random::new(config(json!({})));
        source.config["architectures"] = architectures.clone();
        assert_eq!(Architecture::from_config(&source.config), None, "{architectures}");
        let error = model::check_shapes(&source).unwrap_err();
        assert!(
            matches!(error, Error::UnknownArchitecture { supported, .. } if supported.contains("LlamaForCausalLM"))
        );
    }
}

#[test]
fn tokens_outside_of_vocabulary_or_context_are_refused() {
    let source = Random::new(config(json!({})));
    let ops = CpuOps::new(Cpu::detect(), Activations::Exact);
    let model = Model::load(&source, &ops).unwrap();
    let mut state = model.state(4).unwrap();
    assert!(matches!(model.forward(&[0, VOCAB as u32], &mut state), Err(Error::Tokens { .. })));
    assert!(model.forward(&[0, 1, 2], &mut state).is_ok());
    assert!(matches!(model.forward(&[3, 4], &mut state), Err(Error::Tokens { .. })));
    assert!(model.forward(&[3], &mut state).is_ok());
}

const OPTIONS: Options = Options { ctx: Some(8), skip: 1, activations: Activations::Exact, allow_lookahead: false };

fn tokens(count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7 % VOCAB) as u32).collect()
}

#[test]
fn evaluation_is_the_mean_of_what_the_logits_say() {
    let (source, baseline) = (Random::new(config(json!({}))), Random::new(config(json!({"mlp_bias": true}))));
    let tokens = tokens(2 * 8 + 5);
    let found = evaluate(Cpu::detect(), &source, Some(&baseline), &tokens, &OPTIONS, &Silent).unwrap();

    let shape = Heads { heads: 4, kv_heads: 2, head_dim: 6 };
    let frequencies = rotations_of(&source, 6);
    let (mut nll, mut baseline_nll, mut divergences, mut same) = (0.0, 0.0, Vec::new(), 0);
    for window in tokens.chunks_exact(8) {
        let logits = |source: &Random| source.logits(window, shape, &frequencies, "model.embed_tokens");
        let (logits, baseline_logits) = (logits(&source), logits(&baseline));
        for (position, &target) in window.iter().enumerate().skip(1) {
            let row = |logits: &[f32]| logits[(position - 1) * VOCAB..position * VOCAB].to_vec();
            let (row, baseline_row) = (row(&logits), row(&baseline_logits));
            nll += reference::cross_entropy(&row, target);
            baseline_nll += reference::cross_entropy(&baseline_row, target);
            divergences.push(reference::kl_divergence(&baseline_row, &row));
            same += usize::from(reference::arg_max(&row) == reference::arg_max(&baseline_row));
        }
    }
    let scored = 2.0 * 7.0;
    let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    assert_eq!((found.scored, found.windows, found.ctx), (14, 2, 8));
    close(found.nll, nll / scored);
    close(found.ppl, (nll / scored).exp());
    let compared = found.baseline.unwrap();
    close(compared.baseline_nll, baseline_nll / scored);
    close(compared.ppl_increase_percent, 100.0 * (((nll - baseline_nll) / scored).exp() - 1.0));
    close(compared.kld_mean, divergences.iter().sum::<f64>() / scored);
    divergences.sort_by(f64::total_cmp);
    close(compared.kld_median, (divergences[6] + divergences[7]) / 2.0);
    close(compared.kld_p999, divergences[12] + (divergences[13] - divergences[12]) * 0.987);
    assert_eq!(compared.top1_agreement, same as f64 / scored);
    let parameters: usize = source.tensors.values().map(|(_, values)| values.len()).sum();
    assert_eq!(found.parameters, parameters as u64);
    close(found.bits_per_weight, 8000.0 / parameters as f64);
    close(found.ratio_fp32, 4.0 * parameters as f64 / 1000.0);
}

fn rotations_of(source: &Random, head_dim: usize) -> Vec<f32> {
    let config = LlamaConfig::parse(Path::new("model"), Architecture::Llama, &source.config).unwrap();
    config.rope.inverse_frequencies(head_dim)
}

#[test]
fn what_is_printed_as_json_has_the_promised_keys() {
    let source = Random::new(config(json!({})));
    let keys = |baseline: Option<&dyn TensorSource>| {
        let found = evaluate(Cpu::detect(), &source, baseline, &tokens(16), &OPTIONS, &Silent).unwrap();
        let Value::Object(object) = serde_json::to_value(found).unwrap() else { panic!("not an object") };
        object
    };
    let always = [
        "ppl",
        "nll",
        "scored",
        "looks_ahead",
        "bits_per_weight",
        "ratio_fp32",
        "file_bytes",
        "tokens_per_second",
        "activations",
    ];
    let compared = ["baseline_ppl", "ppl_increase_percent", "kld_mean", "kld_p999", "top1_agreement"];
    let alone = keys(None);
    assert!(always.iter().all(|key| alone.contains_key(*key)) && !compared.iter().any(|key| alone.contains_key(*key)));
    assert_eq!(alone["activations"], "exact");
    let both = keys(Some(&source));
    assert!(always.iter().chain(&compared).all(|key| both.contains_key(*key)));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let source = Random::new(config(json!({})));
    let run = |source: &Random, baseline: Option<&dyn TensorSource>, tokens: &[u32]| {
        evaluate(Cpu::detect(), source, baseline, tokens, &OPTIONS, &Silent).unwrap_err()
    };
    assert!(matches!(run(&source, None, &tokens(7)), Error::Tokens { .. }));
    assert!(matches!(run(&source, None, &[VOCAB as u32; 8]), Error::Tokens { .. }));
    let other = Random::new(config(json!({"vocab_size": VOCAB + 1})));
    assert!(matches!(run(&source, Some(&other), &tokens(8)), Error::Incomparable { .. }));
    let shorter = Random::new(config(json!({"max_position_embeddings": 4})));
    assert!(matches!(run(&source, Some(&shorter), &tokens(8)), Error::Incomparable { .. }));
    let mut broken = Random::new(config(json!({})));
    broken.tensors.get_mut("model.norm.weight").unwrap().1[0] = f32::NAN;
    assert!(matches!(run(&broken, None, &tokens(8)), Error::Output { .. }));
}

/// Stops after the first window.
struct Stopping(std::sync::atomic::AtomicU64);

impl Observer for Stopping {
    fn begin(&self, _: &str, total: u64, unit: Unit) {
        assert_eq!((total, unit), (24, Unit::Tokens));
    }

    fn advance(&self, amount: u64) {
        self.0.fetch_add(amount, std::sync::atomic::Ordering::Relaxed);
    }

    fn end(&self) {
        panic!("the stage did not reach its end");
    }

    fn cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed) >= 8
    }
}

#[test]
fn the_observer_can_stop_it() {
    let source = Random::new(config(json!({})));
    let observer = Stopping(0.into());
    let stopped = evaluate(Cpu::detect(), &source, None, &tokens(24), &OPTIONS, &observer);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!(observer.0.into_inner(), 8);
}
