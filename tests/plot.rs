//! Figures: their marks, their files, and what they make of bad input.

#[path = "figures/svg.rs"]
mod svg;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use assert_cmd::cargo::cargo_bin;
use bkpack::report::{
    efficiency::Efficiency,
    efficiency_figure,
    figure::{Figure, Format},
    importance::{Bar, MOST_BARS, draw},
    results::{Configuration, Quantized},
    robustness::Robustness,
    robustness_figure, simulate,
    tensors::{self, Stored},
};
use svg::Drawing;

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

fn bars(count: usize) -> Vec<Bar> {
    let kinds = [("self_attn.q_proj", "other"), ("mlp.down_proj", "other"), ("moe.experts.3.w1", "expert")];
    (0..count)
        .map(|index| {
            let (kind, component) = kinds[index % kinds.len()];
            let score = 3.1 - 4.5 * (index as f64 / count as f64).powf(0.6);
            Bar { name: format!("model.layers.{index}.{kind}.weight"), component: component.into(), score }
        })
        .collect()
}

#[test]
fn importance_shows_every_bar_of_few_and_both_ends_of_many() {
    for (count, shown) in [(0, 0), (1, 1), (10, 10), (MOST_BARS, MOST_BARS), (300, MOST_BARS)] {
        let figure = draw("Importance", "of a test", &bars(count));
        keep(&figure, &format!("importance-{count}"));
        let drawing = Drawing::of(&figure);
        let texts = drawing.texts_of("bars");
        // A name and a value a bar, and one line for those between.
        let gap = usize::from(count > shown);
        assert_eq!(texts.len(), 2 * shown + gap, "{count} bars");
        assert_eq!(drawing.count("bars", "rect"), shown + gap);
        assert_eq!(gap == 1, texts.iter().any(|text| text.starts_with("… 240 more, from ")), "{texts:?}");
        let experts = drawing.colors("bars", "rect").iter().filter(|color| **color == "#e69f00").count();
        assert_eq!(experts, shown / 3, "one in three is an expert, and they have a colour of their own");
        drawing.assert_tidy();
    }
}

#[test]
fn importance_stays_tidy_with_hostile_names_and_equal_scores() {
    let long = "x".repeat(3000);
    let names = [long.as_str(), "a\u{1b}[31mb", "$\\alpha$ & <b>", "語", ""];
    let bar = |name: &&str| Bar { name: (*name).into(), component: (*name).into(), score: 0.0 };
    let figure = draw(&long, &long, &names.iter().map(bar).collect::<Vec<_>>());
    keep(&figure, "importance-hostile");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    assert!(drawing.texts_of("bars").iter().any(|text| text == "$\\alpha$ & <b>"), "{:?}", drawing.texts_of("bars"));
    let one = Bar { name: "w".into(), component: "other".into(), score: -1e300 };
    let two = Bar { name: "v".into(), component: "bk_core".into(), score: 1e-300 };
    Drawing::of(&draw("t", "s", &[two, one])).assert_tidy();
}

