//! `bkpack verify --spec`: every kind of target, its verdict, and what a broken file of targets gets.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")
}

/// A file of targets in a folder with results, and the command on it.
struct Setup {
    folder: TempDir,
}

impl Setup {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let setup = Self { folder };
        // The documents' own schema, and their own example figures.
        for (model, width, ppl) in [
            ("resnetbk", 32, 30.25),
            ("resnetbk", 8, 31.52),
            ("resnetbk", 4, 34.36),
            ("mamba", 32, 32.99),
            ("mamba", 8, 38.10),
            ("mamba", 4, 211.05),
        ] {
            let result = json!({ "bit_width": width, "perplexity": ppl, "model": model });
            setup.write(&format!("{model}_{width}.json"), &result.to_string());
        }
        setup
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    fn verify(&self, spec: &str, arguments: &[&str]) -> Output {
        self.write("targets.toml", spec);
        let mut command = Command::new(cargo_bin("bkpack"));
        command.arg("verify").arg("--spec").arg(self.path().join("targets.toml")).args(arguments);
        command.output().unwrap()
    }

    #[track_caller]
    fn verdicts(&self, spec: &str, arguments: &[&str], status: i32) -> Vec<Value> {
        let output = self.verify(spec, &[arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["passed"], json!(status == 0));
        report["checks"].as_array().unwrap().clone()
    }

    #[track_caller]
    fn refused(&self, spec: &str, arguments: &[&str], words: &[&str]) {
        let output = self.verify(spec, arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{spec}: {message}");
        assert!(message.starts_with("error: ") && message.trim_end().lines().count() == 1, "{message}");
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }
}

const MEASUREMENTS: &str = r#"
version = 1
[measurements]
rb8 = { result = "resnetbk_8.json", baseline = "resnetbk_32.json" }
rb4 = { result = "resnetbk_4.json", baseline = "resnetbk_32.json" }
m8 = { result = "mamba_8.json", baseline = "mamba_32.json" }
m4 = { result = "mamba_4.json", baseline = "mamba_32.json" }
"#;

fn target(id: &str, rest: &str) -> String {
    format!("[[targets]]\nid = \"{id}\"\n{rest}\n")
}

#[test]
fn the_documents_example_figures_get_the_documents_verdicts() {
    let setup = Setup::new();
    let spec = [
        MEASUREMENTS.to_owned(),
        target("req_7_2", "metric = \"ppl_increase_percent\"\nof = \"rb8\"\nbelow = 5"),
        target("req_7_6", "metric = \"ppl_increase_percent\"\nof = \"rb4\"\nbelow = 15"),
        target("req_8_6", "metric = \"ppl\"\nof = \"rb4\"\nbelow = 50"),
        target("req_8_7", "metric = \"ppl\"\nof = \"m4\"\nabove = 200"),
        target("req_7_8", "metric = \"ppl_increase_percent\"\nof = \"m8\"\nminus = \"rb8\"\nat_least = 10"),
        target("req_7_9", "metric = \"ppl\"\nof = \"m4\"\ndivided_by = \"rb4\"\nat_least = 4"),
    ]
    .concat();
    let verdicts = setup.verdicts(&spec, &[], 0);
    let measured: Vec<f64> = verdicts.iter().map(|check| check["verdict"]["measured"].as_f64().unwrap()).collect();
    let degradation = |ppl: f64, of: f64| 100.0 * (ppl / of - 1.0);
    let expected = [
        degradation(31.52, 30.25),
        degradation(34.36, 30.25),
        34.36,
        211.05,
        degradation(38.10, 32.99) - degradation(31.52, 30.25),
        211.05 / 34.36,
    ];
    for (measured, expected) in measured.iter().zip(expected) {
        assert!((measured - expected).abs() < 1e-9, "{measured} {expected}");
    }
    let first = &verdicts[0];
    assert_eq!(first["name"], "req_7_2");
    assert_eq!(first["target"], "ppl_increase_percent of rb8 < 5");
    assert_eq!(first["measured"], "4.19835");
    assert_eq!((&first["verdict"]["comparison"], &first["verdict"]["threshold"]), (&json!("<"), &json!(5.0)));
}

#[test]
fn bounds_include_or_exclude_their_own_value() {
    let setup = Setup::new();
    for (bound, passes) in [("below", false), ("at_most", true), ("above", false), ("at_least", true)] {
        let spec = MEASUREMENTS.to_owned() + &target("t", &format!("metric = \"ppl\"\nof = \"rb8\"\n{bound} = 31.52"));
        let verdicts = setup.verdicts(&spec, &[], i32::from(!passes));
        assert_eq!(verdicts[0]["passed"], json!(passes), "{bound}");
    }
}

#[test]
fn one_that_fails_fails_the_command_and_only_chooses() {
    let setup = Setup::new();
    let spec = MEASUREMENTS.to_owned()
        + &target("good", "metric = \"ppl\"\nof = \"rb8\"\nbelow = 50")
        + &target("bad", "metric = \"ppl\"\nof = \"m4\"\nbelow = 50")
        + &target("missing", "metric = \"kld_mean\"\nof = \"m4\"\nbelow = 50");
    let output = setup.verify(&spec, &["--only", "good", "--only", "bad"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    assert!(lines.iter().any(|line| line.starts_with("PASS  good")), "{text}");
    assert!(lines.iter().any(|line| line.starts_with("FAIL  bad") && line.ends_with("211.050")), "{text}");
    setup.verdicts(&spec, &["--only", "good"], 0);
    setup.refused(&spec, &["--only", "other"], &["targets.toml", "has no target other"]);
    setup.refused(&spec, &[], &["line 7", "measurement m4", "mamba_4.json", "\"kld_mean\""]);
}

#[test]
fn configurations_are_compared_at_equal_perplexity_and_at_equal_flops() {
    let setup = Setup::new();
    let folder = setup.path().join("efficiency");
    std::fs::create_dir(&folder).unwrap();
    let configurations = [
        ("resnetbk", 0, json!(28.0), 5e9),
        ("resnetbk", 1, json!(30.0), 2e9),
        ("resnetbk", 2, json!(null), 1e9),
        ("mamba", 0, json!(29.0), 10e9),
        ("mamba", 1, json!(33.0), 5e9),
    ];
    for (model, index, ppl, flops) in configurations {
        let id = format!("{model}_config_{index}");
        let result = json!({ "config_id": id, "model": model, "perplexity": ppl, "flops_per_token": flops });
        std::fs::write(folder.join(format!("{id}.json")), result.to_string()).unwrap();
    }
    // A file of another kind beside them is none of the configurations.
    std::fs::write(folder.join("summary.json"), "{}").unwrap();
    let measurements = "version = 1\n[measurements]\n\
        rb = { configurations = \"efficiency\", model = \"resnetbk\" }\n\
        m = { configurations = \"efficiency\", model = \"mamba\" }\n";
    let of = |metric: &str, at: &str, bound: &str| {
        let rest = format!("metric = \"{metric}\"\nat = {at}\nof = \"m\"\ndivided_by = \"rb\"\n{bound}");
        measurements.to_owned() + &target("t", &rest)
    };
    let measured = |spec: &str, status| setup.verdicts(spec, &[], status)[0]["verdict"]["measured"].clone();
    assert_eq!(measured(&of("least_flops_at_ppl", "30", "at_least = 2"), 0), json!(5.0));
    assert_eq!(measured(&of("least_ppl_at_flops", "5e9", "at_least = 1.3"), 1), json!(33.0 / 28.0));
    // No configuration reaches it: a failure that says so, not a number.
    let spec = of("least_flops_at_ppl", "28.5", "at_least = 2");
    let verdicts = setup.verdicts(&spec, &[], 1);
    assert_eq!(verdicts[0]["verdict"]["measured"], Value::Null);
    assert_eq!(verdicts[0]["measured"], "no configuration of m has a perplexity of at most 28.5");
    setup.refused(
        &of("least_flops_at_ppl", "30", "at_least = 2").replace("\"mamba\"", "\"other\""),
        &[],
        &["\"other\""],
    );
    std::fs::write(folder.join("broken.json"), "{\"config_id\": 1, \"config_id\": 2}").unwrap();
    setup.refused(&spec, &[], &["line", "broken.json"]);
}

#[test]
fn the_verified_file_is_measured_once_and_others_beside_it() {
    let setup = Setup::new();
    let packed = setup.path().join("model.bkpack");
    let mut convert = Command::new(cargo_bin("bkpack"));
    let output = convert.arg("convert").arg(fixture()).arg("-o").arg(&packed).arg("-q").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let ids: Vec<u32> = (0..256).map(|index| index * 37 % 4096).collect();
    setup.write("ids.json", &json!(ids).to_string());
    let spec = format!(
        "version = 1\n[measurements]\nother = {{ packed = \"model.bkpack\", baseline = {:?} }}\n",
        fixture().to_str().unwrap()
    ) + &target("size", "metric = \"ratio_fp32\"\nat_least = 6")
        + &target("loss", "metric = \"ppl_increase_percent\"\nbelow = 100")
        + &target("kld", "metric = \"kld_mean\"\nbelow = 0")
        + &target("same", "metric = \"ppl\"\nminus = \"other\"\nat_most = 0")
        + &target("bytes", "metric = \"file_bytes\"\nof = \"other\"\nat_most = 10e6");
    let packed = packed.to_str().unwrap().to_owned();
    let (fixture, ids) = (fixture(), setup.path().join("ids.json"));
    let measuring = ["--baseline", fixture.to_str().unwrap(), "--tokens", ids.to_str().unwrap(), "--ctx", "64"];
    let verdicts = setup.verdicts(&spec, &[&[packed.as_str()], &measuring[..]].concat(), 1);
    let found: Vec<_> =
        verdicts.iter().map(|check| (check["name"].as_str().unwrap(), check["passed"].clone())).collect();
    let [yes, no] = [true, false].map(Value::from);
    let expected = [("hashes", &yes), ("size", &yes), ("loss", &yes), ("kld", &no), ("same", &yes), ("bytes", &yes)];
    assert_eq!(found, expected.map(|(name, passed)| (name, passed.clone())));
    assert_eq!(verdicts[4]["verdict"]["measured"], json!(0.0));

    let size = "version = 1\n".to_owned() + &target("size", "metric = \"ratio_fp32\"\nat_least = 6");
    setup.verdicts(&size, &[&packed], 0);
    setup.refused(&size, &[], &["line 2", "name the packed file"]);
    setup.refused(&size, &[&[packed.as_str()], &measuring[..]].concat(), &["--spec"]);
    setup.refused(&spec, &[&packed], &["--baseline", "target"]);
    let other = target("other", "metric = \"ppl\"\nof = \"o\"\nbelow = 5");
    let other = format!("version = 1\n[measurements]\no = {{ packed = \"model.bkpack\" }}\n{other}");
    setup.refused(&other, &[], &["--text", "line 4"]);
    let missing = other.replace("model.bkpack", "absent.bkpack");
    setup.refused(&missing, &["--tokens", ids.to_str().unwrap()], &["absent.bkpack"]);
}

#[test]
fn simulated_and_invalid_figures_carry_their_mark_and_never_pass() {
    let setup = Setup::new();
    setup
        .write("s.json", r#"{"bit_width": 4, "perplexity": 30, "model": "m", "simulated": true, "looks_ahead": true}"#);
    let spec = "version = 1\nmeasurements.s.result = \"s.json\"\n".to_owned()
        + &target("t", "metric = \"ppl\"\nof = \"s\"\nbelow = 50");
    let verdicts = setup.verdicts(&spec, &[], 1);
    assert_eq!(verdicts[0]["measured"], "30.0000, SIMULATED; LOOKS AHEAD");
    assert_eq!(verdicts[0]["passed"], json!(false));
}

#[test]
fn results_that_were_measured_differently_are_not_compared() {
    let setup = Setup::new();
    let write = |name: &str, text: &str, ctx: u32| {
        let protocol = json!({ "text": { "name": "t", "blake3": text }, "ctx": ctx, "skip": 1, "scored": 1000 });
        let result = json!({ "perplexity": 30, "ratio_fp32": 4, "model": "m", "protocol": protocol });
        setup.write(name, &result.to_string());
    };
    let spec = |rest: &str| {
        let measurements = "version = 1\n[measurements]\n\
            a = { result = \"a.json\", baseline = \"b.json\" }\nb = { result = \"b.json\" }\n";
        measurements.to_owned() + &target("t", rest)
    };
    let comparing = [
        "metric = \"ppl\"\nof = \"a\"\nminus = \"b\"\nbelow = 1",
        "metric = \"ppl\"\nof = \"a\"\ndivided_by = \"b\"\nbelow = 2",
        "metric = \"ppl_increase_percent\"\nof = \"a\"\nbelow = 5",
    ];
    write("a.json", "0123", 256);
    for (text, ctx, differing) in [("4567", 256, "text \"0123\" and \"4567\""), ("0123", 512, "ctx 256 and 512")] {
        write("b.json", text, ctx);
        for rest in comparing {
            setup.refused(&spec(rest), &[], &["line 5", "a.json", "b.json", "do not compare", differing]);
        }
    }
    // A size, or a figure of one result alone, is what it is on any text.
    setup.verdicts(&spec("metric = \"ratio_fp32\"\nof = \"a\"\ndivided_by = \"b\"\nat_least = 1"), &[], 0);
    setup.verdicts(&spec("metric = \"ppl\"\nof = \"a\"\nbelow = 50"), &[], 0);
    write("b.json", "0123", 256);
    for rest in comparing {
        assert!(setup.verdicts(&spec(rest), &[], 0)[0]["verdict"].get("remark").is_none());
    }
    setup.write("b.json", r#"{"perplexity": 30, "model": "m"}"#);
    for rest in comparing {
        let verdicts = setup.verdicts(&spec(rest), &[], 0);
        let remark = verdicts[0]["verdict"]["remark"].as_str().unwrap();
        assert!(remark.contains("b.json does not say how it was measured"), "{remark}");
    }
}

#[test]
fn a_broken_file_of_targets_is_refused_with_its_line() {
    let setup = Setup::new();
    let with = |rest: &str| MEASUREMENTS.to_owned() + &target("t", rest);
    let line = "line 8";
    for (spec, words) in [
        (String::new(), &["version"][..]),
        ("version = 2\n".into(), &["line 1", "version 2"]),
        ("version = 1\n".into(), &["no targets"]),
        ("version = 1\nnonsense = 3\n".into(), &["line 2", "nonsense"]),
        ("version = 1\n[[targets]\n".into(), &["line 2"]),
        (with("metric = \"speed\"\nof = \"rb8\"\nbelow = 5"), &["line 10", "speed", "ppl_increase_percent"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nbelow = 5\nat_leats = 3"), &["line 13", "at_leats"]),
        (with("metric = \"ppl\"\nof = \"rb8\""), &[line, "one of below"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nbelow = 5\nabove = 3"), &[line, "one of below"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nbelow = nan"), &[line, "finite"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nbelow = inf"), &[line, "finite"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nbelow = \"5\""), &["line 12"]),
        (with("metric = \"ppl\"\nof = \"other\"\nbelow = 5"), &[line, "no measurement other"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nminus = \"rb4\"\ndivided_by = \"m4\"\nbelow = 5"), &[line, "minus"]),
        (with("metric = \"ppl\"\nof = \"rb8\"\nat = 3\nbelow = 5"), &[line, "at belongs"]),
        (with("metric = \"least_flops_at_ppl\"\nof = \"rb8\"\nbelow = 5"), &[line, "at belongs"]),
        (with("metric = \"least_flops_at_ppl\"\nof = \"rb8\"\nat = 3\nbelow = 5"), &[line, "not measured on rb8"]),
        (with("metric = \"ppl\"\nbelow = 5") + &target("t", "metric = \"ppl\"\nbelow = 5"), &["line 12", "two"]),
        (MEASUREMENTS.to_owned() + &target("a b", "metric = \"ppl\"\nof = \"rb8\"\nbelow = 5"), &[line, "a name is"]),
        ("version = 1\n[measurements]\nthis = { result = \"x\" }\n".into(), &["line 3", "this"]),
        ("version = 1\n[measurements]\nx = { result = \"x\", packed = \"y\" }\n".into(), &["line 3", "one of"]),
        ("version = 1\n[measurements]\nx = { configurations = \"x\" }\n".into(), &["line 3", "model"]),
    ] {
        setup.refused(&spec, &[], &[&["targets.toml"], words].concat());
    }
    let output = Command::new(cargo_bin("bkpack")).args(["verify", "--spec", "/dev/zero"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn a_result_that_is_missing_or_no_result_is_refused_with_the_line_of_its_measurement() {
    let setup = Setup::new();
    let spec = "version = 1\n\n[measurements.x]\nresult = \"x.json\"\n".to_owned()
        + &target("t", "metric = \"ppl\"\nof = \"x\"\nbelow = 5");
    setup.refused(&spec, &[], &["line 3", "measurement x", "x.json"]);
    for (text, words) in [
        ("", &["x.json"][..]),
        ("[1]", &["no JSON object"]),
        ("{}", &["\"ppl\""]),
        (r#"{"perplexity": null}"#, &["\"ppl\""]),
        (r#"{"perplexity": "31"}"#, &["\"ppl\""]),
        (r#"{"perplexity": NaN}"#, &["x.json"]),
        (r#"{"perplexity": 1e999}"#, &["x.json"]),
        (r#"{"perplexity": 3, "perplexity": 4}"#, &["twice"]),
        (&" ".repeat(2 << 20), &["1 MiB"]),
    ] {
        setup.write("x.json", text);
        setup.refused(&spec, &[], &[&["line 3"], words].concat());
    }
    std::fs::remove_file(setup.path().join("x.json")).unwrap();
    std::fs::create_dir(setup.path().join("x.json")).unwrap();
    setup.refused(&spec, &[], &["line 3", "no regular file"]);
    // A division by zero is no number either.
    setup.write("zero.json", r#"{"perplexity": 0}"#);
    let spec = "version = 1\nmeasurements.z.result = \"zero.json\"\n".to_owned()
        + &target("t", "metric = \"ppl\"\nof = \"z\"\ndivided_by = \"z\"\nbelow = 5");
    setup.refused(&spec, &[], &["line 3", "NaN"]);
}

#[test]
fn the_shipped_files_are_read() {
    for (name, id) in
        [("targets.toml", "req_7_2_int8_degradation_lt_5pct"), ("targets-packed.toml", "req_7_4_qat_within_2pct")]
    {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
        let targets = bkpack::eval::targets::Targets::read(&path, &[id.into()]).unwrap();
        assert_eq!(targets.needs_of_this().is_some(), name == "targets-packed.toml");
    }
}
