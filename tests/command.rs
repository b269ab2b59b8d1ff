//! The command as a user and a CI job see it: exit statuses, JSON, what stands on disk after success, failure, Ctrl-C,
//! a kill and a full disk.

mod common;
#[path = "common/command.rs"]
mod output;

use std::{
    collections::BTreeSet,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use assert_cmd::cargo::cargo_bin;
use common::{Random, Stored, fixture, safetensors};
use output::{refused, succeeded};
use serde_json::Value;
use tempfile::TempDir;

fn bkpack() -> Command {
    let mut command = Command::new(cargo_bin("bkpack"));
    command.env_remove("BKPACK_ISA");
    command
}

fn text() -> PathBuf {
    fixture().join("../wikitext2.test.txt")
}

/// Runs to the end.
fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn json(text: &str) -> serde_json::Map<String, Value> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => object,
        other => panic!("{other:?} in {text}"),
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The fixture at 4 bits, in a folder of its own.
fn packed() -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    succeeded(&run(bkpack().arg("convert").arg(fixture()).arg("-o").arg(&output).arg("-q")));
    (folder, output)
}

/// A checkpoint of 96 MB: packing it takes long enough to be interrupted.
fn large() -> TempDir {
    let folder = TempDir::new().unwrap();
    let mut random = Random(1);
    let block = Stored::random("", "BF16", &[256, 4096], 0.02, &mut random).bytes;
    let tensors: Vec<Stored> = (0..48)
        .map(|index| {
            let mut bytes = block.clone();
            bytes.rotate_left(2 * index * 1001);
            Stored { name: format!("layers.{index}.weight"), dtype: "BF16", shape: vec![256, 4096], bytes }
        })
        .collect();
    std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    folder
}

