//! Tests on the CUDA emulator: a driver library, built here with g++ from kernels/cuda, that runs the kernels on the CPU.
//!
//! The dynamic linker reads LD_LIBRARY_PATH when a program starts, so that a test runs its own program again. With a real
//! card, `cargo test --workspace --test cuda -- --ignored` runs the same tests on it.

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
        if let Some(folder) = std::env::var_os(BUILT).map(PathBuf::from) {
            // The dynamic linker would go on to a driver of the machine.
            assert!(folder.join("libcuda.so.1").exists(), "{BUILT}: {} holds no libcuda.so.1", folder.display());
            return Some(folder);
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

/// Makes a test of the name of each of these ignored tests of a module that runs it on the emulator, at will with a variable
/// for it, and a test that finds none forgotten.
macro_rules! on_the_emulator {
    ($($module:ident::$name:ident $(with $variable:expr)?),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                emulator::run(concat!(stringify!($module), "::", stringify!($name)), &[$($variable)?]);
            }
        )*

        #[test]
        fn every_ignored_test_is_run_on_the_emulator() {
            emulator::assert_ignored(&[$(concat!(stringify!($module), "::", stringify!($name))),*]);
        }
    };
}
pub(crate) use on_the_emulator;

/// Checks that these are the ignored tests of this program.
pub fn assert_ignored(tests: &[&str]) {
    let output = Command::new(std::env::current_exe().unwrap()).args(["--list", "--ignored"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut ignored: Vec<&str> = text.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    let mut tests = tests.to_vec();
    ignored.sort_unstable();
    tests.sort_unstable();
    assert_eq!(ignored, tests, "the ignored tests of this program, and those that are run on the emulator");
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
