//! Tests on the CUDA emulator: a driver library, built here with g++ from kernels/cuda, that runs the kernels on the CPU.
//!
//! The dynamic linker reads LD_LIBRARY_PATH when a program starts, so that a test runs its own program again. With a real
//! card, `cargo test --test cuda -- --ignored` runs the same tests on it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

/// The variable that leaves these tests out, where there is no g++.
const LEFT_OUT: &str = "BKPACK_NO_EMULATOR";

/// The variable that names the folder of an emulator that is built already.
const BUILT: &str = "BKPACK_EMULATOR";

/// The folder of the emulator, built once; none where the user leaves it out.
pub fn folder() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        if std::env::var_os(LEFT_OUT).is_some() {
            println!("{LEFT_OUT} is set: nothing is run on the emulator");
            return None;
        }
        if let Some(folder) = std::env::var_os(BUILT) {
            return Some(folder.into());
        }
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
        let kernels = if kernels.ends_with("kernels") { kernels.to_owned() } else { kernels.join("kernels") };
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulator");
        let script = kernels.join("cuda/emulate/build.sh");
        let built = Command::new("bash").arg(script).arg(&folder).stdin(Stdio::null()).output();
        let built = built.unwrap_or_else(|error| panic!("bash: {error}; set {LEFT_OUT}=1 to leave these tests out"));
        assert!(
            built.status.success(),
            "the emulator cannot be built (it needs g++; set {LEFT_OUT}=1 to leave these tests out):\n{}",
            String::from_utf8_lossy(&built.stderr)
        );
        Some(folder)
    };
    FOLDER.get_or_init(build).as_deref()
}

/// Runs an ignored test of this program on the emulator, with more variables for it.
pub fn run(test: &str, variables: &[(&str, &str)]) {
    let Some(folder) = folder() else { return };
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} on the emulator: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    print!("{text}");
}
