//! The bar chart of importances, as a figure, as files and by its command.

use std::path::Path;

use bkpack::report::{
    figure::Format,
    importance::{Bar, MOST_BARS, draw},
};

use crate::{bkpack, keep, svg::Drawing};

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
