//! Packed models in the layouts of other runtimes: the values, the refusals, what stands on disk, the command.

#[path = "export/command.rs"]
mod command;
#[path = "export/folders.rs"]
mod folders;
#[path = "common/command.rs"]
mod output;
#[path = "export/refusals.rs"]
mod refusals;
#[path = "export/round_trip.rs"]
mod round_trip;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::{
    export::{self, Options, Plan, Target},
    format::PackedFile,
    progress::Silent,
};
use output::succeeded;
use tempfile::TempDir;

/// The folder of the real checkpoint.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llama")
}

/// A checkpoint of `fixtures/architectures`.
fn architecture(name: &str) -> PathBuf {
    fixture().join("../architectures").join(name)
}

fn run(arguments: &[&str], paths: &[&Path]) -> Output {
    Command::new(cargo_bin("bkpack")).args(arguments).args(paths).output().unwrap()
}

/// Packs a checkpoint into `model.bkpack` of a folder of its own.
#[track_caller]
fn packed(checkpoint: &Path, options: &[&str]) -> (TempDir, PackedFile) {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    let mut arguments = vec!["convert", "-q"];
    arguments.extend(options);
    succeeded(&run(&arguments, &[checkpoint, Path::new("-o"), &output]));
    let packed = PackedFile::open(&output).unwrap();
    (folder, packed)
}

/// Exports to `out` of a folder; the path of it and the plan.
#[track_caller]
fn exported(packed: &PackedFile, folder: &TempDir, target: Target, options: &Options) -> (PathBuf, Plan) {
    let output = folder.path().join("out");
    let plan = export::export(packed, target, options, &output, true, &Silent).unwrap();
    (output, plan)
}

/// Every file of a folder, or the one file.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_file() {
        return [(String::new(), std::fs::read(path).unwrap())].into();
    }
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}
