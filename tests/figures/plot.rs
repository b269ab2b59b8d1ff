//! `bkpack plot`: what it writes and prints, and what it refuses.

use std::{
    path::Path,
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;

use crate::{bkpack, svg::Drawing};

/// A folder with result files, and the command run on it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn of(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("results")).unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join("results").join(name), text).unwrap();
        }
        Self(folder)
    }

    /// Runs `bkpack plot KIND ARGUMENTS`, in the folder; gives the exit status, standard output and error.
    fn plot(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(cargo_bin("bkpack"));
        let Output { status, stdout, stderr } =
            command.current_dir(self.0.path()).arg("plot").args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.code().unwrap(), text(stdout), text(stderr))
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "results")
            .collect();
        names.sort();
        names
    }

    fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.0.path().join(name)).unwrap()).unwrap()
    }
}

#[test]
fn the_documents_minimal_files_are_drawn_with_their_requirements() {
    let mut files = Vec::new();
    let values = [
        ("fp32", 32, 30.25, 32.99),
        ("fp16", 16, 30.23, 32.68),
        ("int8", 8, 31.52, 38.10),
        ("int4", 4, 34.36, 211.05),
        ("int2", 2, 44.88, 479.53),
    ];
    for (name, bits, bk, mamba) in values {
        for (model, ppl) in [("resnetbk", bk), ("mamba", mamba)] {
            let text = format!("{{\"bit_width\": {bits}, \"perplexity\": {ppl}, \"model\": \"{model}\"}}");
            files.push((format!("{model}_quant_{name}.json"), text));
        }
    }
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let folder = Folder::of(&files);
    let (status, output, notes) = folder.plot(&[
        "robustness",
        "results",
        "-o",
        "fig",
        "--format",
        "pdf,svg,eps",
        "--summary",
        "s.json",
        "--dpi",
        "72",
    ]);
    assert_eq!((status, notes.as_str()), (0, ""));
    assert_eq!(folder.names(), ["fig.eps", "fig.pdf", "fig.png", "fig.svg", "s.json"]);
    let summary = folder.json("s.json");
    let requirements = summary["requirements"].as_object().unwrap();
    let ids = [
        "req_7_2_int8_degradation_lt_5pct",
        "req_7_6_int4_degradation_lt_15pct",
        "req_8_6_resnetbk_int4_lt_50",
        "req_8_7_mamba_int4_gt_200",
        "req_7_8_int8_10pct_better",
        "req_7_9_mamba_4x_worse_int4",
    ];
    assert_eq!(requirements.keys().collect::<Vec<_>>(), ids);
    for id in ids {
        assert_eq!(requirements[id]["status"], "PASS", "{id}");
        assert!(output.contains(&format!("{id}: ✓ PASS")), "{output}");
    }
    assert!((requirements["req_7_9_mamba_4x_worse_int4"]["value"].as_f64().unwrap() - 211.05 / 34.36).abs() < 1e-9);
    assert_eq!(summary["simulated"], false);
    assert_eq!(summary["models"]["mamba"]["results"]["int4"]["deployable"], false);
    assert!(output.contains("INT4         211.05       +539.74 %     ✗ No"), "{output}");

    let (status, _, error) = folder.plot(&["robustness", "results", "-o", "fig.svg"]);
    assert_eq!((status, error.as_str()), (2, "error: fig.svg exists; pass --force to replace it\n"));
    let (status, output, _) = folder.plot(&[
        "robustness",
        "results",
        "-o",
        "one.svg",
        "--models",
        "mamba",
        "--bit-widths",
        "32",
        "8",
        "--json",
    ]);
    let summary: serde_json::Value = serde_json::from_str(&output).unwrap();
    assert_eq!((status, summary["models"]["mamba"]["results"].as_object().unwrap().len()), (0, 2));
    assert_eq!(summary["requirements"]["req_7_2_int8_degradation_lt_5pct"]["status"], "MISSING");
    let (status, _, error) = folder.plot(&["robustness", "results", "-o", "two.svg", "--models", "gpt"]);
    assert_eq!(
        (status, error.as_str()),
        (2, "error: figure: there is no result of gpt; there are those of resnetbk, mamba\n")
    );
}

