//! Figures: their marks, their files, and what they make of bad input.

mod efficiency;
mod importance;
mod plot;
mod robustness;
mod svg;
mod tensors;

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::report::figure::{Figure, Format};

fn bkpack(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("bkpack")).args(arguments).output().unwrap()
}

/// Leaves a picture to look at where `BKPACK_FIGURES` names a folder.
fn keep(figure: &Figure, name: &str) {
    if let Some(folder) = std::env::var_os("BKPACK_FIGURES").map(PathBuf::from) {
        for format in Format::ALL {
            let bytes = figure.render(format, 200).unwrap();
            std::fs::write(folder.join(format!("{name}.{}", format.name())), bytes).unwrap();
        }
    }
}