#[test]
fn convert_prints_its_figures_and_dry_run_predicts_them() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    let convert = |arguments: &[&str]| {
        let outcome = run(bkpack().arg("convert").arg(fixture()).arg("-o").arg(&output).arg("--json").args(arguments));
        assert!(outcome.stderr.is_empty(), "{outcome:?}");
        json(&succeeded(&outcome))
    };
    for arguments in [
        &["--bits", "4"][..],
        &["--bits", "3", "--asymmetric", "--group-size", "64", "--keep", "embed"],
        &["--bits", "1.58", "--rounding", "rtn", "--shard-size", "500KB"],
        &["--bits", "16", "--tensor", "q_proj|k_proj=int8:row", "--tensor", "layers.0=binary:g32"],
    ] {
        let predicted = convert(&[arguments, &["--dry-run"]].concat());
        assert!(names(folder.path()).is_empty(), "a dry run writes nothing");
        let figures = convert(arguments);
        let on_disk: u64 =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert_eq!(figures["file_bytes"], on_disk);
        let parameters = figures["parameters"].as_f64().unwrap();
        let close = |key: &str, expected: f64| assert!((figures[key].as_f64().unwrap() / expected - 1.0).abs() < 1e-12);
        close("bits_per_weight", 8.0 * on_disk as f64 / parameters);
        close("ratio_fp32", 4.0 * parameters / on_disk as f64);
        assert!(figures["seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(figures["tensors"], 56);
        for key in ["file_bytes", "bits_per_weight", "ratio_fp32", "tensors", "parameters", "components"] {
            assert_eq!(figures[key], predicted[key], "{key}");
        }
        succeeded(&run(bkpack().arg("verify").arg(&output)));
        std::fs::read_dir(&folder).unwrap().for_each(|entry| std::fs::remove_file(entry.unwrap().path()).unwrap());
    }
}

#[test]
fn eval_prints_its_figures() {
    let (_folder, packed) = packed();
    let eval = |arguments: &[&str]| {
        let outcome = run(bkpack()
            .arg("eval")
            .arg(&packed)
            .args(["--json", "--limit-tokens", "300", "--ctx", "128", "--text"])
            .arg(text())
            .args(arguments));
        assert!(outcome.stderr.is_empty(), "{outcome:?}");
        json(&succeeded(&outcome))
    };
    let always =
        ["ppl", "nll", "scored", "bits_per_weight", "ratio_fp32", "file_bytes", "tokens_per_second", "activations"];
    let compared = ["baseline_ppl", "ppl_increase_percent", "kld_mean", "kld_p999", "top1_agreement"];
    let alone = eval(&[]);
    assert!(always.iter().all(|key| alone.contains_key(*key)), "{alone:?}");
    assert!(!compared.iter().any(|key| alone.contains_key(*key)), "{alone:?}");
    assert_eq!(alone["file_bytes"], packed.metadata().unwrap().len());
    assert_eq!(alone["scored"], 2 * 127);
    let both = eval(&["--baseline", fixture().to_str().unwrap()]);
    assert!(always.iter().chain(&compared).all(|key| both.contains_key(*key)), "{both:?}");
    assert_eq!(both["ppl"], alone["ppl"]);
    let kld = both["kld_mean"].as_f64().unwrap();
    assert!(kld > 0.0 && kld < 0.5, "{kld}");
}

#[test]
fn verify_decides_by_its_exit_status() {
    let (_folder, packed) = packed();
    let verify = |arguments: &[&str]| run(bkpack().arg("verify").arg(&packed).args(arguments));
    let baseline = fixture();
    let quality = |increase: &str| {
        let measured = ["--limit-tokens", "300", "--ctx", "128", "--baseline", baseline.to_str().unwrap()];
        let text = text();
        verify(&[&measured[..], &["--text", text.to_str().unwrap(), "--max-ppl-increase", increase]].concat())
    };
    succeeded(&verify(&[]));
    assert!(succeeded(&verify(&["--min-ratio", "5"])).contains("PASS"));
    for (outcome, check) in [(verify(&["--min-ratio", "9"]), "ratio"), (quality("0.001%"), "perplexity")] {
        assert_eq!(outcome.status.code(), Some(1), "{outcome:?}");
        let table = String::from_utf8(outcome.stdout).unwrap();
        let failed: Vec<&str> = table.lines().filter(|line| line.contains("FAIL")).collect();
        assert!(failed.len() == 1 && failed[0].contains(check), "{table}");
    }
    succeeded(&quality("50%"));
    let report = json(&String::from_utf8(verify(&["--json", "--min-ratio", "9"]).stdout).unwrap());
    assert_eq!(report["passed"], false);

    let mut bytes = std::fs::read(&packed).unwrap();
    let place = bytes.len() - 100;
    bytes[place] ^= 1;
    std::fs::write(&packed, &bytes).unwrap();
    let outcome = verify(&[]);
    assert_eq!(outcome.status.code(), Some(1), "{outcome:?}");
    assert!(String::from_utf8(outcome.stdout).unwrap().contains("does not match its BLAKE3 hash"));
    bytes[100] ^= 1;
    std::fs::write(&packed, &bytes).unwrap();
    assert_eq!(verify(&["-q"]).status.code(), Some(1));
}

#[test]
fn wrong_use_is_told_apart_from_failed_checks() {
    let (folder, packed) = packed();
    let missing = folder.path().join("missing");
    let of = |arguments: &[&str]| run(bkpack().args(arguments));
    let (packed, missing, there) =
        (packed.to_str().unwrap(), missing.to_str().unwrap(), folder.path().to_str().unwrap());
    let source = fixture();
    let source = source.to_str().unwrap();
    let before = names(folder.path());
    for arguments in [
        &["verify", missing][..],
        &["verify", there],
        &["inspect", missing],
        &["inspect", there],
        &["explain", missing],
        &["explain", there],
        &["diff", packed, missing],
        &["eval", missing, "--text", packed],
        &["eval", packed, "--text", missing],
        &["eval", packed, "--text", packed],
        &["archive", missing, "-o", "x"],
        &["unpack", missing, "-o", "x"],
        &["convert", missing, "-o", "x"],
        &["convert", there, "-o", "x"],
        &["convert", source, "-o", missing, "--keep", "("],
        &["convert", source, "-o", missing, "--keep", "no such tensor"],
        &["convert", source, "-o", missing, "--tensor", "embed"],
        &["convert", source, "-o", missing, "--tensor", "embed=int9"],
        &["convert", source, "-o", missing, "--bits", "1.58", "--asymmetric"],
        &["convert", source, "-o", missing, "--ternary-threshold", "2"],
        &["verify", packed, "--max-ppl-increase", "1%", "--baseline", packed],
    ] {
        refused(&of(arguments), &[]);
    }
    for arguments in [
        &[][..],
        &["frobnicate"],
        &["convert", source],
        &["convert", source, "-o", missing, "--bits", "9"],
        &["convert", source, "-o", missing, "--group-size", "100"],
        &["convert", source, "-o", missing, "--shard-size", "0"],
        &["convert", source, "-o", missing, "--threads", "0"],
        &["verify", packed, "--min-ratio", "many"],
        &["eval", packed],
        &["completions", "tcsh"],
    ] {
        let outcome = of(arguments);
        assert_eq!(outcome.status.code(), Some(2), "{outcome:?}");
        assert!(!outcome.stderr.is_empty() && outcome.stdout.is_empty(), "{outcome:?}");
    }
    assert_eq!(names(folder.path()), before);
}

#[test]
fn an_unknown_instruction_set_is_an_error() {
    let folder = TempDir::new().unwrap();
    let output = folder.path().join("model.bkpack");
    let convert = |isa: &str| run(bkpack().env("BKPACK_ISA", isa).arg("convert").arg(fixture()).arg("-o").arg(&output));
    refused(&convert("nonsense"), &["nonsense", "scalar, avx2, avx512 or amx"]);
    refused(&convert(""), &["scalar"]);
    assert!(names(folder.path()).is_empty());
    let eval = run(bkpack().env("BKPACK_ISA", "sse9").arg("eval").arg(fixture()).arg("--text").arg(text()));
    refused(&eval, &["sse9"]);
}

#[test]
fn nothing_is_overwritten_unless_asked() {
    let (folder, packed) = packed();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("precious"), "precious").unwrap();
    let commands: [(&str, &Path); 3] =
        [("convert", &fixture()), ("archive", &packed), ("unpack", &path("model.archive"))];
    for (command, input) in commands {
        if command == "unpack" {
            succeeded(&run(bkpack().arg("archive").arg(&packed).arg("-o").arg(path("model.archive"))));
        }
        let onto = |output: &Path| bkpack().arg(command).arg(input).arg("-o").arg(output).output().unwrap();
        refused(&onto(&path("precious")), &["precious", "--force"]);
        assert_eq!(std::fs::read(path("precious")).unwrap(), b"precious");
        refused(&onto(&path("no/such/folder/model.bkpack")), &["no/such/folder"]);
        refused(&onto(folder.path()), &[]);
    }
    // Shards and their index do not overwrite either.
    let shards = |extra: &[&str]| {
        let arguments = ["--shard-size", "1MB", "-q"];
        run(bkpack().arg("convert").arg(fixture()).arg("-o").arg(path("sharded.bkpack")).args(arguments).args(extra))
    };
    succeeded(&shards(&[]));
    let before = names(folder.path());
    refused(&shards(&[]), &["sharded", "--force"]);
    succeeded(&shards(&["--force"]));
    assert_eq!(names(folder.path()), before);

    let before = std::fs::read(&packed).unwrap();
    let again =
        |extra: &[&str]| run(bkpack().arg("convert").arg(fixture()).arg("-o").arg(&packed).args(["-q"]).args(extra));
    refused(&again(&["--bits", "8"]), &["model.bkpack", "--force"]);
    assert_eq!(std::fs::read(&packed).unwrap(), before);
    succeeded(&again(&["--bits", "8", "--force"]));
    assert!(std::fs::read(&packed).unwrap().len() > before.len());
}

