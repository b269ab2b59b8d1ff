//! `bkpack qat`: outputs that would replace something, files that are not a training's own, and options out of range.

#![cfg(unix)]

#[path = "common/command.rs"]
mod output;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use output::{refused, succeeded};
use serde_json::{Value, json};
use tempfile::TempDir;

const INT4: [&str; 4] = ["--encoding", "int4:g32", "--steps", "2"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

/// A folder with the token ids that are trained on, and the command run in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens: Vec<u32> = (0..2048u32).map(|i| (i % 7) * 13 % 96).collect();
        fs::write(folder.path().join("tokens.json"), json!(tokens).to_string()).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Trains a checkpoint in `folder` on its tokens.
    fn train_in(&self, folder: &str, source: &Path, arguments: &[&[&str]]) -> Output {
        let mut command = Command::new(cargo_bin("bkpack"));
        command.current_dir(self.path(folder)).env_remove("BKPACK_ISA").arg("qat").arg(source);
        command.arg("--tokens").arg(self.path("tokens.json")).args(["--ctx", "24", "--batch", "2"]);
        command.args(arguments.concat()).output().unwrap()
    }

    fn train(&self, arguments: &[&[&str]]) -> Output {
        self.train_in(".", &fixture("qwen3"), arguments)
    }

    /// Leaves the state of a training whose output could not be written.
    fn interrupt(&self, output: &str, arguments: &[&str]) {
        // A link to nothing seems free, and no folder can be put in its place.
        std::os::unix::fs::symlink("nowhere", self.path(output)).unwrap();
        let ended = self.train(&[arguments, &["-o", output]]);
        let message = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(2), "{message}");
        let note =
            format!("note: the state is saved in {output}.partial; the same command with --resume goes on there");
        assert!(message.starts_with(&note), "{message}");
        fs::remove_file(self.path(output)).unwrap();
    }
}

#[test]
fn a_finished_training_outlives_an_output_that_cannot_be_written() {
    let place = Place::new();
    let arguments = ["--encoding", "int4:g32", "--steps", "30", "--save-metrics", "metrics.json"];
    place.interrupt("out", &arguments);
    let steps =
        || serde_json::from_slice::<Value>(&place.read("metrics.json")).unwrap()["steps"].as_array().unwrap().len();
    assert_eq!(steps(), 30);
    let resumed = place.train(&[&arguments, &["-o", "out", "--resume", "--json"]]);
    let summary: Value = serde_json::from_str(&succeeded(&resumed)).unwrap();
    assert_eq!((&summary["steps"], steps()), (&json!(30), 30));
    assert!(place.path("out/model.bkpack").exists() && !place.path("out.partial").exists());
}

#[test]
fn no_output_replaces_an_input_or_another_output() {
    let place = Place::new();
    let taught = place.train(&[&INT4, &["-o", "first", "-q"]]);
    succeeded(&taught);
    fs::copy(place.path("first/model.bkpack"), place.path("teacher.bkpack")).unwrap();
    fs::write(place.path("recipe.toml"), "not read").unwrap();
    let before = place.read("teacher.bkpack");
    for (arguments, words) in [
        (
            &["-o", "o", "--teacher", "teacher.bkpack", "--save-metrics", "teacher.bkpack"][..],
            "--save-metrics: teacher",
        ),
        (&["-o", "teacher.bkpack", "--teacher", "teacher.bkpack"], "--output: teacher.bkpack is the input itself"),
        (&["-o", "first", "--teacher", "first/model.bkpack"], "first/model.bkpack lies in the folder"),
        (&["-o", "o", "--save-metrics", "o.partial"], "--save-metrics: o.partial is what --output writes, too"),
        (&["-o", "m", "--save-metrics", "./m"], "--save-metrics: ./m is what --output writes, too"),
        (&["-o", "loss.svg", "--plot", "loss.svg"], "--plot: loss.svg is what --output writes, too"),
        (
            &["-o", "o", "--plot", "a.svg", "--save-metrics", "a.svg"],
            "--plot: a.svg is what --save-metrics writes, too",
        ),
        (
            &["-o", "first", "--save-metrics", "first/metrics.json"],
            "--save-metrics: first/metrics.json lies in the folder",
        ),
        (&["-o", "o", "--save-metrics", "tokens.json"], "--save-metrics: tokens.json is the input itself"),
    ] {
        refused(&place.train(&[&INT4, arguments, &["--force"]]), &[words]);
    }
    let recipe = ["--recipe", "recipe.toml", "--steps", "2", "-o", "o", "--save-metrics", "recipe.toml", "--force"];
    refused(&place.train(&[&recipe]), &["--save-metrics: recipe.toml is the input itself"]);
    assert!(place.read("teacher.bkpack") == before && place.read("recipe.toml") == b"not read");
    assert!(!place.path("o").exists() && !place.path("o.partial").exists());
}

