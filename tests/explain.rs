//! `bkpack explain`: the reason that each policy gives, what stood against it, and files that record none.

mod common;

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    checkpoint,
    encoding::{Encoding, FloatName},
    format::PackedFile,
    policy::{
        ComponentRules, PLAIN,
        explain::{Explainer, Subject},
    },
    tensor::{ActivationQuantization, CalibrationText, TensorSource},
};
use common::{Random, Stored, fixture, safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A packed file in a folder of its own.
struct Case {
    folder: TempDir,
    source: PathBuf,
}

impl Case {
    fn new(source: impl Into<PathBuf>) -> Self {
        Self { folder: TempDir::new().unwrap(), source: source.into() }
    }

    fn architecture(name: &str) -> Self {
        Self::new(fixture().join("../architectures").join(name))
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn packed(&self) -> PathBuf {
        self.folder.path().join("model.bkpack")
    }

    #[track_caller]
    fn convert(&self, arguments: &[&str]) {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.arg("convert").arg(&self.source).arg("-o").arg(self.packed()).args(["--rounding", "rtn", "--force"]);
        let output = command.args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(cargo_bin("bkpack")).arg("explain").arg(self.packed()).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn explain(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.explain(&[name, "--json"])).unwrap()
    }

    /// Asserts that these words are in the explanation, for people and for machines.
    #[track_caller]
    fn says(&self, name: &str, words: &[&str]) {
        let (text, found) = (self.explain(&[name]), self.json(name));
        let why = found["why"].as_str().unwrap();
        assert!(words.iter().all(|word| why.contains(word)), "{words:?} not all in {why}");
        assert!(text.contains(why) && text.contains(name), "{text}");
    }

    /// The names that policies decide about.
    fn matrices(&self) -> Vec<String> {
        let checkpoint = checkpoint::open(&self.source).unwrap();
        let rules = ComponentRules::builtin();
        let matrix = |name: &&String| rules.component(None, name, checkpoint.shape(name).unwrap()) != PLAIN;
        checkpoint.names().iter().filter(matrix).cloned().collect()
    }

    /// Changes the manifest in place, as long as it does not grow.
    fn amend(&self, change: impl Fn(&mut Value)) {
        let mut file = std::fs::read(self.packed()).unwrap();
        let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..end]).unwrap();
        let metadata = &mut header["__metadata__"];
        let mut manifest: Value = serde_json::from_str(metadata["bkpack"].as_str().unwrap()).unwrap();
        change(&mut manifest);
        metadata["bkpack"] = json!(manifest.to_string());
        metadata["bkpack_seal"] = json!("0".repeat(64));
        let mut text = header.to_string().into_bytes();
        assert!(text.len() <= end - 8);
        text.resize(end - 8, b' ');
        file[8..end].copy_from_slice(&text);
        let seal = blake3::hash(&file[..end]).to_hex();
        let key = b"\"bkpack_seal\":\"";
        let place = file[..end].windows(key.len()).position(|window| window == key).unwrap() + key.len();
        file[place..place + 64].copy_from_slice(seal.as_bytes());
        std::fs::write(self.packed(), file).unwrap();
    }
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn a_uniform_policy_and_its_exceptions() {
    let case = Case::new(fixture());
    case.convert(&[
        "--bits",
        "3",
        "--keep",
        "embed",
        "--tensor",
        r"layers\.2=int8:g64",
        "--tensor",
        "layers.3.*q=keep",
    ]);
    case.says(Q, &["--policy uniform", "int3:g128"]);
    case.says("model.embed_tokens.weight", &["--keep 'embed'", "source precision"]);
    case.says("model.layers.2.mlp.up_proj.weight", &[r"--tensor 'layers\.2=int8:g64'"]);
    case.says("model.layers.3.self_attn.q_proj.weight", &["--tensor 'layers.3.*q=keep'", "source precision"]);
    case.says("model.norm.weight", &["vector"]);
    // The policy's record says it all, so the file holds nothing more.
    let found = case.json(Q);
    assert_eq!(
        (&found["recorded"], &found["asked"], &found["encoding"]),
        (&json!(null), &json!("int3:g128"), &json!("INT3 g128"))
    );
    assert_eq!(found["shape"], json!([256, 256]));
    assert_eq!(found["bits_per_weight"], 8.0 * found["bytes"].as_f64().unwrap() / 65536.0);
    let table = case.explain(&[]);
    assert_eq!(table.lines().count(), 57);
    let line = |name: &str| table.lines().find(|line| line.contains(name)).unwrap();
    assert!(line(Q).ends_with("uniform") && line("embed_tokens").ends_with("--keep 'embed'"), "{table}");
    let all: Value = serde_json::from_str(&case.explain(&["--json"])).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 56);
}

