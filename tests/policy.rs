//! Policies as a user meets them: what `convert` makes of each tensor, recipes, budgets, and what is refused.

mod common;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    checkpoint,
    encoding::Encoding,
    format::{PackedFile, PackedTensor},
    policy::{ComponentRules, PLAIN, budget::candidates},
    tensor::TensorSource,
};
use common::{Random, Stored, fixture, safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A conversion into a folder of its own.
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.env_remove("BKPACK_ISA").arg("convert").arg(&self.source).args(["--rounding", "rtn"]);
        command.args(arguments).output().unwrap()
    }

    /// Packs to a file of this name; returns what was said on standard error.
    #[track_caller]
    fn convert(&self, name: &str, arguments: &[&str]) -> String {
        let path = self.path(name);
        let output = self.run(&[&["-o", path.to_str().unwrap()], arguments].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    #[track_caller]
    fn refused(&self, arguments: &[&str], words: &[&str]) {
        let path = self.path("refused.bkpack");
        let output = self.run(&[&["-o", path.to_str().unwrap()], arguments].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        let line = message.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} not all in {message}");
        assert!(!path.exists());
    }

    fn open(&self, name: &str) -> PackedFile {
        PackedFile::open(&self.path(name)).unwrap()
    }

    /// Component and encoding of every tensor.
    fn encodings(&self, name: &str) -> BTreeMap<String, (String, String)> {
        let packed = self.open(name);
        let tensors = packed.tensors().iter();
        tensors.map(|tensor| (tensor.name.clone(), (tensor.component.clone(), tensor.encoding.to_string()))).collect()
    }

    fn policy(&self, name: &str) -> Value {
        self.open(name).manifest().policy.clone()
    }

    /// The names that policies decide about.
    fn matrices(&self) -> Vec<String> {
        let checkpoint = checkpoint::open(&self.source).unwrap();
        let architecture = checkpoint.config().and_then(|config| config["architectures"][0].as_str());
        let rules = ComponentRules::builtin();
        let matrix = |name: &&String| {
            rules.component(architecture, name, checkpoint.shape(name).unwrap()) != PLAIN && *name != "lm_head.weight"
        };
        checkpoint.names().iter().filter(matrix).cloned().collect()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A checkpoint of one file of F32: a head whose largest value is `largest`, an expert, a vector.
fn wide(largest: f32) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let mut random = Random(5);
    let mut values: Vec<f32> = (0..64 * 64).map(|_| random.weight()).collect();
    values[100] = largest;
    let tensors = [
        Stored::of("lm_head.weight", "F32", &[64, 64], &values),
        Stored::random("mlp.experts.0.weight", "F32", &[64, 64], 1.0, &mut random),
        Stored::random("norm.weight", "F32", &[64], 1.0, &mut random),
    ];
    let path = folder.path().join("model.safetensors");
    std::fs::write(&path, safetensors(&tensors)).unwrap();
    (folder, path)
}

#[test]
fn components_decide() {
    for (name, count) in [("resnet_bk", 4), ("mixtral", 3), ("mixtral_stacked", 3)] {
        let case = Case::architecture(name);
        let said = case.convert("model.bkpack", &["--policy", "component"]);
        let mut seen = BTreeMap::new();
        for (tensor, (component, encoding)) in case.encodings("model.bkpack") {
            let expected = match component.as_str() {
                // Two columns: codes and a scale would take more bytes than the BF16 of the source.
                "bk_core" if tensor.contains("output_proj") => "BF16",
                "expert" => "INT4 g128",
                "bk_core" | "other" => "INT8 g128",
                // The source is BF16, which takes as many bytes and loses nothing.
                "embedding" | "output" | "plain" => "BF16",
                other => panic!("{tensor} is {other}"),
            };
            assert_eq!(encoding, expected, "{tensor}, {component}");
            *seen.entry(component).or_insert(0) += 1;
        }
        seen.remove("plain");
        assert!(seen.len() >= count && seen.contains_key("expert"), "{seen:?}");
        assert!(said.contains("kept as BF16 where the policy says FP16"), "{said}");
        let policy = case.policy("model.bkpack");
        assert_eq!((&policy["name"], &policy["encodings"]["expert"]), (&json!("component"), &json!("int4:g128")));
    }
}

#[test]
fn a_policys_fp16_never_loses_range() {
    let (_folder, source) = wide(3.0);
    let case = Case::new(&source);
    case.convert("model.bkpack", &["--policy", "component"]);
    assert_eq!(case.encodings("model.bkpack")["lm_head.weight"].1, "FP16");
    assert_eq!(case.encodings("model.bkpack")["mlp.experts.0.weight"].1, "INT4 g128");
    assert_eq!(case.encodings("model.bkpack")["norm.weight"].1, "FP32");

    let (_folder, source) = wide(70000.0);
    let case = Case::new(&source);
    let said = case.convert("model.bkpack", &["--policy", "component"]);
    assert!(said.contains("lm_head.weight holds 70000, which FP16 cannot hold"), "{said}");
    assert_eq!(case.encodings("model.bkpack")["lm_head.weight"].1, "BF16");
    // What the user names is done or refused.
    case.refused(&["--policy", "component", "--tensor", "head=fp16"], &["lm_head.weight", "70000", "F16"]);
    case.refused(&["--bits", "16"], &["lm_head.weight", "70000", "F16"]);
}

#[test]
fn a_users_rules_and_exceptions_stand_above_the_table() {
    let case = Case::architecture("mixtral");
    let rules = case.write(
        "rules.toml",
        "[encodings]\nexpert = \"int3:row\"\nvalue = \"int6:row\"\n[[rule]]\ncomponent = \"value\"\npattern = 'q_proj'\n",
    );
    case.convert(
        "model.bkpack",
        &["--policy", "component", "--rules", &rules, "--keep", "experts.0", "--tensor", "o_proj=int2:row"],
    );
    let encodings = case.encodings("model.bkpack");
    let of = |name: &str| {
        let (component, encoding) = &encodings[&format!("model.layers.1.{name}.weight")];
        (component.as_str(), encoding.as_str())
    };
    assert_eq!(of("self_attn.q_proj"), ("value", "INT6 g32"));
    assert_eq!(of("self_attn.o_proj"), ("other", "INT2 g32"));
    assert_eq!(of("block_sparse_moe.experts.0.w1"), ("expert", "BF16"));
    assert_eq!(of("block_sparse_moe.experts.1.w1"), ("expert", "INT3 g32"));
    let record = case.policy("model.bkpack");
    assert_eq!(record["rules"]["name"], "rules.toml");
    assert_eq!(record["rules"]["blake3"], blake3::hash(&std::fs::read(&rules).unwrap()).to_hex().as_str());
    let broken = case.write("broken.toml", "[encodings]\n\nexpert = \"int9\"\n");
    case.refused(&["--policy", "component", "--rules", &broken], &["broken.toml", "line 3", "expert", "int9"]);
}

/// An importance list of a model's matrices, whose scores fall in the order of the names.
fn importance(names: &[String]) -> Value {
    let entry = |(index, name): (usize, &String)| {
        json!({
            "name": name, "component": "other", "gradient": 1.0, "output_variance": 1.0, "weight": 1.0,
            "score": -(index as f64) / 7.0,
        })
    };
    json!({
        "version": 1,
        "model": { "name": "llama", "blake3": "11" },
        "text": { "name": "text.txt", "blake3": "00" },
        "batches": 3,
        "ctx": 128,
        "tensors": names.iter().enumerate().map(entry).collect::<Vec<_>>(),
    })
}

#[test]
fn importance_decides() {
    let case = Case::new(fixture());
    let names = case.matrices();
    assert_eq!(names.len(), 43);
    let list = case.write("importance.json", &importance(&names).to_string());
    for (extra, [high, middle, low], [first, last]) in [
        (&[][..], ["BF16", "INT8 g128", "INT4 g128"], [9, 17]),
        (
            &["--high-ratio", "0.1", "--low-ratio", "0.5", "--high", "int8", "--group-size", "64"],
            ["INT8 g64", "INT8 g64", "INT4 g64"],
            [4, 22],
        ),
    ] {
        case.convert("model.bkpack", &[&["--force", "--policy", "dynamic", "--importance", &list], extra].concat());
        let encodings = case.encodings("model.bkpack");
        for (rank, name) in names.iter().enumerate() {
            let expected = match rank {
                rank if rank < first => high,
                rank if rank >= names.len() - last => low,
                _ => middle,
            };
            assert_eq!(encodings[name].1, expected, "{name} of rank {rank}");
        }
        let policy = case.policy("model.bkpack");
        assert_eq!((&policy["name"], &policy["importance"]["name"]), (&json!("dynamic"), &json!("importance.json")));
    }

    let lacking = case.write("lacking.json", &importance(&names[1..]).to_string());
    let dynamic = |list: &'static str| ["--policy", "dynamic", "--importance", list];
    case.refused(&["--policy", "dynamic", "--importance", &lacking], &["lacking.json", &names[0]]);
    let unknown = case.write("unknown.json", &importance(&[&names[..], &["zz".into()]].concat()).to_string());
    case.refused(&["--policy", "dynamic", "--importance", &unknown], &["unknown.json", "\"zz\""]);
    case.refused(&["--policy", "dynamic"], &["--importance"]);
    case.refused(&dynamic("nowhere.json"), &["nowhere.json"]);
    case.refused(&["--policy", "dynamic", "--importance", &list, "--bits", "4"], &["--bits", "--policy uniform"]);
    case.refused(&["--policy", "dynamic", "--importance", &list, "--low-ratio", "0.9"], &["--low-ratio"]);
}

#[test]
fn a_plan_is_a_recipe_that_packs_the_same() {
    let case = Case::new(fixture());
    let importance = case.write("importance.json", &importance(&case.matrices()).to_string());
    for (index, policy) in [
        &["--bits", "3", "--asymmetric", "--group-size", "64", "--keep", "embed"][..],
        &["--policy", "component", "--tensor", "layers.0=ternary:row"],
        &["--policy", "dynamic", "--importance", &importance],
    ]
    .into_iter()
    .enumerate()
    {
        let name = |kind: &str| format!("{index}.{kind}");
        case.convert(&name("direct"), policy);
        case.convert(&name("toml"), &[policy, &["--plan-only", "-q"]].concat());
        let plan = case.path(&name("toml"));
        case.convert(&name("planned"), &["--recipe", text(&plan)]);
        let (direct, planned) = (case.open(&name("direct")), case.open(&name("planned")));
        let recipe = std::fs::read_to_string(&plan).unwrap();
        let content = |packed: &PackedFile| -> Vec<_> {
            let parts = |tensor: &PackedTensor| tensor.parts.iter().map(|part| part.hash).collect::<Vec<_>>();
            packed.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.encoding, parts(tensor))).collect()
        };
        assert_eq!(content(&direct), content(&planned));
        assert!(recipe.contains(&format!("# the packed file: {} bytes", direct.file_bytes())), "{recipe}");
        let record = case.policy(&name("planned"));
        assert_eq!(record["recipe"]["blake3"], blake3::hash(recipe.as_bytes()).to_hex().as_str());

        // A plan of the recipe is the recipe, but for what it says of its policy.
        let again = case.run(&["--recipe", text(&plan), "--plan-only"]);
        let body = |text: &str| text[text.find("[tensors]").unwrap()..].trim_end().to_owned();
        assert_eq!(body(&String::from_utf8(again.stdout).unwrap()), body(&recipe));

        std::fs::write(&plan, recipe.replace("'model.layers.3.mlp.up_proj.weight'", "'zz'")).unwrap();
        case.refused(&["--recipe", text(&plan)], &["toml: line ", "\"zz\""]);
        std::fs::write(&plan, recipe.replacen("= \"int", "= \"inn", 1)).unwrap();
        case.refused(&["--recipe", text(&plan)], &["toml: line ", "inn"]);
        let lines: Vec<&str> = recipe.lines().filter(|line| !line.contains("layers.2.mlp.down")).collect();
        std::fs::write(&plan, lines.join("\n")).unwrap();
        case.refused(&["--recipe", text(&plan)], &["layers.2.mlp.down_proj.weight", "no encoding"]);
    }
    case.refused(&["--recipe", "x.toml", "--plan-only", "--bits", "3"], &["--bits"]);
}