#[test]
fn the_input_is_never_the_output() {
    let folder = TempDir::new().unwrap();
    let source = folder.path().join("source");
    std::fs::create_dir(&source).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture().join(name), source.join(name)).unwrap();
    }
    let weights = source.join("model.safetensors");
    let before = std::fs::read(&weights).unwrap();
    let convert =
        |input: &Path, output: &Path| run(bkpack().arg("convert").arg(input).arg("-o").arg(output).arg("--force"));
    refused(&convert(&weights, &weights), &["model.safetensors"]);
    refused(&convert(&source, &weights), &["model.safetensors"]);
    refused(&convert(&source, &source.join("config.json")), &["config.json"]);
    let roundabout = source.join("../source/model.safetensors");
    refused(&convert(&source, &roundabout), &["model.safetensors"]);
    assert!(std::fs::read(&weights).unwrap() == before);
    // Beside the weights there is room.
    succeeded(&convert(&source, &source.join("model.bkpack")));
    for (command, extra) in [("archive", "--force"), ("unpack", "--force")] {
        let packed = source.join("model.bkpack");
        refused(&run(bkpack().arg(command).arg(&packed).arg("-o").arg(&packed).arg(extra)), &["model.bkpack"]);
    }
}

#[test]
fn quiet_means_quiet() {
    // No config.json: a notice is due.
    let (source, folder) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let tensors = [Stored::random("a.weight", "F32", &[64, 64], 1.0, &mut Random(3))];
    std::fs::write(source.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    let path = |name: &str| folder.path().join(name);
    let convert = |name: &str, extra: &[&str]| {
        run(bkpack().arg("convert").arg(source.path()).arg("-o").arg(path(name)).args(extra))
    };
    let loud = convert("loud.bkpack", &[]);
    assert!(loud.stderr.starts_with(b"note: ") && !loud.stdout.is_empty(), "{loud:?}");
    let silent = |outcome: Output| {
        assert_eq!((outcome.status.code(), outcome.stdout, outcome.stderr), (Some(0), vec![], vec![]))
    };
    silent(convert("quiet.bkpack", &["-q"]));
    silent(run(bkpack().arg("verify").arg(path("quiet.bkpack")).arg("-q")));
    silent(run(bkpack().arg("archive").arg(path("quiet.bkpack")).arg("-o").arg(path("archive")).arg("-q")));
    silent(run(bkpack().arg("unpack").arg(path("archive")).arg("-o").arg(path("again.bkpack")).arg("-q")));
    refused(&convert("quiet.bkpack", &["-q"]), &["--force"]);
}

#[test]
fn every_subcommand_shows_examples() {
    let help = succeeded(&run(bkpack().arg("--help")));
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let subcommands: Vec<&str> = listed.filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    assert!(subcommands.len() >= 10, "{subcommands:?}");
    for subcommand in subcommands.iter().filter(|name| !name.is_empty() && **name != "help") {
        let help = succeeded(&run(bkpack().args([subcommand, "--help"])));
        assert!(help.contains("Examples:") && help.contains(&format!("  bkpack {subcommand}")), "{subcommand}: {help}");
    }
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = succeeded(&run(bkpack().args(["completions", shell])));
        assert!(script.contains("bkpack") && script.contains("convert"), "{shell}");
    }
}

