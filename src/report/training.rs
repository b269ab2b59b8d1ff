//! The course of a training.

use super::figure::{
    Anchor, Axes, Canvas, Figure, Sample, Text, colors, drawable, fit, labels::Area, legend, legend_rows,
};

/// What is drawn, in nats.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Steps and their losses, in order.
    pub losses: Vec<(u64, f64)>,
    /// Steps after which the packed model was measured, and its loss there.
    pub validation: Vec<(u64, f64)>,
    /// The loss of the model before it was quantized.
    pub baseline: Option<f64>,
}

const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 200.0;
const MARGIN: f64 = 10.0;
const LEFT: f64 = 48.0;

/// The mean over so many parts of the training is drawn as the line.
const PARTS: usize = 60;

/// Draws the loss of each step, its running mean, and what was measured along the way.
pub fn draw(title: &str, curve: &Curve) -> Figure {
    let title = fit(&drawable(title), 11.0, true, WIDTH - 2.0 * MARGIN);
    let mut entries = vec![
        (Sample::Fill(colors::SKY), "training text, each step".to_owned()),
        (Sample::Fill(colors::BLUE), "training text, mean".to_owned()),
    ];
    if !curve.validation.is_empty() {
        entries.push((Sample::Fill(colors::RED), "validation text, packed".to_owned()));
    }
    if curve.baseline.is_some() {
        entries.push((Sample::Dashes(colors::DARK), "validation text, before quantization".to_owned()));
    }
    let (entries, legend_height) = legend_rows(entries, MARGIN, WIDTH - MARGIN);
    let plot = Area { x: LEFT, y: 34.0 + legend_height, width: WIDTH - LEFT - MARGIN, height: HEIGHT };
    let steps = curve.losses.last().map_or(1, |(step, _)| *step).max(1) as f64;
    let (low, high) = span(curve);
    let at = |step: f64, loss: f64| {
        let share = (loss.clamp(low, high) - low) / (high - low);
        (plot.x + step / steps * plot.width, plot.bottom() - share * plot.height)
    };
    let mut canvas = Canvas::new(WIDTH, plot.bottom() + 38.0, &title);
    canvas.text((MARGIN, 20.0), &title, Text::new(11).bold());
    canvas.group("axes", |canvas| {
        let axes = Axes { plot, x: (0.0, steps), y: (low, high), log_x: false, log_y: false };
        canvas.axes(&axes, |layout| layout.with_ticks(6));
        let middle = Text::new(9).anchor(Anchor::Middle);
        canvas.text((plot.center().0, plot.bottom() + 30.0), "step", middle);
        canvas.rotated_text((16.0, plot.center().1), "cross-entropy (nats per token)", middle, Some(-90.0));
    });
    canvas.group("losses", |canvas| {
        let finite = curve.losses.iter().filter(|(_, loss)| loss.is_finite());
        let points: Vec<(f64, f64)> = finite.map(|&(step, loss)| at(step as f64, loss)).collect();
        if points.len() > 1 {
            canvas.polyline(points, colors::SKY, 0.6, "");
        }
        let means = means(&curve.losses);
        if means.len() > 1 {
            canvas.polyline(means.into_iter().map(|(step, loss)| at(step, loss)).collect(), colors::BLUE, 1.6, "");
        }
    });
    canvas.group("validation", |canvas| {
        if let Some(baseline) = curve.baseline.filter(|loss| loss.is_finite()) {
            let y = at(0.0, baseline).1;
            canvas.line((plot.x, y), (plot.right(), y), colors::DARK, 1.0, "4 2.5");
        }
        let finite = curve.validation.iter().filter(|(_, loss)| loss.is_finite());
        let points: Vec<(f64, f64)> = finite.map(|&(step, loss)| at(step as f64, loss)).collect();
        if points.len() > 1 {
            canvas.polyline(points.clone(), colors::RED, 1.2, "");
        }
        points.into_iter().for_each(|point| canvas.circle(point, 3.0, colors::RED));
    });
    legend(&mut canvas, &entries, 28.0);
    canvas.finish()
}

/// Means over parts of equally many steps, each at its middle.
fn means(losses: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let part = losses.len().div_ceil(PARTS).max(1);
    let mean = |part: &[(u64, f64)]| {
        let count = part.len() as f64;
        let sums = part.iter().fold((0.0, 0.0), |(steps, sum), (step, loss)| (steps + *step as f64, sum + loss));
        (sums.0 / count, sums.1 / count)
    };
    losses.chunks(part).map(mean).filter(|(_, loss)| loss.is_finite()).collect()
}

/// What the vertical axis spans.
fn span(curve: &Curve) -> (f64, f64) {
    let all = curve.losses.iter().chain(&curve.validation).map(|(_, loss)| *loss).chain(curve.baseline);
    let finite = all.filter(|loss| loss.is_finite());
    let (low, high) =
        finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)));
    if low > high {
        return (0.0, 1.0);
    }
    let room = (0.06 * (high - low)).max(0.01);
    (low - room, high + room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_course_is_drawn_whatever_it_is() {
        let losses: Vec<(u64, f64)> = (1..=200).map(|step| (step, 5.0 / step as f64)).collect();
        let whole = Curve { losses, validation: vec![(0, 6.0), (200, 0.1)], baseline: Some(0.05) };
        let one = Curve { losses: vec![(1, f64::NAN)], ..Curve::default() };
        for curve in [whole, one, Curve::default()] {
            let figure = draw("Training of <model>", &curve);
            let svg = figure.render(super::super::figure::Format::Svg, 72).unwrap();
            let svg = String::from_utf8(svg).unwrap();
            let svg = svg.split_once("</style>").expect("fonts come first").1;
            assert!(svg.contains("Training of &lt;model&gt;") && !svg.contains("NaN"));
            assert_eq!(svg.matches("<circle").count(), curve.validation.len());
        }
        assert_eq!(means(&[(1, 2.0), (2, 4.0)]), [(1.0, 2.0), (2.0, 4.0)]);
    }
}