/// Costs as they are met: less for each bit, more for larger matrices, and each tensor differs.
fn sensitivity(case: &Case) -> Value {
    let checkpoint = checkpoint::open(&case.source).unwrap();
    let mut random = Random(11);
    let entry = |name: String| {
        let shape = checkpoint.shape(&name).unwrap();
        let weight = f64::from(random.weight()).exp() * (shape[0] * shape[1]) as f64;
        let options = candidates(shape[1]).into_iter().map(|request| {
            let text = request.to_string();
            let bits: f64 = text.trim_start_matches("int").split(':').next().unwrap().parse().unwrap_or(16.0);
            let finer = if text.contains("g32") { 0.5 } else { 0.0 } + if text.contains("asym") { 0.3 } else { 0.0 };
            let noise = 1.0 + 0.05 * f64::from(random.weight());
            json!({ "encoding": text, "cost": weight * (-1.386 * (bits + finer)).exp() * noise })
        });
        let options: Vec<Value> = options.collect();
        json!({ "name": name, "options": options })
    };
    json!({ "version": 1, "tensors": case.matrices().into_iter().map(entry).collect::<Vec<_>>() })
}

#[test]
fn budgets_are_met_from_below() {
    let case = Case::new(fixture());
    let table = case.write("costs.json", &sensitivity(&case).to_string());
    let parameters = checkpoint::open(&case.source).unwrap().parameters() as f64;
    let mut random = Random(2);
    let budget = |target: [&str; 2], extra: &[&str]| {
        case.convert(
            "model.bkpack",
            &[&["--force", "-q", "--policy", "budget", "--sensitivity", &table], &target[..], extra].concat(),
        );
        case.path("model.bkpack").metadata().unwrap().len() as f64
    };
    for turn in 0..10 {
        let asked = 2_200_000.0 + random.below(6_000_000) as f64;
        let (option, value, target) = match turn % 3 {
            0 => ("--target-size", asked.to_string(), asked),
            1 => ("--target-bpw", (8.0 * asked / parameters).to_string(), asked),
            _ => ("--target-ratio", (4.0 * parameters / asked).to_string(), asked),
        };
        let bytes = budget([option, &value], if turn % 2 == 0 { &[] } else { &["--coupled"] });
        assert!(bytes <= target + 1.0 && bytes >= 0.995 * target, "{option} {value}: {bytes} of {target}");
        if turn % 2 == 1 {
            let encodings = case.encodings("model.bkpack");
            let of = |name: &str| &encodings[&format!("model.layers.2.{name}_proj.weight")].1;
            assert_eq!((of("self_attn.q"), of("mlp.gate")), (of("self_attn.v"), of("mlp.up")));
        }
    }
    // More room costs less.
    let cost = |target: &str| {
        let plan = case.run(&["--policy", "budget", "--sensitivity", &table, "--target-size", target, "--plan-only"]);
        let plan = String::from_utf8(plan.stdout).unwrap();
        let line = plan.lines().find_map(|line| line.strip_prefix("# predicted cost: ")).unwrap().to_owned();
        line.parse::<f64>().unwrap()
    };
    assert!(cost("2500KB") > cost("3MB") && cost("3MB") > cost("6MB"));

    let exceptions = ["--keep", "embed", "--tensor", "layers.0=int5:g64"];
    let bytes = budget(["--target-size", "5MB"], &exceptions);
    assert!((0.995 * 5e6..=5e6).contains(&bytes), "{bytes}");
    let encodings = case.encodings("model.bkpack");
    assert_eq!(encodings["model.embed_tokens.weight"].1, "BF16");
    assert_eq!(encodings["model.layers.0.self_attn.q_proj.weight"].1, "INT5 g64");
}