/// Runs with a standard output that nobody reads.
fn into_closed_pipe(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    child.wait_with_output().unwrap()
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let (_folder, packed) = packed();
    let packed = packed.to_str().unwrap();
    for arguments in [
        &["inspect", packed][..],
        &["explain", packed],
        &["explain", packed, "--json"],
        &["inspect", packed, "--json"],
        &["diff", packed, packed],
        &["verify", packed],
        &["completions", "bash"],
        &["completions", "zsh"],
        &["--help"],
        &["convert", "--help"],
    ] {
        let outcome = into_closed_pipe(bkpack().args(arguments));
        assert_eq!(outcome.status.code(), Some(0), "{arguments:?}: {outcome:?}");
        assert!(outcome.stderr.is_empty(), "{arguments:?}: {outcome:?}");
    }
}

#[test]
fn a_standard_output_that_is_full_is_an_error() {
    let (_folder, packed) = packed();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for arguments in [["inspect", packed.to_str().unwrap()], ["completions", "bash"]] {
        refused(&run(bkpack().args(arguments).stdout(full())), &["standard output"]);
    }
}

/// Runs under a limit on the size of files, which stands in for a full disk. The signal that comes with the limit is
/// ignored, so that writing fails as it does on a full disk.
fn with_file_limit(kilobytes: usize) -> Command {
    let mut command = Command::new("sh");
    // POSIX counts in blocks of 512 bytes.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * kilobytes);
    command.arg("-c").arg(script).arg(cargo_bin("bkpack"));
    command
}

