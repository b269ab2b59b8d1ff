//! A folder appears whole or not at all, and no model is lost to another.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use bkpack::{
    Error,
    export::{self, Options, Target},
    format::PackedFile,
    progress::{Observer, Silent, Unit},
};

use super::{exported, files, fixture, output::refused, packed, run};

/// Stops the work when it is asked for the `left`th time in the step of this name.
struct Stop {
    step: &'static str,
    reached: AtomicBool,
    left: AtomicUsize,
}

impl Observer for Stop {
    fn begin(&self, step: &str, _: u64, _: Unit) {
        self.reached.store(step == self.step, Ordering::Relaxed);
    }
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.reached.load(Ordering::Relaxed) && self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

#[test]
fn stopped_in_the_middle_it_leaves_nothing() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    for (target, name) in [(Target::Mlx, "out"), (Target::Safetensors, "out"), (Target::Npz, "out.npz")] {
        let output = folder.path().join(name);
        for step in ["planning", "Verifying", "Writing"] {
            // Planning has no stage of its own: it is what comes before the first.
            let stop = Stop { step, reached: AtomicBool::new(step == "planning"), left: AtomicUsize::new(20) };
            let stopped = export::export(&packed, target, &Options::default(), &output, false, &stop);
            assert!(matches!(stopped, Err(Error::Cancelled)), "{step}");
            assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "{}", target.name());
        }
    }
}

#[test]
fn only_an_export_is_replaced_and_only_when_asked() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let options = Options::default();
    let (output, _) = exported(&packed, &folder, Target::Gptq, &options);
    let before = files(&output);
    assert!(before.contains_key("quantize_config.json"));
    let again = export::export(&packed, Target::Mlx, &options, &output, false, &Silent);
    assert!(matches!(again, Err(Error::Exists { .. })));
    assert!(files(&output) == before);
    std::fs::write(output.join("notes.txt"), "mine").unwrap();
    // Of an older model whose tokenizer had this file.
    std::fs::write(output.join("merges.txt"), "a b").unwrap();
    exported(&packed, &folder, Target::Mlx, &options);
    let after = files(&output);
    let names: Vec<&str> = after.keys().map(String::as_str).collect();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors", "notes.txt", "tokenizer.json"]);
}

#[test]
fn a_checkpoint_is_never_replaced() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let output = folder.path().join("checkpoint");
    std::fs::create_dir(&output).unwrap();
    for (name, bytes) in files(&fixture()) {
        std::fs::write(output.join(name), bytes).unwrap();
    }
    let replace = || export::export(&packed, Target::Safetensors, &Options::default(), &output, true, &Silent);
    let message = replace().unwrap_err().to_string();
    assert!(message.contains("model.safetensors") && message.contains("--force does not replace"), "{message}");
    assert!(files(&output) == files(&fixture()));
    // Nor is one whose weights are of a kind that is not looked into, or an index of shards that lie elsewhere.
    for (from, to) in
        [("model.safetensors", "pytorch_model.bin"), ("pytorch_model.bin", "model.safetensors.index.json")]
    {
        std::fs::rename(output.join(from), output.join(to)).unwrap();
        let before = files(&output);
        let message = replace().unwrap_err().to_string();
        assert!(message.contains("but no weights of an export, which --force does not replace"), "{message}");
        assert!(files(&output) == before);
    }
    // A folder of something else altogether may hold a model beside it.
    std::fs::remove_dir_all(&output).unwrap();
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("notes.txt"), "mine").unwrap();
    replace().unwrap();
    assert_eq!(std::fs::read(output.join("notes.txt")).unwrap(), b"mine");
}

#[test]
fn the_input_is_never_replaced_nor_hidden() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4", "--shard-size", "1MB"]);
    let before = files(folder.path());
    assert!(before.len() > 2);
    let index = "model.bkpack.index.json";
    assert!(before.contains_key(index) && !folder.path().join("model.bkpack").exists());
    for name in before.keys().map(String::as_str).chain(["model.bkpack"]) {
        for target in [Target::Npz, Target::Gguf, Target::Safetensors] {
            for opened in [&packed, &PackedFile::open(&folder.path().join(index)).unwrap()] {
                let output = folder.path().join(name);
                let error = export::export(opened, target, &Options::default(), &output, true, &Silent).unwrap_err();
                assert!(error.to_string().contains("is the input itself"), "{error}");
            }
        }
    }
    assert!(files(folder.path()) == before);
}

#[test]
fn damage_is_found_before_it_is_written() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let model = folder.path().join("model.bkpack");
    drop(packed);
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes).unwrap();
    let packed = PackedFile::open(&model).unwrap();
    for target in [Target::Npz, Target::Gguf, Target::Mlx] {
        let output = folder.path().join("out");
        let error = export::export(&packed, target, &Options::default(), &output, false, &Silent).unwrap_err();
        assert!(matches!(error, Error::PartHash { .. }), "{error}");
        assert!(!output.exists());
    }
}

#[test]
fn a_dry_run_looks_at_the_output_too() {
    let (folder, _) = packed(&fixture(), &["--bits", "4"]);
    let model = folder.path().join("model.bkpack");
    let dry =
        |target: &str, output: &Path| run(&["export", "--dry-run", "--to", target], &[&model, Path::new("-o"), output]);
    let absent = folder.path().join("absent").join("out");
    for target in ["gguf", "npz", "mlx"] {
        refused(&dry(target, &absent), &["absent", "does not exist"]);
        refused(&dry(target, &model), &["is the input itself"]);
    }
    refused(&dry("mlx", &fixture()), &["model.safetensors", "--force does not replace"]);
    assert!(dry("gguf", &folder.path().join("out")).status.success());
}

#[test]
fn a_file_is_replaced_only_when_asked() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let output = folder.path().join("model.npz");
    std::fs::write(&output, "mine").unwrap();
    let write = |force| export::export(&packed, Target::Npz, &Options::default(), &output, force, &Silent);
    assert!(matches!(write(false), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
    // What is no archive is someone's, whatever its name.
    let message = write(true).unwrap_err().to_string();
    assert!(message.contains("is no npz file") && message.contains("--force"), "{message}");
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
    std::fs::remove_file(&output).unwrap();
    let plan = write(false).unwrap();
    let first = std::fs::read(&output).unwrap();
    assert_eq!(first.len() as u64, plan.file_bytes);
    // The same input gives the same bytes, whatever the time.
    write(true).unwrap();
    assert!(std::fs::read(&output).unwrap() == first);
}
