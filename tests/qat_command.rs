//! `bkpack qat` as a command: what it prints and writes, Ctrl-C, and what it refuses.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use tempfile::TempDir;

fn source(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name);
    path.to_str().unwrap().to_owned()
}

struct Place {
    folder: TempDir,
    tokens: String,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens: Vec<u32> = (0..4096u32).map(|i| if i % 7 == 0 { i * i % 96 } else { (i % 7) * 13 % 96 }).collect();
        let path = folder.path().join("tokens.json");
        std::fs::write(&path, json!(tokens).to_string()).unwrap();
        Self { tokens: path.to_str().unwrap().to_owned(), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, model: &str, output: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.env_remove("BKPACK_ISA").args(["qat", &source(model), "--tokens", &self.tokens, "--ctx", "24"]);
        command.args(["--batch", "2", "-o"]).arg(self.path(output)).args(arguments);
        command
    }

    fn run(&self, model: &str, output: &str, arguments: &[&str]) -> Output {
        self.command(model, output, arguments).output().unwrap()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

#[track_caller]
fn json_of(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_training_leaves_a_folder_metrics_and_a_figure() {
    let place = Place::new();
    let (metrics, figure) = (place.path("metrics.json"), place.path("loss.svg"));
    let arguments = ["--encoding", "int4:g32", "--steps", "5", "--val-tokens", &place.tokens, "--val-windows", "4"];
    let more = ["--val-every", "2", "--save-metrics", metrics.to_str().unwrap(), "--plot", figure.to_str().unwrap()];
    let summary = json_of(&place.run("qwen3", "out", &[&arguments[..], &more, &["--json"]].concat()));
    assert_eq!(summary["steps"], 5);
    assert_eq!(place.names(), ["loss.png", "loss.svg", "metrics.json", "out", "tokens.json"]);
    let packed = place.path("out").join("model.bkpack");
    assert_eq!(summary["packed_bytes"], packed.metadata().unwrap().len());

    let metrics: Value = serde_json::from_slice(&std::fs::read(metrics).unwrap()).unwrap();
    let steps = metrics["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 5);
    for key in ["loss", "cross_entropy", "learning_rate", "gradient_norm", "tokens_per_second"] {
        assert!(steps.iter().all(|step| step[key].as_f64().unwrap() > 0.0), "{key}");
    }
    assert!(steps[0]["divergence"].is_null(), "INT4 needs no teacher");
    let measured: Vec<u64> =
        metrics["validation"].as_array().unwrap().iter().map(|record| record["step"].as_u64().unwrap()).collect();
    assert_eq!(measured, [0, 2, 4, 5]);

    // Both are ordinary models to every other subcommand.
    let eval = |model: &Path| {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.arg("eval").arg(model).args([
            "--tokens",
            &place.tokens,
            "--ctx",
            "24",
            "--limit-tokens",
            "96",
            "--json",
        ]);
        json_of(&command.output().unwrap())["ppl"].as_f64().unwrap()
    };
    assert_eq!(eval(&packed), summary["trained_ppl"].as_f64().unwrap());
    assert!(eval(&place.path("out")) > 1.0);
    let verified = Command::new(cargo_bin("bkpack")).arg("verify").arg(&packed).output().unwrap();
    assert_eq!(verified.status.code(), Some(0), "{verified:?}");

    // A folder that a training wrote is replaced only on demand, and no other one ever.
    let refused = place.run("qwen3", "out", &["--encoding", "int4:g32", "--steps", "1"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force"));
    let replaced = place.run("mamba", "out", &["--encoding", "ternary:g32", "--steps", "1", "--force", "-q"]);
    assert_eq!((replaced.status.code(), replaced.stdout.len()), (Some(0), 0), "{replaced:?}");
    std::fs::create_dir(place.path("other")).unwrap();
    std::fs::copy(Path::new(&source("mamba")).join("model.safetensors"), place.path("other/model.safetensors"))
        .unwrap();
    let refused = place.run("mamba", "other", &["--encoding", "int4:g32", "--steps", "1", "--force"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("which no training wrote"), "{refused:?}");
}

#[test]
fn few_bits_have_a_teacher_unless_told_otherwise() {
    let place = Place::new();
    for (index, (arguments, taught)) in [
        (&["--encoding", "ternary:g32"][..], true),
        (&["--encoding", "int3:g32"], true),
        (&["--encoding", "int4:g32", "--tensor", "q_proj=binary:g32"], true),
        (&["--encoding", "ternary:g32", "--no-teacher"], false),
        (&["--encoding", "int4:g32", "--teacher", &source("qwen3"), "--alpha", "0.5", "--temperature", "2"], true),
    ]
    .into_iter()
    .enumerate()
    {
        let metrics = place.path(&format!("metrics{index}.json"));
        let more = ["--steps", "1", "--save-metrics", metrics.to_str().unwrap(), "-q"];
        let trained = place.run("qwen3", &format!("out{index}"), &[arguments, &more].concat());
        assert_eq!(trained.status.code(), Some(0), "{trained:?}");
        let metrics: Value = serde_json::from_slice(&std::fs::read(metrics).unwrap()).unwrap();
        assert_eq!(metrics["steps"][0]["divergence"].is_number(), taught, "{arguments:?}");
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_threads() {
    let place = Place::new();
    for (model, encoding) in [("resnet_bk", "int4:g32"), ("mamba", "ternary:g32"), ("mixtral", "int4:g32")] {
        let bytes = |threads: &str| {
            let output = format!("{model}{threads}");
            let arguments = ["--encoding", encoding, "--steps", "3", "--threads", threads, "-q"];
            let trained = place.run(model, &output, &arguments);
            assert_eq!(trained.status.code(), Some(0), "{trained:?}");
            std::fs::read(place.path(&output).join("model.safetensors")).unwrap()
        };
        assert!(bytes("1") == bytes("2"), "{model}");
    }
}

#[test]
fn a_dry_run_tells_and_writes_nothing() {
    let place = Place::new();
    let arguments = ["--encoding", "int4:g32", "--steps", "10"];
    let plan = json_of(&place.run("qwen3", "out", &[&arguments[..], &["--dry-run", "--json"]].concat()));
    assert_eq!((&plan["tokens"], &plan["text_tokens"]), (&json!(480), &json!(4096)));
    assert_eq!(place.names(), ["tokens.json"]);
    let told = place.run("qwen3", "out", &[&arguments[..], &["--dry-run"]].concat());
    assert!(String::from_utf8_lossy(&told.stdout).contains("10 of 2 windows of 24 tokens"), "{told:?}");
    let trained = place.run("qwen3", "out", &[&arguments[..], &["-q"]].concat());
    assert_eq!(trained.status.code(), Some(0), "{trained:?}");
    let size = |name: &str| place.path("out").join(name).metadata().unwrap().len();
    // What is not quantized was BF16 in the checkpoint, and is F32 once it was trained: here that is little.
    let ratio = plan["packed_bytes"].as_f64().unwrap() / size("model.bkpack") as f64;
    assert!((0.97..1.03).contains(&ratio), "{ratio}");
    let folder: u64 =
        std::fs::read_dir(place.path("out")).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(folder - size("model.bkpack"), plan["folder_bytes"].as_u64().unwrap());
}

#[test]
fn a_loss_that_runs_away_ends_the_training() {
    let place = Place::new();
    let arguments = ["--encoding", "int4:g32", "--steps", "50", "--learning-rate", "1e30", "--warmup", "0"];
    let diverged = place.run("mamba", "out", &arguments);
    let message = String::from_utf8_lossy(&diverged.stderr);
    assert_eq!(diverged.status.code(), Some(2), "{message}");
    assert!(message.contains("NaN or infinite at step") && message.contains("--learning-rate"), "{message}");
    assert_eq!(place.names(), ["tokens.json"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_resume_goes_on() {
    let place = Place::new();
    let arguments = ["--encoding", "int4:g32", "--steps", "400"];
    let mut command = place.command("qwen3", "out", &[&arguments[..], &["--checkpoint-every", "1"]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (start, partial) = (Instant::now(), place.path("out.partial"));
    while !partial.exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "no state was saved");
        assert!(child.try_wait().unwrap().is_none(), "the training ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let stopped = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&stopped.stderr);
    assert_eq!(stopped.status.code(), Some(130), "{message}");
    assert!(message.contains("--resume"), "{message}");
    assert_eq!(place.names(), ["out.partial", "tokens.json"]);

    // What was left is not thrown away by mistake, nor taken for another training's.
    let refused = place.run("qwen3", "out", &arguments);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("pass --resume"), "{refused:?}");
    let other = ["--encoding", "int3:g32", "--steps", "400", "--resume"];
    let refused = place.run("qwen3", "out", &other);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("belongs to a training of another model"));
    let resumed = place.run("qwen3", "out", &[&arguments[..], &["--resume", "-q"]].concat());
    assert_eq!(resumed.status.code(), Some(0), "{resumed:?}");
    assert_eq!(place.names(), ["out", "tokens.json"]);
}

#[test]
fn wrong_use_is_refused_in_one_sentence() {
    let place = Place::new();
    for (model, arguments, words) in [
        ("mamba", &["--encoding", "int4", "--steps", "0"][..], "--steps"),
        ("mamba", &["--encoding", "int9", "--steps", "1"], "2 to 8 bits"),
        ("mamba", &["--encoding", "int4", "--steps", "1", "--alpha", "2"], "--alpha"),
        ("mamba", &["--encoding", "int4", "--steps", "1", "--activations", "bk_core=int8"], "Birman-Schwinger"),
        ("mamba", &["--encoding", "int4", "--steps", "1", "--keep", "no_such_tensor"], "no_such_tensor"),
        ("resnet_bk_lookahead", &["--encoding", "int4", "--steps", "1"], "positions see those after them"),
        ("mamba", &["--encoding", "int4", "--steps", "1", "--teacher", "/no/such/model"], "/no/such/model"),
    ] {
        let refused = place.run(model, "out", arguments);
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{words:?} is not in {message}");
        assert_eq!(place.names(), ["tokens.json"]);
    }
}
