//! `bkpack report`: what a page holds, that it holds nothing else, and what is refused.

mod common;
#[path = "common/command.rs"]
mod output;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use common::{Random, Stored, safetensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What would run, load or end something if it came to a page as it is.
const HOSTILE: &str = "</script></title></style></table><script>alert(1)</script><img src=x onerror=alert(1)>\" '&lt;";

/// A folder in which the command runs.
struct Setup(TempDir);

impl Setup {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), text).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(cargo_bin("bkpack")).current_dir(self.0.path()).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn succeeded(&self, arguments: &[&str]) -> String {
        output::succeeded(&self.run(arguments))
    }

    /// Runs `bkpack report ARGUMENTS -o page.html` and reads the page.
    #[track_caller]
    fn page(&self, arguments: &[&str]) -> String {
        self.succeeded(&[&["report"], arguments, &["-o", "page.html", "--force"]].concat());
        std::fs::read_to_string(self.path("page.html")).unwrap()
    }

    #[track_caller]
    fn refused(&self, arguments: &[&str], words: &[&str]) {
        let before = self.names();
        output::refused(&self.run(&[&["report"], arguments].concat()), words);
        assert_eq!(self.names(), before, "something is left behind");
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The real checkpoint at 4 bits.
    fn pack(&self) {
        let fixture = common::fixture();
        let fixture = fixture.to_str().unwrap();
        self.succeeded(&["convert", fixture, "-o", "llama.bkpack", "-q", "--bits", "4", "--tensor", "v_proj=int6:g64"]);
    }

    fn inspect(&self, packed: &str) -> Value {
        serde_json::from_str(&self.succeeded(&["inspect", packed, "--json"])).unwrap()
    }
}

/// What a browser shows of a page, and every reference in it that it would follow to load something.
fn read(page: &str) -> (String, Vec<String>) {
    let (mut text, mut references) = (String::new(), Vec::new());
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        text.push_str(&rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        for attribute in [" src=\"", " href=\"", " action=\"", " data=\"", " srcset=\"", " poster=\""] {
            if let Some((_, value)) = tag.split_once(attribute) {
                references.push(value.split('"').next().unwrap().to_owned());
            }
        }
        rest = &rest[end + 1..];
        let name = tag.split([' ', '/']).next().unwrap();
        match name {
            "style" | "script" => {
                let close = rest.find(&format!("</{name}>")).expect("it is closed");
                references.extend(
                    rest[..close].match_indices("url(").map(|(at, _)| {
                        rest[at + 4..close].trim_start_matches('\'').chars().take(20).collect::<String>()
                    }),
                );
                assert!(!rest[..close].contains("@import") && !rest[..close].contains("fetch("));
                rest = &rest[close..];
            }
            // A place to break a line at is none between words.
            "wbr" | "/code" | "code" => {}
            _ => text.push(' '),
        }
    }
    for (escape, character) in [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")] {
        text = text.replace(escape, character);
    }
    (text.split_whitespace().collect::<Vec<_>>().join(" "), references)
}

#[track_caller]
fn assert_self_contained(references: &[String]) {
    let own = |reference: &&String| reference.starts_with('#') || reference.starts_with("data:");
    let foreign: Vec<&String> = references.iter().filter(|reference| !own(reference)).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}