#[test]
fn a_file_that_is_no_state_of_a_training_is_never_replaced() {
    let place = Place::new();
    fs::write(place.path("ol.partial"), "my thesis").unwrap();
    fs::create_dir(place.path("o3.partial")).unwrap();
    fs::create_dir(place.path("here")).unwrap();
    fs::write(place.path("here.partial"), "my notes").unwrap();
    for more in [&["--force"][..], &["--resume"], &[]] {
        refused(&place.train(&[&INT4, &["-o", "ol"], more]), &["ol.partial: stands where the state"]);
        refused(&place.train(&[&INT4, &["-o", "o3"], more]), &["o3.partial: stands where the state"]);
        // The folder's own name, not one of a file in it.
        refused(
            &place.train_in("here", &fixture("qwen3"), &[&INT4, &["-o", "."], more]),
            &["here.partial: stands where"],
        );
    }
    assert_eq!((place.read("ol.partial"), place.read("here.partial")), (b"my thesis".into(), b"my notes".into()));
}

#[test]
fn going_on_replaces_the_metrics_of_a_training_and_nothing_else() {
    let place = Place::new();
    fs::write(place.path("notes.txt"), "mine").unwrap();
    let with_notes = ["--save-metrics", "notes.txt", "--resume"];
    refused(&place.train(&[&INT4, &["-o", "out"], &with_notes]), &["notes.txt", "--force"]);
    let arguments = ["--encoding", "int4:g32", "--steps", "3"];
    place.interrupt("out", &arguments);
    refused(&place.train(&[&arguments, &["-o", "out"], &with_notes]), &["notes.txt", "--force"]);
    assert_eq!(place.read("notes.txt"), b"mine");
}

#[test]
fn the_state_of_another_training_is_not_taken_for_this_one_s() {
    let place = Place::new();
    place.interrupt("out", &["--encoding", "int4:g32", "--steps", "3"]);
    let arguments = ["--learning-rate", "1e38", "--warmup", "0", "--checkpoint-every", "1", "-o", "out", "--force"];
    let diverged = place.train(&[&["--encoding", "int4:g32", "--steps", "5"], &arguments]);
    // No note: no step of this training came to an end, and the old state was to be replaced.
    refused(&diverged, &["NaN or infinite at step 1", "--learning-rate"]);
    assert!(!place.path("out.partial").exists());
}

#[test]
fn a_teacher_gets_the_config_that_is_given() {
    let place = Place::new();
    for name in ["student.safetensors", "teacher.safetensors"] {
        fs::copy(fixture("qwen3").join("model.safetensors"), place.path(name)).unwrap();
    }
    let config = fixture("qwen3").join("config.json");
    let arguments = ["--teacher", "teacher.safetensors", "--config", config.to_str().unwrap(), "-o", "out", "-q"];
    succeeded(&place.train_in(".", &place.path("student.safetensors"), &[&INT4, &arguments]));
    // One that the student needs not, too.
    let arguments = ["--teacher", "teacher.safetensors", "--config", config.to_str().unwrap(), "-o", "more", "-q"];
    succeeded(&place.train(&[&INT4, &arguments]));
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let place = Place::new();
    fs::write(place.path("text.txt"), "a text").unwrap();
    fs::write(place.path("few.json"), "[1, 2]").unwrap();
    let most = u64::MAX.to_string();
    let dry = ["--dry-run"];
    for (arguments, words) in [
        (&["--batch", &most][..], "--batch: times --steps and the window is more tokens than can be counted"),
        (&["--ctx", "0"], "--ctx: 0 is too few"),
        (&["--ctx", "1"], "--ctx: 1 is too few"),
        (&["--alpha", "0.5"], "--alpha: there is no teacher"),
        (&["--temperature", "2"], "--temperature: there is no teacher"),
        (&["--val", "text.txt"], "--val-tokens"),
        (&["--val-tokens", "few.json"], "the validation text (--val or --val-tokens): 2 tokens do not fill"),
        (&["--tokens", "few.json"], "few.json (the training text): 2 tokens do not fill"),
    ] {
        for more in [&dry[..], &[]] {
            let given: Vec<&str> = arguments.to_vec();
            let mut command = Command::new(cargo_bin("bkpack"));
            command.current_dir(&place.0).env_remove("BKPACK_ISA").arg("qat").arg(fixture("qwen3")).args(INT4);
            for default in [["--tokens", "tokens.json"], ["--ctx", "24"], ["--batch", "2"], ["-o", "out"]] {
                if !given.contains(&default[0]) {
                    command.args(default);
                }
            }
            refused(&command.args(given).args(more).output().unwrap(), &[words]);
        }
    }
    let none = place.train(&[&INT4, &["-o", "out", "--val-tokens", "few.json", "--val-windows", "0"]]);
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("--val-windows"), "{none:?}");
    assert!(succeeded(&place.train(&[&INT4, &["-o", "out", "--dry-run", "-q"]])).is_empty());
    assert!(!place.path("out").exists() && !place.path("out.partial").exists());
}
