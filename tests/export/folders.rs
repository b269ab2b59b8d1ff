//! A folder appears whole or not at all, and no model is lost to another.

use std::sync::atomic::{AtomicUsize, Ordering};

use bkpack::{
    Error,
    export::{self, Options, Target},
    progress::{Observer, Silent, Unit},
};

use super::{exported, files, fixture, packed};

/// Stops the work when it is asked for the `left`th time.
struct Stop {
    left: AtomicUsize,
}

impl Observer for Stop {
    fn begin(&self, _: &str, _: u64, _: Unit) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
    fn cancelled(&self) -> bool {
        self.left.fetch_sub(1, Ordering::Relaxed) == 1
    }
}

#[test]
fn stopped_in_the_middle_it_leaves_nothing() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    for (target, name) in [(Target::Mlx, "out"), (Target::Safetensors, "out"), (Target::Npz, "out.npz")] {
        let output = folder.path().join(name);
        let stop = Stop { left: AtomicUsize::new(20) };
        let stopped = export::export(&packed, target, &Options::default(), &output, false, &stop);
        assert!(matches!(stopped, Err(Error::Cancelled)));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "{}", target.name());
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
    // Nor is one whose weights are of a kind that is not looked into.
    std::fs::rename(output.join("model.safetensors"), output.join("pytorch_model.bin")).unwrap();
    let message = replace().unwrap_err().to_string();
    assert!(message.contains("config.json of another model"), "{message}");
}

#[test]
fn a_file_is_replaced_only_when_asked() {
    let (folder, packed) = packed(&fixture(), &["--bits", "4"]);
    let output = folder.path().join("model.npz");
    std::fs::write(&output, "mine").unwrap();
    let write = |force| export::export(&packed, Target::Npz, &Options::default(), &output, force, &Silent);
    assert!(matches!(write(false), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
    let plan = write(true).unwrap();
    let first = std::fs::read(&output).unwrap();
    assert_eq!(first.len() as u64, plan.file_bytes);
    // The same input gives the same bytes, whatever the time.
    write(true).unwrap();
    assert!(std::fs::read(&output).unwrap() == first);
}
