//! Perplexity against compute.

use bkpack::report::{efficiency::Efficiency, efficiency_figure, results::Configuration, simulate};

use crate::{keep, svg::Drawing};

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
        details: Default::default(),
    };
    values.iter().enumerate().map(of).collect()
}

#[test]
fn efficiency_draws_points_frontier_and_comparisons() {
    let data = Efficiency::new(&simulate::configurations(42, 10), &[], 30.0).unwrap();
    let figure = efficiency_figure::draw(&data, "Dynamic efficiency");
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
        let figure = efficiency_figure::draw(&data, &format!("Case {name}"));
        keep(&figure, &format!("efficiency-{name}"));
        let drawing = Drawing::of(&figure);
        drawing.assert_tidy();
        let numbers = |group| drawing.texts_of(group).iter().filter(|text| text.starts_with('[')).count();
        assert_eq!(numbers("values"), numbers("metrics"), "{name}: each number has its line");
    }
    let broken = Efficiency::new(&configurations("x", &[(1e6, f64::NAN)]), &[], 30.0);
    assert_eq!(broken.unwrap_err(), "no configuration has a finite perplexity");
}

#[test]
fn what_has_no_room_is_told_below_the_plot() {
    // Dense lines on both sides of the compared points leave no place for words.
    let wave = |model: &str, base: f64| {
        let values: Vec<(f64, f64)> =
            (0..60).map(|step| (1e6 + 2e4 * f64::from(step), base + 15.0 * f64::from(step % 2))).collect();
        configurations(model, &values)
    };
    let points = [wave("resnetbk", 40.0), wave("mamba", 44.0), wave("llama", 48.0), wave("other", 36.0)].concat();
    let data = Efficiency::new(&points, &[], 30.0).unwrap();
    let figure = efficiency_figure::draw(&data, "Crowd");
    keep(&figure, "efficiency-crowd");
    let drawing = Drawing::of(&figure);
    drawing.assert_tidy();
    let told = [drawing.texts_of("values"), drawing.texts_of("metrics")].concat();
    assert!(told.iter().any(|text| text.contains("ResNet-BK 1.00 MFLOPs, PPL 40.00")), "{told:?}");
    for text in ["1.00 MFLOPs, PPL 44.00", "9.1 % lower PPL"] {
        assert!(told.iter().any(|line| line.contains(text)), "{text} in {told:?}");
    }
}