#[test]
fn a_full_disk_leaves_nothing() {
    let (folder, packed) = packed();
    let archived = folder.path().join("archive");
    succeeded(&run(bkpack().arg("archive").arg(&packed).arg("-o").arg(&archived)));
    let target = TempDir::new().unwrap();
    let output = target.path().join("out.bkpack");
    for kilobytes in [1, 100, 500, 1500] {
        for (command, input, extra) in [
            ("convert", fixture().as_path(), &[][..]),
            ("convert", &fixture(), &["--shard-size", "1600KB"]),
            ("archive", &packed, &[]),
            ("unpack", &archived, &[]),
        ] {
            let outcome = run(with_file_limit(kilobytes).arg(command).arg(input).arg("-o").arg(&output).args(extra));
            refused(&outcome, &[output.parent().unwrap().to_str().unwrap(), "File too large"]);
            assert_eq!(names(target.path()), BTreeSet::new(), "{command} with {kilobytes} kB");
        }
    }
    // The limit does not spoil what fits.
    succeeded(&run(with_file_limit(100_000).arg("convert").arg(fixture()).arg("-o").arg(&output)));
    succeeded(&run(bkpack().arg("verify").arg(&output)));
}

/// Waits until the conversion has begun to write.
fn wait_for_partial_file(folder: &Path, child: &mut Child) {
    let start = Instant::now();
    while !names(folder).iter().any(|name| name.starts_with(".bkpack-") && name.ends_with(".partial")) {
        assert_eq!(child.try_wait().unwrap(), None, "the conversion ended before it was interrupted");
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(signal: &str, child: &Child) {
    let script = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
}

/// Waits for the end; returns the status and what was said on standard error.
fn finish(mut child: Child) -> (ExitStatus, String) {
    let mut message = String::new();
    child.stderr.take().unwrap().read_to_string(&mut message).unwrap();
    (child.wait().unwrap(), message)
}

#[test]
fn interrupted_conversions_leave_nothing() {
    let (source, target) = (large(), TempDir::new().unwrap());
    let output = target.path().join("model.bkpack");
    for signal in ["INT", "TERM"] {
        for extra in [&[][..], &["--shard-size", "10MB"]] {
            let mut child = bkpack()
                .arg("convert")
                .arg(source.path())
                .arg("-o")
                .arg(&output)
                .args(["-q", "--threads", "1"])
                .args(extra)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            wait_for_partial_file(target.path(), &mut child);
            send(signal, &child);
            let (status, message) = finish(child);
            assert_eq!((status.code(), message.as_str()), (Some(130), "error: cancelled\n"));
            assert_eq!(names(target.path()), BTreeSet::new(), "{signal} {extra:?}");
        }
    }
}

#[test]
fn killed_conversions_leave_no_half_file_under_the_final_name() {
    let (source, target) = (large(), TempDir::new().unwrap());
    let output = target.path().join("model.bkpack");
    let start = |extra: &[&str]| {
        let mut command = bkpack();
        command.arg("convert").arg(source.path()).arg("-o").arg(&output).args(["-q", "--rounding", "rtn"]).args(extra);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let clean =
        || std::fs::read_dir(&target).unwrap().for_each(|entry| std::fs::remove_file(entry.unwrap().path()).unwrap());
    let mut random = Random(30);
    for extra in [&[][..], &["--shard-size", "10MB"]] {
        let begun = Instant::now();
        assert_eq!(finish(start(extra)).0.code(), Some(0));
        let whole = begun.elapsed();
        let (mut complete, mut killed) = (0, 0);
        for _ in 0..15 {
            clean();
            let mut child = start(extra);
            std::thread::sleep(whole.mul_f64(1.1 * random.below(1000) as f64 / 1000.0));
            child.kill().unwrap();
            killed += usize::from(finish(child).0.code().is_none());
            // A sharded model is there when its index is.
            let index = target.path().join("model.bkpack.index.json");
            if output.exists() || index.exists() {
                complete += 1;
                succeeded(&run(bkpack().arg("verify").arg(&output)));
            }
            let unfinished = |name: &String| name.starts_with(".bkpack-") && name.ends_with(".partial");
            let shards = names(target.path()).into_iter().filter(|name| !unfinished(name) && name.contains("-of-"));
            for shard in shards {
                let path = target.path().join(shard);
                let bytes = std::fs::read(&path).unwrap();
                bkpack::checkpoint::header::Header::read(&path, &bytes).unwrap();
            }
        }
        clean();
        assert!(killed >= 5, "{killed} of 15 were killed, {complete} complete: the times are too long");
    }
}

#[test]
fn inspect_shows_complex_halves_and_quantized_activations() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/vectors/valid");
    let table = succeeded(&run(bkpack().arg("inspect").arg(vectors.join("complex.bkpack"))));
    let line = |name: &str| table.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
    assert!(line("mixed.real").contains("(real part)") && line("mixed.imag").contains("(imaginary part)"));
    assert!(!line("alone.real").contains("part"));
    let packed = vectors.join("activations.bkpack");
    let table = succeeded(&run(bkpack().arg("inspect").arg(&packed)));
    assert!(table.contains("bk_core INT8 g3, 10 positions, calibrated on 100 windows of calibration.txt"), "{table}");
    let object = json(&succeeded(&run(bkpack().args(["inspect", "--json"]).arg(&packed))));
    assert_eq!(object["activations"][0]["scales"][1], "blocks.10.bk_layer.activation_scale");
    // Scales of activations are no weights.
    assert_eq!(object["parameters"], 40);
    assert_eq!(object["tensors"].as_array().unwrap().len(), 3);
}

#[test]
fn no_file_of_a_sharded_input_is_replaced() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut convert = bkpack();
    convert.arg("convert").arg(fixture()).arg("-o").arg(path("m.bkpack"));
    succeeded(&run(convert.args(["-q", "--rounding", "rtn", "--shard-size", "1MB"])));
    let before: Vec<(String, Vec<u8>)> =
        names(folder.path()).into_iter().map(|name| (name.clone(), std::fs::read(path(&name)).unwrap())).collect();
    assert!(before.len() > 2);
    for input in ["m.bkpack", "m.bkpack.index.json"] {
        for output in before.iter().map(|(name, _)| name.as_str()).chain(["m.bkpack"]) {
            let mut report = bkpack();
            report.arg("report").arg(path(input)).arg("-o").arg(path(output)).arg("--force");
            refused(&run(&mut report), &["--output", "is the input itself"]);
        }
    }
    assert!(before.iter().all(|(name, bytes)| std::fs::read(path(name)).unwrap() == *bytes));
}

#[test]
fn a_tensor_cannot_have_the_name_of_the_metadata() {
    let folder = TempDir::new().unwrap();
    let (source, output) = (folder.path().join("w.safetensors"), folder.path().join("w.bkpack"));
    std::fs::write(&source, safetensors(&[Stored::random("w", "F32", &[64], 1.0, &mut Random(1))])).unwrap();
    let mut convert = bkpack();
    convert.arg("convert").arg(&source).arg("-o").arg(&output).args(["-q", "--rename", "^w$=__metadata__"]);
    refused(&run(&mut convert), &["__metadata__", "the header", "rename it"]);
    assert!(!output.exists());
}
