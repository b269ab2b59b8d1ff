//! Perplexity against width.

use bkpack::report::{results::Quantized, robustness::Robustness, robustness_figure, simulate};

use crate::{keep, svg::Drawing};

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
            details: Default::default(),
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
    let figure = robustness_figure::draw(&data, "Quantization robustness");
    keep(&figure, "robustness-simulated");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    assert_eq!(drawing.texts_of("values").len(), 10, "each beside its point");
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
    let figure = robustness_figure::draw(&data, "Quantization robustness");
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
        let values = points.len();
        let data = Robustness::new(points, &[], &[], threshold).unwrap();
        let figure = robustness_figure::draw(&data, &format!("Case {name}"));
        keep(&figure, &format!("robustness-{name}"));
        let drawing = Drawing::of(&figure);
        drawing.assert_tidy();
        // Beside their points, or all of them in a table with a row a model, which its name begins.
        let tabulated = drawing.texts_of("values").len() == values + data.models.len();
        assert!(tabulated || drawing.texts_of("values").len() == values, "{name}: {:?}", drawing.texts_of("values"));
        assert_eq!(tabulated, ["not-finite", "crowd"].contains(&name), "{name}");
    }
}