#[test]
fn what_no_budget_allows_is_refused() {
    let case = Case::new(fixture());
    let mut table = sensitivity(&case);
    let costs = case.write("costs.json", &table.to_string());
    let budget = ["--policy", "budget", "--sensitivity", &costs];
    // The floor that is named is the smallest file that there is.
    let output = case.run(&[&budget[..], &["--target-size", "1MB", "--plan-only"]].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("1000000 bytes"), "{message}");
    let words: Vec<&str> = message.split(' ').collect();
    let floor: u64 = words[words.len() - 2].parse().unwrap();
    case.convert("floor.bkpack", &[&budget[..], &["--target-size", &floor.to_string()]].concat());
    assert_eq!(case.path("floor.bkpack").metadata().unwrap().len(), floor);
    let smallest = case.open("floor.bkpack");
    let two_bits = |encoding: &Encoding| matches!(encoding, Encoding::Int { bits: 2, symmetric: true, .. });
    assert!(smallest.tensors().iter().all(|tensor| tensor.component == PLAIN || two_bits(&tensor.encoding)));
    let less = (floor - 1).to_string();
    case.refused(&[&budget[..], &["--target-size", &less]].concat(), &[&floor.to_string(), &less]);

    case.refused(&budget, &["--target-ratio"]);
    case.refused(&["--policy", "budget", "--target-bpw", "4"], &["--sensitivity"]);
    case.refused(&[&budget[..], &["--target-ratio", "0"]].concat(), &["--target-ratio"]);
    case.refused(&["--target-ratio", "8"], &["--target-ratio", "--policy budget"]);
    let removed = table["tensors"].as_array_mut().unwrap().remove(3);
    let lacking = case.write("lacking.json", &table.to_string());
    let name = removed["name"].as_str().unwrap();
    case.refused(&["--policy", "budget", "--sensitivity", &lacking, "--target-bpw", "4"], &["lacking.json", name]);
}