#[test]
fn a_packed_file_is_shown_with_its_quality_tensors_and_hashes() {
    let setup = Setup::new();
    setup.pack();
    let (fixture, mut random) = (common::fixture(), Random(1));
    let ids: Vec<usize> = (0..512).map(|_| random.below(4096)).collect();
    setup.write("ids.json", &json!(ids).to_string());
    let eval = ["eval", "llama.bkpack", "--baseline", fixture.to_str().unwrap(), "--tokens", "ids.json"];
    let eval = setup.succeeded(&[&eval[..], &["--ctx", "128", "--json", "--by-component"]].concat());
    setup.write("eval.json", &eval);
    let eval: Value = serde_json::from_str(&eval).unwrap();

    let page = setup.page(&["llama.bkpack", "--eval", "eval.json"]);
    let (text, references) = read(&page);
    assert_self_contained(&references);
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("default-src 'none'"));
    let number = |key: &str| eval[key].as_f64().unwrap();
    for expected in [
        "llama.bkpack".to_owned(),
        "LlamaForCausalLM: 5,475,584 parameters in 56 tensors".into(),
        format!("perplexity {:.4}", number("ppl")),
        format!("KL divergence, mean {:.6}", number("kld_mean")),
        format!("same top token {:.2} %", 100.0 * number("top1_agreement")),
        "508 positions scored in 4 windows of 128 tokens, of each all but the first 1; text ids.json".into(),
        "One encoding for every matrix, int4:g128.".into(),
        "--tensor 'v_proj=int6:g64' INT6 g64 6".into(),
        "KLD alone".into(),
    ] {
        assert!(text.contains(&expected), "{expected:?} is not in: {text}");
    }
    let inspected = setup.inspect("llama.bkpack");
    for tensor in inspected["tensors"].as_array().unwrap() {
        let name = tensor["name"].as_str().unwrap();
        assert!(text.contains(name), "{name}");
        for part in tensor["parts"].as_array().unwrap() {
            assert!(text.contains(part["blake3"].as_str().unwrap()), "the hash of {part}");
        }
    }
    assert_eq!(page.matches("<svg ").count(), 1);
    let source = &inspected["source"]["files"][0];
    for hash in [&source["blake3"], &eval["seals"][0], &eval["text"]["blake3"]] {
        assert!(text.contains(hash.as_str().unwrap()), "{hash}");
    }
    assert_eq!(page, setup.page(&["llama.bkpack", "--eval", "eval.json"]), "the same in every run");

    // JSON has no infinity: an overflow is printed as null, which is not the same as nothing.
    let mut infinite = eval.clone();
    for key in ["ppl", "baseline_ppl", "ppl_increase_percent"] {
        infinite[key] = Value::Null;
    }
    setup.write("infinite.json", &infinite.to_string());
    let (text, _) = read(&setup.page(&["llama.bkpack", "--eval", "infinite.json"]));
    for expected in ["perplexity not finite", "baseline perplexity not finite", "increase not finite"] {
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
    }
    infinite.as_object_mut().unwrap().remove("ppl");
    setup.write("infinite.json", &infinite.to_string());
    setup.refused(&["llama.bkpack", "--eval", "infinite.json", "-o", "x.html"], &["infinite.json", "ppl"]);

    // An evaluation of another file, of the same shapes even, is not shown as one of this.
    let fixture = fixture.to_str().unwrap();
    setup.succeeded(&["convert", fixture, "-o", "other.bkpack", "-q", "--bits", "4", "--rounding", "rtn"]);
    setup.refused(&["other.bkpack", "--eval", "eval.json", "-o", "x.html"], &["eval.json", "another model"]);
    let mut old = eval.clone();
    old.as_object_mut().unwrap().remove("seals");
    setup.write("old.json", &old.to_string());
    let (text, _) = read(&setup.page(&["llama.bkpack", "--eval", "old.json"]));
    assert!(text.contains("does not name what was measured"), "{text}");
    old["file_bytes"] = json!(1);
    setup.write("old.json", &old.to_string());
    setup.refused(&["llama.bkpack", "--eval", "old.json", "-o", "x.html"], &["old.json", "another model"]);
}