#[test]
fn files_are_those_of_their_formats_and_the_same_in_every_run() {
    let figure = draw("Importance", "of a test", &bars(12));
    let (width, _) = figure.size();
    for format in Format::ALL {
        let bytes = figure.render(format, 150).unwrap();
        assert_eq!(bytes, figure.render(format, 150).unwrap(), "{format:?} differs between runs");
        match format {
            Format::Pdf => assert!(bytes.starts_with(b"%PDF-1.") && has(&bytes, b"/FontFile"), "no embedded font"),
            Format::Svg => assert!(bytes.starts_with(b"<svg ") && has(&bytes, b"data:font/ttf;base64,")),
            Format::Eps => {
                assert!(bytes.starts_with(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 468 "));
                assert!(bytes.ends_with(b"showpage\n%%EOF\n") && bytes.is_ascii());
            }
            Format::Png => {
                let mut reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info().unwrap();
                let info = reader.info();
                assert_eq!(f64::from(info.width), (width * 150.0 / 72.0).round());
                assert_eq!(info.pixel_dims.unwrap().xppu, 5906);
                let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
                reader.next_frame(&mut pixels).unwrap();
                assert!(pixels.chunks(3).any(|pixel| pixel == [0, 0x72, 0xb2]), "no blue bar");
            }
        }
    }
}

fn has(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_importance_command_draws_its_scores() {
    let folder = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures/mixtral");
    let (tokens, output) = (folder.path().join("ids.json"), folder.path().join("importance.json"));
    let ids: Vec<u32> = (0..200).map(|i| (i * i * 31 + i * 7) % 96).collect();
    std::fs::write(&tokens, serde_json::to_string(&ids).unwrap()).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let run = |plot: &str, more: &[&str]| {
        let plot = path(&folder.path().join(plot));
        let (model, tokens, output) = (path(&model), path(&tokens), path(&output));
        let fixed = [
            "importance",
            &model,
            "--tokens",
            &tokens,
            "--ctx",
            "20",
            "--batches",
            "2",
            "-o",
            &output,
            "--plot",
            &plot,
        ];
        bkpack(&[&fixed[..], more].concat())
    };
    let refused = run("scores.jpg", &[]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(message, "error: --plot: a figure is written as pdf, svg, png or eps, not jpg\n");
    assert!(!output.exists(), "checked before the work");
    // The name of the output, of its preview and of the tokens: nothing is measured, nothing replaced.
    std::fs::write(folder.path().join("taken.png"), "a picture").unwrap();
    let refused = run("taken.svg", &[]);
    assert!(refused.status.code() == Some(2) && String::from_utf8_lossy(&refused.stderr).contains("taken.png exists"));
    let bare = |output: &str, plot: &str, tokens: &Path| {
        let (model, tokens) = (path(&model), path(tokens));
        let fixed = ["importance", &model, "--tokens", &tokens, "--ctx", "20", "--batches", "2", "--force"];
        let (output, plot) = (path(&folder.path().join(output)), path(&folder.path().join(plot)));
        let refused = bkpack(&[&fixed[..], &["-o", &output, "--plot", &plot]].concat());
        (refused.status.code(), String::from_utf8_lossy(&refused.stderr).into_owned())
    };
    for (output, plot) in [("scores.svg", "scores.svg"), ("scores.png", "scores.svg"), ("scores.png", "./scores")] {
        let (status, message) = bare(output, plot, &tokens);
        assert!(status == Some(2) && message.contains("is another output of this command"), "{message}");
        assert!(!folder.path().join(output).exists());
    }
    let odd = folder.path().join("ids.svg");
    std::fs::copy(&tokens, &odd).unwrap();
    let (status, message) = bare("importance.json", "ids.svg", &odd);
    assert!(
        status == Some(2) && message.starts_with("error: --plot: ") && message.contains("the input itself"),
        "{message}"
    );
    assert!(!output.exists());

    let done = run("scores.svg", &[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let drawing = Drawing::parse(&std::fs::read_to_string(folder.path().join("scores.svg")).unwrap());
    drawing.assert_tidy();
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    let first = written["tensors"][0]["name"].as_str().unwrap();
    assert_eq!(drawing.texts_of("bars")[0], first);
    assert!(folder.path().join("scores.png").exists(), "the preview");
    assert!(drawing.texts().iter().any(|text| text.contains("2 windows of 20 tokens of ids.json")));
    assert_eq!(run("scores.svg", &[]).status.code(), Some(2), "nothing is overwritten");
    assert!(run("scores.svg", &["--force"]).status.success());
}

fn quantized(model: &str, values: &[(f64, f64)]) -> Vec<Quantized> {
    let point = |&(bits, ppl): &(f64, f64)| {
        let perplexity = Some(ppl).filter(|ppl| ppl.is_finite());
        Quantized {
            model: model.into(),
            width: bits.into(),
            perplexity,
            looks_ahead: false,
            simulated: false,
            protocol: None,
        }
    };
    values.iter().map(point).collect()
}

/// The trained reference models, as the README gives them, and one that breaks.
fn measured() -> Vec<Quantized> {
    let widths = |values: [f64; 5]| [32.0, 16.0, 8.0, 4.0, 2.0].into_iter().zip(values).collect::<Vec<_>>();
    let mut points = quantized("resnetbk", &widths([94.56, 94.56, 94.56, 94.557, 104.84]));
    points.extend(quantized("mamba", &widths([46.0423, 46.0423, 46.0444, 46.41, 122.0411])));
    points.extend(quantized("llama", &widths([48.7955, 48.7955, 48.794, 49.0395, 53.1])));
    points
}

#[test]
fn robustness_draws_every_point_once() {
    let data = Robustness::new(simulate::quantized(42), &[], &[], 100.0).unwrap();
    let (figure, unlabelled) = robustness_figure::draw(&data, "Quantization robustness");
    keep(&figure, "robustness-simulated");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    assert_eq!((unlabelled, drawing.texts_of("values").len()), (0, 10));
    assert_eq!(drawing.colors("lines", "path"), ["#0072b2", "#d55e00"], "ResNet-BK is blue, Mamba red");
    // A star for the deployable model at INT4, two strokes of a cross for the other.
    assert_eq!(drawing.colors("markers", "path").iter().filter(|color| **color == "#009e73").count(), 1);
    assert_eq!(drawing.colors("markers", "path").iter().filter(|color| **color == "#b30000").count(), 1);
    assert_eq!((drawing.count("threshold", "line"), drawing.count("deployable", "rect")), (1, 1));
    assert_eq!(drawing.texts_of("watermark"), ["SIMULATED"]);
    for text in
        ["FP32", "FP16", "INT8", "INT4", "INT2", "ResNet-BK", "Mamba", "deployable at INT4", "deployment threshold"]
    {
        assert!(drawing.texts().contains(&text), "{text} in {:?}", drawing.texts());
    }
}

#[test]
fn robustness_of_measured_models_has_no_watermark() {
    let data = Robustness::new(measured(), &[], &[], 100.0).unwrap();
    let (figure, _) = robustness_figure::draw(&data, "Quantization robustness");
    keep(&figure, "robustness-measured");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    assert!(drawing.texts_of("watermark").is_empty());
    assert_eq!(drawing.count("lines", "path"), 3);
}

#[test]
fn robustness_is_tidy_whatever_the_data() {
    let cases: Vec<(&str, Vec<Quantized>, f64)> = vec![
        ("one-point", quantized("llama", &[(4.0, 20.0)]), 100.0),
        ("equal", quantized("llama", &[(8.0, 100.0), (4.0, 100.0)]), 100.0),
        (
            "not-finite",
            [measured(), quantized("z", &[(4.0, f64::NAN), (2.0, f64::NAN)]), quantized("y", &[(2.0, f64::NAN)])]
                .concat(),
            100.0,
        ),
        ("huge", quantized("mamba", &[(32.0, 1.5), (8.0, 1e12), (1.58, 1e300), (1.0, 40.0)]), 100.0),
        ("far-threshold", measured(), 1e-6),
        (
            "crowd",
            (0..12)
                .flat_map(|i| {
                    quantized(
                        &format!("a model with the long name number {i}"),
                        &[(32.0, 30.0), (8.0, 30.5 + 0.01 * f64::from(i)), (4.0, 31.0), (2.0, 33.0 + f64::from(i))],
                    )
                })
                .collect(),
            40.0,
        ),
        (
            "all-widths",
            quantized(
                "llama",
                &[
                    (32.0, 18.0),
                    (16.0, 18.0),
                    (8.0, 18.1),
                    (7.0, 18.2),
                    (6.0, 18.3),
                    (5.0, 18.9),
                    (4.0, 20.0),
                    (3.0, 31.0),
                    (2.0, 110.0),
                    (1.58, 400.0),
                    (1.0, 9000.0),
                ],
            ),
            100.0,
        ),
    ];
    for (name, points, threshold) in cases {
        let data = Robustness::new(points, &[], &[], threshold).unwrap();
        let (figure, unlabelled) = robustness_figure::draw(&data, &format!("Case {name}"));
        keep(&figure, &format!("robustness-{name}"));
        Drawing::of(&figure).assert_tidy();
        // Two models that fail at one width share one label.
        let most = if name == "not-finite" { 1 } else { 0 };
        assert!(unlabelled <= most || name == "crowd", "{name}: {unlabelled} values without a label");
    }
}

fn configurations(model: &str, values: &[(f64, f64)]) -> Vec<Configuration> {
    let of = |(index, &(flops, ppl)): (usize, &(f64, f64))| Configuration {
        model: model.into(),
        id: format!("{model}_config_{index}"),
        perplexity: Some(ppl).filter(|ppl| ppl.is_finite()),
        flops,
        compute_factor: None,
        looks_ahead: false,
        simulated: false,
        protocol: None,
    };
    values.iter().enumerate().map(of).collect()
}

#[test]
fn efficiency_draws_points_frontier_and_comparisons() {
    let data = Efficiency::new(&simulate::configurations(42, 10), &[], 30.0).unwrap();
    let (figure, _) = efficiency_figure::draw(&data, "Dynamic efficiency");
    keep(&figure, "efficiency-simulated");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    assert_eq!(drawing.colors("lines", "path"), ["#0072b2", "#d55e00"]);
    assert_eq!(
        (drawing.count("markers", "circle"), drawing.count("markers", "path")),
        (10, 11),
        "10 squares and a star"
    );
    assert_eq!((drawing.count("frontier", "path"), drawing.count("dominated", "path")), (1, 1));
    assert_eq!(drawing.texts_of("watermark"), ["SIMULATED"]);
    let metrics = drawing.texts_of("metrics");
    assert!(metrics[0].starts_with("Frontier: ") && metrics[1].contains("Mamba not reached (> "), "{metrics:?}");
}

#[test]
fn efficiency_is_tidy_whatever_the_data() {
    let measured = [
        configurations("resnetbk", &[(30e6, 94.5), (25e6, 96.0), (20e6, 120.0), (15e6, 400.0)]),
        configurations("mamba", &[(9.3e6, 46.0), (8e6, 60.0), (6e6, 150.0)]),
        configurations("llama", &[(12e6, 48.8), (10e6, 70.0), (5e6, 900.0), (4e6, f64::INFINITY)]),
    ];
    let cases: Vec<(&str, Vec<Configuration>)> = vec![
        ("measured", measured.concat()),
        ("one", configurations("llama", &[(1e6, 20.0)])),
        ("same-point", [configurations("resnetbk", &[(1e6, 20.0)]), configurations("mamba", &[(1e6, 20.0)])].concat()),
        ("wide", [configurations("a", &[(1.0, 1.5), (1e15, 1e8)]), configurations("b", &[(1e3, 5.0)])].concat()),
        (
            "crossing",
            [
                configurations("resnetbk", &[(2e9, 40.0), (4e9, 28.0)]),
                configurations("mamba", &[(2e9, 36.0), (4e9, 30.0)]),
            ]
            .concat(),
        ),
    ];
    for (name, points) in cases {
        let data = Efficiency::new(&points, &[], 30.0).unwrap();
        let (figure, _) = efficiency_figure::draw(&data, &format!("Case {name}"));
        keep(&figure, &format!("efficiency-{name}"));
        Drawing::of(&figure).assert_tidy();
    }
    let broken = Efficiency::new(&configurations("x", &[(1e6, f64::NAN)]), &[], 30.0);
    assert_eq!(broken.unwrap_err(), "no configuration has a finite perplexity");
}

fn stored(name: String, encoding: &str, bits: f64, bytes: u64) -> Stored {
    Stored { name, encoding: encoding.into(), bits, bytes }
}

#[test]
fn tensors_are_a_cell_for_each_layer_and_kind() {
    let mut found = vec![stored("model.embed_tokens.weight".into(), "FP16", 16.0, 98_304_000)];
    for layer in 0..32 {
        for (index, kind) in ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().enumerate() {
            let (encoding, bits) = [("INT8 g128", 8.0), ("INT4 g128", 4.0), ("INT3 g64", 3.0)][(layer + index) % 3];
            found.push(stored(format!("model.layers.{layer}.self_attn.{kind}.weight"), encoding, bits, 8_912_896));
        }
        for expert in 0..8 {
            let (encoding, bits) = if layer == 3 && expert > 4 { ("INT8 g128", 8.0) } else { ("INT2 g64", 2.0) };
            found.push(stored(format!("model.layers.{layer}.mlp.experts.{expert}.w1.weight"), encoding, bits, 123_456));
        }
        found.push(stored(format!("model.layers.{layer}.input_layernorm.weight"), "FP32", 32.0, 16_384));
    }
    found.push(stored("lm_head.weight".into(), "FP16", 16.0, 98_304_000));
    let figure = tensors::draw("Encodings of the tensors", "test-model, 46,702,848 parameters", &found);
    keep(&figure, "tensors");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    // Experts share a cell; it is grey where their encodings differ.
    let cells = drawing.colors("cells", "rect");
    assert_eq!((cells.len(), drawing.count("outside", "rect")), (32 * 6, 2));
    assert_eq!(cells.iter().filter(|color| **color == "#8c8c8c").count(), 1);
    let kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.experts.*.w1",
        "input_layernorm",
    ];
    assert_eq!(drawing.texts_of("kinds"), kinds);
    assert!(drawing.texts_of("legend").iter().any(|text| text == "INT2 g64 (253 tensors, 31.2 MB)"));
}

#[test]
fn tensors_are_tidy_whatever_their_names() {
    let odd = |name: &str| stored(name.into(), "INT4 g128", 4.0, 999_499_999_999_999);
    let long = format!("a.{}.0.{}", "b".repeat(500), "c".repeat(500));
    for names in
        [vec![], vec!["weight"], vec!["a.0.b", "z.0.b", "a.18446744073709551615.b", long.as_str(), "\u{7f}.1.\n"]]
    {
        let tensors: Vec<Stored> = names.iter().map(|name| odd(name)).collect();
        Drawing::of(&tensors::draw("Encodings", &long, &tensors)).assert_tidy();
    }
}

#[test]
fn tensors_of_a_huge_grid_are_cut_and_pixels_bounded() {
    let cell =
        |index: usize| stored(format!("model.layers.{}.kind{}.weight", index / 300, index % 300), "INT4", 4.0, 1);
    let mut tensors: Vec<Stored> = (0..300 * 300).map(cell).collect();
    tensors.extend((0..100).map(|index| stored(format!("outside{index}"), "INT4", 4.0, 1)));
    let figure = tensors::draw("Encodings", "of a test", &tensors);
    let drawing = Drawing::of(&figure);
    let [layers, kinds, outside] = tensors::MOST;
    assert_eq!((drawing.count("cells", "rect"), drawing.count("outside", "rect")), (layers * kinds, outside));
    assert_eq!(
        drawing.texts_of("left-out"),
        ["… not shown, but in sums and legend: 44 more layers, 236 more kinds, 36 more tensors outside …"]
    );
    assert_eq!(drawing.texts_of("sums")[0], "300 B", "of a whole column");
    let error = figure.render(Format::Png, 1200).unwrap_err().to_string();
    assert!(error.contains("pixels are too many; lower --dpi"), "{error}");
}

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