#[test]
fn a_component_names_its_rule_and_file() {
    let case = Case::architecture("mixtral");
    let rules = case
        .write("mine.toml", "[encodings]\nvalue = \"int6:row\"\n[[rule]]\ncomponent = \"value\"\npattern = 'q_proj'\n");
    case.convert(&["--policy", "component", "--rules", &rules]);
    case.says(Q, &["component value int6:row", "\"q_proj\" in mine.toml"]);
    let expert = "model.layers.1.block_sparse_moe.experts.0.w1.weight";
    case.says(expert, &["component expert int4:g128", r#""(^|\.)experts(\.|$)" in the built-in rules"#]);
    case.says("model.layers.1.self_attn.o_proj.weight", &["component other int8:g128", "mine.toml"]);
    case.says("model.norm.weight", &["component plain keep", "vector"]);
    case.says(
        "model.embed_tokens.weight",
        &["component embedding fp16", "But the tensor is kept as BF16", "without a loss"],
    );
    let found = case.json("model.embed_tokens.weight");
    assert_eq!((&found["asked"], &found["encoding"]), (&json!("fp16"), &json!("BF16")));
    assert_eq!(found["recorded"]["instead"]["why"], "left_as_bf16");
}

/// An importance list whose scores fall in the order of the names.
fn importance(names: &[String]) -> String {
    let entry = |(index, name): (usize, &String)| {
        let score = 2.0 - index as f64 / 16.0;
        json!({ "name": name, "component": "other", "gradient": 1.0, "output_variance": 1.0, "weight": 1.0, "score": score })
    };
    let tensors: Vec<Value> = names.iter().enumerate().map(entry).collect();
    let text = json!({ "name": "text.txt", "blake3": "00" });
    let model = json!({ "name": "llama", "blake3": "11" });
    json!({ "version": 1, "model": model, "text": text, "batches": 3, "ctx": 128, "tensors": tensors }).to_string()
}

#[test]
fn importance_gives_rank_score_and_level() {
    let case = Case::new(fixture());
    let names = case.matrices();
    let list = case.write("importance.json", &importance(&names));
    case.convert(&["--policy", "dynamic", "--importance", &list]);
    case.says(&names[2], &["Rank 3 of 43", "score +1.875 in importance.json", "most important 20 %", "fp16", "BF16"]);
    case.says(&names[20], &["Rank 21 of 43", "between", "int8:g128"]);
    case.says(&names[42], &["Rank 43 of 43", "score -0.625", "least important 40 %", "int4:g128"]);
    let expected = json!({ "by": { "kind": "importance", "rank": 43, "of": 43, "score": -0.625, "level": "low" } });
    assert_eq!(case.json(&names[42])["recorded"], expected);
    case.says("model.norm.weight", &["vector"]);

    // A file of a version that recorded no reasons says as much as its policy does.
    case.amend(|manifest| {
        manifest["tensors"].as_array_mut().unwrap().iter_mut().for_each(|tensor| {
            tensor.as_object_mut().unwrap().remove("reason");
        });
    });
    case.says(&names[42], &["--policy dynamic", "rank by importance in importance.json", "does not record more"]);
    case.says("model.norm.weight", &["vector"]);
    assert_eq!(case.json(&names[42])["asked"], json!(null));
}

#[test]
fn a_recipe_gives_its_line() {
    let case = Case::new(fixture());
    let text = format!("version = 1\n[patterns]\n'.' = 'int4'\n'mlp' = 'int3:g64'\n\n[tensors]\n'{Q}' = 'int8:row'\n");
    let recipe = case.write("plan.toml", &text);
    case.convert(&["--recipe", &recipe]);
    case.says(Q, &["Line 7 of plan.toml"]);
    case.says("model.layers.1.mlp.up_proj.weight", &["Pattern 'mlp' in line 4 of plan.toml"]);
    case.says("model.embed_tokens.weight", &["Pattern '.' in line 3"]);
    case.says("model.norm.weight", &["vector"]);
    assert_eq!(case.json(Q)["recorded"], json!({ "by": { "kind": "recipe", "line": 7 } }));
}

#[test]
fn a_budget_gives_costs_and_the_steps_beside() {
    let case = Case::new(fixture());
    let costs = [("int2:g128", 4.0), ("int3:g128", 1.0), ("int4:g128", 0.25), ("int8:g128", 0.0009765625)];
    let options: Vec<Value> = costs.iter().map(|(text, cost)| json!({ "encoding": text, "cost": cost })).collect();
    let entry = |(index, name): (usize, String)| {
        let factor = (index + 1) as f64;
        let mut options = options.clone();
        options.iter_mut().for_each(|option| option["cost"] = json!(factor * option["cost"].as_f64().unwrap()));
        json!({ "name": name, "options": options })
    };
    let tensors: Vec<Value> = case.matrices().into_iter().enumerate().map(entry).collect();
    let table = case.write("costs.json", &json!({ "version": 1, "tensors": tensors }).to_string());
    for extra in [&[][..], &["--coupled"]] {
        let budget = ["--policy", "budget", "--sensitivity", &table, "--target-bpw", "4.6"];
        case.convert(&[&budget[..], extra].concat());
        let mut seen = Vec::new();
        for (index, name) in case.matrices().iter().enumerate() {
            let found = case.json(name);
            let cost = &found["recorded"]["by"];
            let encoding = found["encoding"].as_str().unwrap().to_lowercase().replace(' ', ":");
            let place = costs.iter().position(|(text, _)| *text == encoding).unwrap();
            let of = |place: usize| (index + 1) as f64 * costs[place].1;
            assert_eq!(cost["cost"], of(place), "{name}");
            // These costs are convex, so the steps go to the neighbours.
            for (key, neighbour) in
                [("smaller", place.checked_sub(1)), ("larger", Some(place + 1).filter(|&at| at < 4))]
            {
                let Some(at) = neighbour else {
                    assert!(cost.get(key).is_none(), "{cost}");
                    continue;
                };
                assert_eq!((&cost[key]["encoding"], &cost[key]["cost"]), (&json!(costs[at].0), &json!(of(at))));
                let (bytes, other) = (found["bytes"].as_u64().unwrap(), cost[key]["bytes"].as_u64().unwrap());
                assert!(if key == "smaller" { other < bytes } else { other > bytes });
                let price = (of(at) - of(place)).abs() / bytes.abs_diff(other) as f64;
                case.says(name, &["4.6 bits a weight", costs[at].0, &format!("{price:.3e} a byte")]);
            }
            let coupled = !extra.is_empty() && name.contains("q_proj");
            assert!(!coupled || found["why"].as_str().unwrap().contains("together with"), "{found}");
            seen.push(place);
        }
        seen.sort();
        seen.dedup();
        assert!(seen.len() > 1, "one encoding for all would prove little: {seen:?}");
    }
}

#[test]
fn what_stood_against_a_request_is_named() {
    let folder = TempDir::new().unwrap();
    let mut random = Random(5);
    let values = |odd: f32, random: &mut Random| -> Vec<f32> {
        let mut values: Vec<f32> = (0..64 * 64).map(|_| random.weight()).collect();
        values[random.below(64 * 64)] = odd;
        values
    };
    let tensors = [
        Stored::of("embed_tokens.weight", "F32", &[64, 64], &values(f32::NAN, &mut random)),
        Stored::of("lm_head.weight", "F32", &[64, 64], &values(70000.0, &mut random)),
        Stored::random("norm.weight", "F32", &[64], 1.0, &mut random),
    ];
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, safetensors(&tensors)).unwrap();
    let case = Case::new(path);
    case.convert(&["--policy", "component", "--allow-nonfinite"]);
    case.says(
        "lm_head.weight",
        &["component output fp16", "But the tensor holds 70000, which FP16 cannot hold", "BF16"],
    );
    case.says("embed_tokens.weight", &["1 NaN or infinite values", "FP32"]);

    let case = Case::architecture("resnet_bk");
    let name = "blocks.0.bk_layer.output_proj.weight";
    for policy in [&["--policy", "component"][..], &["--bits", "4"]] {
        case.convert(policy);
        case.says(name, &["But the tensor would grow and is kept: its rows of 2"]);
        let table = case.explain(&[]);
        assert!(table.lines().any(|line| line.contains(name) && line.ends_with("; would grow")), "{table}");
    }
    // Without the record what was asked for and what is stored still differ.
    case.amend(|manifest| {
        manifest["tensors"].as_array_mut().unwrap().iter_mut().for_each(|tensor| tensor["reason"] = json!(5))
    });
    case.says(name, &["uniform gives every matrix int4:g128", "stored as BF16 all the same"]);
}

#[test]
fn names_that_are_not_there_get_the_nearest() {
    let case = Case::new(fixture());
    case.convert(&[]);
    let output = case.run(&["model.layers.1.self_attn.q_prj.weight"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.starts_with("error: ") && message.contains(&format!("the nearest are {Q}, ")), "{message}");
    let output = case.run(&["\u{1b}[31m"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), message.lines().count()), (Some(2), 1), "{message}");
    assert!(!message.contains('\u{1b}') && !message.contains("nearest"), "{message:?}");
}

#[test]
fn records_of_any_content_are_explained() {
    let case = Case::new(fixture());
    let names = case.matrices();
    let list = case.write("importance.json", &importance(&names));
    case.convert(&["--policy", "dynamic", "--importance", &list]);
    for reason in [
        json!(null),
        json!([]),
        json!({ "by": 7 }),
        json!({ "by": { "kind": "importance", "rank": -1, "of": 0, "score": "x" } }),
        json!({ "by": { "kind": "luck" } }),
        json!({ "instead": { "asked": 1, "why": "no" } }),
    ] {
        case.amend(|manifest| manifest["tensors"].as_array_mut().unwrap()[3]["reason"] = reason.clone());
        let packed = PackedFile::open(&case.packed()).unwrap();
        case.says(&packed.tensors()[3].name, &["--policy dynamic", "does not record more"]);
    }
    for (policy, words) in [
        (json!({}), "does not say how"),
        (json!(null), "does not say how"),
        (json!([1]), "does not say how"),
        (json!({ "name": "lu\u{1b}ck", "keep": ["("], "tensor": 3 }), "does not know"),
        (json!({ "name": "uniform", "encoding": 4 }), "the same encoding"),
        (json!({ "name": "budget", "sensitivity": [], "target": "x" }), "does not record more"),
    ] {
        case.amend(|manifest| manifest["policy"] = policy.clone());
        case.says(&names[0], &[words]);
        assert!(!case.explain(&[]).contains('\u{1b}'));
    }
}

#[test]
fn scales_of_activations_are_no_policys() {
    let record = ActivationQuantization {
        component: "bk_core".into(),
        bits: 8,
        group_size: 1,
        positions: 4,
        samples: 9,
        text: CalibrationText { name: "text.txt".into(), blake3: "00".into() },
        scales: vec!["blocks.0.bk_layer.activation_scale".into()],
    };
    let policy = json!({ "name": "uniform", "encoding": "int4:g128", "keep": ["."] });
    let explainer = Explainer::new(&policy, std::slice::from_ref(&record));
    let subject = |name| Subject {
        name,
        component: "bk_core",
        encoding: Encoding::Float { dtype: FloatName::F32 },
        bytes: 48,
        reason: None,
    };
    let explained = explainer.explain(&subject(&record.scales[0]));
    assert!(explained.sentence.contains("bk_core") && explained.sentence.contains("8 bits"), "{}", explained.sentence);
    assert!(explained.sentence.contains("text.txt") && explained.asked.is_none());
    assert!(explainer.explain(&subject("other")).sentence.contains("--keep"));
}