#[test]
fn results_are_shown_with_figures_requirements_protocols_and_marks() {
    let setup = Setup::new();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results");
    let (widths, compute) = (docs.join("quantization"), docs.join("efficiency"));
    let page = setup.page(&[widths.to_str().unwrap(), compute.to_str().unwrap(), "--title", "Three models & one"]);
    let (text, references) = read(&page);
    assert_self_contained(&references);
    assert_eq!(page.matches("<svg ").count(), 2);
    assert!(page.contains("<title>Three models &amp; one</title>"));
    let result: Value = serde_json::from_slice(&std::fs::read(widths.join("mamba_quant_int4.json")).unwrap()).unwrap();
    for expected in [
        "req_7_2_int8_degradation_lt_5pct",
        "req_8_11_30pct_lower_ppl_at_equal_flops",
        "PASS",
        "FAIL",
        "mamba_config_1",
        result["hashes"]["packed"].as_str().unwrap(),
        result["hashes"]["source"].as_str().unwrap(),
        result["protocol"]["text"]["blake3"].as_str().unwrap(),
        "32,640 positions scored in 128 windows of 256 tokens",
        "the models were measured in 2 ways",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
    }
    assert!(!text.contains("SIMULATED") && !text.contains("LOOKS AHEAD"));

    let marked = json!({"bit_width": 8, "perplexity": 20.5, "model": "m", "simulated": true, "looks_ahead": true});
    let encoded = json!({"bit_width": 4, "perplexity": 21.5, "model": "n", "encoding": "int4:g64:asym"});
    setup.write("marked/d.json", &encoded.to_string());
    setup.write("marked/a.json", &marked.to_string());
    setup.write("marked/b.json", r#"{"bit_width": 4, "perplexity": NaN, "model": "m", "failure": "it computes NaN"}"#);
    setup.write("marked/c.json", "{");
    let (text, _) = read(&setup.page(&["marked"]));
    for expected in
        ["20.5000 LOOKS AHEAD SIMULATED", "SIMULATED: Perplexity", "it computes NaN", "c.json: EOF", "int4:g64:asym"]
    {
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
    }
    let marked = json!({"config_id": "only", "flops_per_token": 5e6, "perplexity": null, "model": "m"});
    setup.write("broken.json", &marked.to_string());
    let page = setup.page(&["broken.json"]);
    assert!(page.contains("not finite") && !page.contains("<svg "), "there is nothing to draw");
}

#[test]
fn a_packed_file_and_results_share_a_page() {
    let setup = Setup::new();
    setup.pack();
    setup.write("results/a.json", r#"{"bit_width": 4, "perplexity": 20.5, "model": "llama"}"#);
    let page = setup.page(&["results", "llama.bkpack"]);
    assert!(page.contains("id=\"tensor-table\"") && page.contains("id=\"width-table\""));
    let ids: Vec<&str> = page.split(" id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    for target in page.split("href=\"#").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(ids.contains(&target), "#{target} is nowhere");
    }
}

#[test]
fn policies_activations_and_marks_are_said_in_words() {
    let setup = Setup::new();
    let model = |name: &str| format!("{}/fixtures/architectures/{name}", env!("CARGO_MANIFEST_DIR"));
    setup.write("ids.json", &json!((0..91).collect::<Vec<u32>>()).to_string());
    setup.succeeded(&["convert", &model("mixtral"), "-o", "a.bkpack", "-q", "--policy", "component"]);
    let (text, _) = read(&setup.page(&["a.bkpack"]));
    assert!(text.contains("The component of a tensor decides: ") && text.contains("expert int4:g128"), "{text}");

    setup.succeeded(&["convert", &model("resnet_bk_lookahead"), "-o", "b.bkpack", "-q"]);
    let eval = ["eval", "b.bkpack", "--tokens", "ids.json", "--ctx", "64", "--allow-lookahead", "--json"];
    setup.write("eval.json", &setup.succeeded(&eval));
    let (text, _) = read(&setup.page(&["b.bkpack", "--eval", "eval.json"]));
    let perplexity = text.split("perplexity ").nth(1).unwrap();
    let number = perplexity.split(' ').next().unwrap();
    assert!(perplexity.starts_with(&format!("{number} LOOKS AHEAD ")), "the number carries its mark: {perplexity}");
    assert!(text.contains("LOOKS AHEAD; no baseline"), "so does the one on top");

    setup.succeeded(&["convert", &model("resnet_bk"), "-o", "c.bkpack", "-q"]);
    let calibrate = ["calibrate", "c.bkpack", "--tokens", "ids.json", "--activations", "bk_core=int8"];
    setup.succeeded(&[&calibrate[..], &["--samples", "1", "-q"]].concat());
    let (text, _) = read(&setup.page(&["c.bkpack"]));
    assert!(text.contains("calibrated on bk_core INT8 1 64 1 ids.json"), "{text}");
    setup.succeeded(&["synth", "--preset", "resnet-bk", "-o", "random", "-q", "--layers", "1"]);
    setup.succeeded(&["convert", "random", "-o", "d.bkpack", "-q", "--bits", "2", "--rounding", "rtn"]);
    assert!(read(&setup.page(&["d.bkpack"])).0.contains("RANDOM WEIGHTS."));
}

#[test]
fn nothing_from_a_file_is_taken_for_markup() {
    let setup = Setup::new();
    let mut random = Random(7);
    let names: Vec<String> = (0..3).map(|index| format!("{HOSTILE}.layers.{index}.w.weight")).collect();
    let tensors: Vec<Stored> =
        names.iter().map(|name| Stored::random(name, "F32", &[64, 64], 0.1, &mut random)).collect();
    std::fs::write(setup.path("hostile.safetensors"), safetensors(&tensors)).unwrap();
    let config = json!({"architectures": [HOSTILE], "hidden_act": HOSTILE, HOSTILE: {HOSTILE: "</script>\u{202e}"}});
    setup.write("config.json", &config.to_string());
    setup.succeeded(&["convert", "hostile.safetensors", "--config", "config.json", "-o", "hostile.bkpack", "-q"]);
    let result = json!({
        "bit_width": 8, "perplexity": 20.5, "model": HOSTILE, "encoding": format!("width {HOSTILE}"), "hashes": {"packed": HOSTILE},
        "protocol": {"text": {"name": HOSTILE, "blake3": HOSTILE}, "activations": HOSTILE},
    });
    setup.write("results/width.json", &result.to_string());
    let result = json!({"config_id": HOSTILE, "flops_per_token": 5e6, "perplexity": 20.5, "model": HOSTILE});
    setup.write("results/compute.json", &result.to_string());
    setup.write(
        "results/failed.json",
        &json!({"bit_width": 4, "perplexity": null, "model": HOSTILE, "failure": HOSTILE}).to_string(),
    );
    let page = setup.page(&["hostile.bkpack", "results", "--title", HOSTILE]);
    assert!(!page.contains("<img") && !page.contains("alert(1)</script>") && !page.contains('\u{202e}'));
    for tag in ["<script", "</script>", "<title>", "</title>", "<style", "</style>"] {
        assert_eq!(page.matches(tag).count(), 1, "{tag}");
    }
    let (text, references) = read(&page);
    assert_self_contained(&references);
    assert!(text.contains("<script>alert(1)</script>") && text.contains("width <"), "{text}");
}

#[test]
fn wrong_use_is_refused_in_a_sentence_and_leaves_nothing() {
    let setup = Setup::new();
    setup.pack();
    std::fs::copy(setup.path("llama.bkpack"), setup.path("second.bkpack")).unwrap();
    setup.write("results/a.json", r#"{"bit_width": 4, "perplexity": 20.5, "model": "llama"}"#);
    setup.write("empty/readme.txt", "no results");
    setup.write("text.txt", "no model");
    setup.write("eval.json", r#"{"ppl": 3.5}"#);
    setup.write("page.html", "mine");
    for (arguments, words) in [
        (vec!["llama.bkpack", "-o", "page.html"], &["page.html", "--force"][..]),
        (vec!["llama.bkpack", "-o", "llama.bkpack", "--force"], &["the input itself"]),
        (vec!["results", "-o", "results/a.json", "--force"], &["the input itself"]),
        (vec!["llama.bkpack", "-o", "none/x.html"], &["none", "does not exist"]),
        (vec!["llama.bkpack", "second.bkpack", "-o", "x.html"], &["second.bkpack", "one packed file"]),
        (vec!["empty", "-o", "x.html"], &["empty", "holds no result"]),
        (vec!["absent", "-o", "x.html"], &["absent"]),
        (vec!["absent.json", "-o", "x.html"], &["absent.json"]),
        (vec!["text.txt", "-o", "x.html"], &["text.txt", "no packed file"]),
        (vec!["results", "--eval", "eval.json", "-o", "x.html"], &["--eval", "packed file"]),
        (
            vec!["llama.bkpack", "--eval", "eval.json", "-o", "x.html"],
            &["eval.json", "bkpack eval --json", "missing field"],
        ),
        (vec!["llama.bkpack", "--eval", "results/a.json", "-o", "x.html"], &["a.json", "bkpack eval --json"]),
        (vec!["llama.bkpack", "--eval", "text.txt", "-o", "x.html"], &["text.txt"]),
    ] {
        setup.refused(&arguments, words);
    }
    assert_eq!(std::fs::read(setup.path("page.html")).unwrap(), b"mine");
    let mut bytes = std::fs::read(setup.path("second.bkpack")).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(setup.path("second.bkpack"), bytes).unwrap();
    setup.refused(&["second.bkpack", "-o", "x.html"], &["second.bkpack", "BLAKE3"]);
    let output = setup.succeeded(&["report", "results", "-o", "page.html", "--force", "-q"]);
    assert_eq!(output, "", "--quiet");
}