#[test]
fn two_precisions_of_16_bits_are_two_columns() {
    let file = |precision: &str, ppl: f64| {
        format!(r#"{{"bit_width": 16, "precision": "{precision}", "perplexity": {ppl}, "model": "llama"}}"#)
    };
    let (bf16, fp16, same) = (file("bf16", 50.0), file("fp16", 49.0), file("bf16", 51.0));
    let folder = Folder::of(&[("a.json", &bf16), ("b.json", &fp16), ("c.json", &same)]);
    let (status, output, notes) = folder.plot(&["robustness", "results", "-o", "fig.svg", "--summary", "s.json"]);
    let left_out = "note: results/c.json: the same model and bit_width as results/a.json; it is left out\n";
    assert_eq!((status, notes.as_str()), (0, left_out));
    assert!(output.contains("BF16         50.00") && output.contains("FP16         49.00"), "{output}");
    let results = &folder.json("s.json")["models"]["llama"]["results"];
    assert_eq!((&results["bf16"]["perplexity"], &results["fp16"]["perplexity"]), (&50.0.into(), &49.0.into()));
    let drawing = Drawing::parse(&std::fs::read_to_string(folder.0.path().join("fig.svg")).unwrap());
    drawing.assert_tidy();
    assert!(["FP16", "BF16"].iter().all(|name| drawing.texts().contains(name)), "{:?}", drawing.texts());
}

#[test]
fn what_is_wrong_with_results_is_named_and_the_rest_drawn() {
    let folder = Folder::of(&[
        ("a.json", r#"{"bit_width": 32, "perplexity": 48.8, "model": "llama", "extra": {"a": 1}}"#),
        ("b.json", r#"{"bit_width": 32, "perplexity": 50, "model": "llama"}"#),
        ("c.json", r#"{"bit_width": 4, "perplexity": NaN, "model": "llama"}"#),
        ("d.json", r#"{"bit_width": 8, "perplexity": "#),
        ("e.json", r#"{"bit_width": 8, "perplexity": -3, "model": "llama"}"#),
        ("f.json", r#"{"bit_width": 8, "model": "llama"}"#),
        ("g.json", r#"{"bit_width": 8, "perplexity": 1, "perplexity": 2, "model": "llama"}"#),
        ("h.json", "[]"),
        ("i.json", r#"{"notes": []}"#),
        ("j.json", r#"{"config_id": "x", "model": "llama", "perplexity": 50, "flops_per_token": 1000000}"#),
        (
            "l.json",
            r#"{"bit_width": 2, "perplexity": 60, "model": "llama", "protocol": {"ctx": 256, "skip": 1, "scored": 255}}"#,
        ),
        (
            "m.json",
            r#"{"bit_width": 3, "perplexity": 55, "model": "llama", "protocol": {"ctx": 512, "skip": 1, "scored": 511}}"#,
        ),
        ("k.json", r#"{"bit_width": 8, "perplexity": 49.5, "model": "other\u001b[31m"}"#),
        ("readme.txt", "not a result"),
    ]);
    let (status, _, notes) = folder.plot(&["robustness", "results", "-o", "fig.svg"]);
    assert_eq!(status, 0, "{notes}");
    for expected in [
        "note: results/b.json: the same model and bit_width as results/a.json; it is left out\n",
        "note: results/d.json: EOF while parsing a value at line 1 column 31; it is left out\n",
        "note: results/e.json: perplexity is -3; it is above 0; it is left out\n",
        "note: results/f.json: perplexity is missing; it is left out\n",
        "note: results/g.json: the header names \"perplexity\" twice; it is left out\n",
        "note: results/h.json: not a JSON object; it is left out\n",
        "note: results/i.json: no bit_width, so no result of this kind; it is left out\n",
        "note: the results of llama do not compare: 255 tokens of text ?, windows of 256, 1 skipped; 511 tokens of",
        "note: the perplexity of Llama at INT4 is not finite\n",
        "note: Llama at INT8 is missing\n",
    ] {
        assert!(notes.contains(expected), "{expected} in {notes}");
    }
    assert!(!notes.contains("j.json") && !notes.contains("readme") && !notes.contains('\u{1b}'), "{notes}");
    let drawing = Drawing::parse(&std::fs::read_to_string(folder.0.path().join("fig.svg")).unwrap());
    drawing.assert_tidy();
    assert!(drawing.texts_of("values").iter().any(|text| text == "not finite"));

    let empty = Folder::of(&[("a.json", "nonsense")]);
    for kind in ["robustness", "efficiency"] {
        let (status, output, error) = empty.plot(&[kind, "results", "-o", "fig.svg", "--summary", "s.json"]);
        assert_eq!((status, output.as_str(), error.lines().count()), (2, "", 1), "{error}");
        assert!(
            error.starts_with("error: results: holds no result with ") && error.contains("a.json: expected"),
            "{error}"
        );
    }
    let (status, _, error) = empty.plot(&["robustness", "nowhere", "-o", "fig.svg"]);
    assert!(status == 2 && error.starts_with("error: nowhere: "), "{error}");
    let (status, _, error) = empty.plot(&["efficiency", "--simulate", "-o", "none/fig.svg"]);
    assert!(status == 2 && error.contains("the folder none does not exist"), "{error}");
    let (status, _, error) =
        empty.plot(&["efficiency", "results", "-o", "f.svg", "--summary", "results/a.json", "--force"]);
    assert_eq!((status, error.as_str()), (2, "error: --summary: results/a.json is one of the results\n"));
    assert!(empty.names().is_empty(), "nothing is left behind: {:?}", empty.names());
}

#[test]
fn simulated_figures_say_so_everywhere_and_follow_their_seed() {
    let folder = Folder::of(&[]);
    let draw = |kind: &str, name: &str, seed: &str| {
        let summary = format!("{name}.json");
        let figure = format!("{name}.svg");
        let (status, output, error) =
            folder.plot(&[kind, "--simulate", "--seed", seed, "-o", &figure, "--summary", &summary]);
        assert_eq!((status, error.as_str()), (0, ""));
        assert!(output.contains("SIMULATED data: nothing here was measured"));
        assert_eq!(folder.json(&summary)["simulated"], true);
        let text = std::fs::read_to_string(folder.0.path().join(figure)).unwrap();
        assert_eq!(Drawing::parse(&text).texts_of("watermark"), ["SIMULATED"]);
        text
    };
    for kind in ["robustness", "efficiency"] {
        let first = draw(kind, &format!("{kind}-a"), "42");
        assert_eq!(first, draw(kind, &format!("{kind}-b"), "42"));
        assert_ne!(first, draw(kind, &format!("{kind}-c"), "43"));
    }
    let requirements = folder.json("robustness-a.json")["requirements"].clone();
    assert!(requirements.as_object().unwrap().values().all(|requirement| requirement["status"] == "PASS"));
}

#[test]
fn efficiency_results_are_drawn_from_files() {
    let file = |id: &str, model: &str, ppl: &str, flops: f64| {
        let text = format!(
            "{{\"config_id\": \"{id}\", \"model\": \"{model}\", \"perplexity\": {ppl}, \"flops_per_token\": {flops}, \
             \"compute_factor\": 1.0, \"looks_ahead\": true}}"
        );
        (format!("{id}.json"), text)
    };
    let files = [
        file("resnetbk_config_0", "resnetbk", "28.15", 4.99e9),
        file("resnetbk_config_1", "resnetbk", "30.0", 2.16e9),
        file("mamba_config_0", "mamba", "32.25", 9.97e9),
        file("mamba_config_1", "mamba", "36.59", 5.22e9),
        file("mamba_config_2", "mamba", "null", 1e9),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let folder = Folder::of(&files);
    let (status, output, notes) = folder.plot(&["efficiency", "results", "-o", "fig.svg", "--summary", "s.json"]);
    assert_eq!(
        (status, notes.as_str()),
        (0, "note: the perplexity of mamba_config_2 is not finite: it is not drawn\n")
    );
    assert!(output.contains("Lowest FLOPs: 2.16 GFLOPs (PPL 30.00)") && output.contains("LOOKS AHEAD"), "{output}");
    let requirement = &folder.json("s.json")["requirements"]["req_8_10_2x_fewer_flops_at_ppl_30"];
    // Mamba reaches 32.25 at most: that it needs more than 4.62 times the FLOPs is no measured ratio.
    assert_eq!((&requirement["status"], &requirement["value"]), (&"FAIL".into(), &serde_json::Value::Null));
    assert!(output.contains("> 4.62×"), "{output}");
    let drawing = Drawing::parse(&std::fs::read_to_string(folder.0.path().join("fig.svg")).unwrap());
    drawing.assert_tidy();
    assert!(drawing.texts().contains(&"ResNet-BK (LOOKS AHEAD)"), "{:?}", drawing.texts());
}

#[test]
fn tensors_of_a_packed_file_are_drawn() {
    let folder = Folder::of(&[]);
    let packed = folder.0.path().join("m.bkpack");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures/mixtral");
    let convert =
        bkpack(&["convert", model.to_str().unwrap(), "-o", packed.to_str().unwrap(), "--policy", "component"]);
    assert!(convert.status.success(), "{}", String::from_utf8_lossy(&convert.stderr));
    let (status, output, error) = folder.plot(&["tensors", "m.bkpack", "-o", "fig.svg"]);
    assert_eq!((status, output.as_str(), error.as_str()), (0, "written: fig.svg, fig.png\n", ""));
    let drawing = Drawing::parse(&std::fs::read_to_string(folder.0.path().join("fig.svg")).unwrap());
    drawing.assert_tidy();
    assert!(drawing.texts_of("outside").iter().any(|text| text.starts_with("lm_head.weight")));
    assert!(drawing.texts_of("kinds").iter().any(|text| text.contains("experts.*")), "{:?}", drawing.texts_of("kinds"));
    let (status, _, error) = folder.plot(&["tensors", "fig.svg", "-o", "other.svg"]);
    assert!(status == 2 && error.lines().count() == 1, "{error}");
}
