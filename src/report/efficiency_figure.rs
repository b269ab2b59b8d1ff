//! The figure of perplexity against floating-point operations.

use super::{
    efficiency::{Efficiency, EqualFlops, EqualPpl, Point, UNITS, flops},
    figure::{
        Anchor, Axes, Canvas, Figure, Sample, Series, Text, colors, drawable, fit,
        labels::{Area, Label, Segment, place},
        legend, legend_rows, shape_at, star, width,
    },
    robustness_figure::shown,
};

const WIDTH: f64 = 400.0;
const PLOT_HEIGHT: f64 = 200.0;
const MARGIN: f64 = 10.0;
/// Space for tick labels and the title of the vertical axis.
const LEFT: f64 = 52.0;
const LABEL: u32 = 7;
const SHADE: &str = "#eef5f2";
/// Values whose largest is this many times the smallest are drawn on a logarithmic axis.
const LOG_FROM: f64 = 4.0;
const DOTS: &str = "1.5 2";

/// Draws the configurations of all models, their frontier and the comparison of the first two. What is pointed out and finds
/// no room in the plot has a number there, and stands in the box below.
pub fn draw(data: &Efficiency, title: &str) -> Figure {
    let title = fit(&drawable(title), 11.0, true, WIDTH - 2.0 * MARGIN);
    let series = Series::of(&data.models);
    let comparison = Comparison::of(data);
    let (entries, legend_height) = legend_rows(legend_of(data, &series, &comparison), MARGIN, WIDTH - MARGIN);
    let legend_top = 28.0;
    let plot = Area { x: LEFT, y: legend_top + legend_height + 6.0, width: WIDTH - LEFT - MARGIN, height: PLOT_HEIGHT };

    let largest = data.points.iter().map(|point| point.flops).fold(0.0, f64::max);
    let (unit, unit_name) = UNITS.into_iter().find(|(size, _)| largest >= *size).unwrap_or(UNITS[UNITS.len() - 1]);
    let x = Scale::of(data.points.iter().map(|point| point.flops / unit), 0.05);
    let y = Scale::of(data.points.iter().map(|point| point.ppl), 0.1);
    let at = |flops: f64, ppl: f64| {
        (plot.x + x.share(flops / unit) * plot.width, plot.bottom() - y.share(ppl) * plot.height)
    };
    let of = |point: &Point| at(point.flops, point.ppl);
    let axes = Axes { plot, x: (x.low, x.high), y: (y.low, y.high), log_x: x.log, log_y: y.log };
    let corners: Vec<(f64, f64)> = data.frontier().into_iter().map(of).collect();
    let stairs = stairs(&corners, plot);
    let lines: Vec<Vec<(f64, f64)>> = (0..series.len()).map(|model| data.of(model).map(of).collect()).collect();
    let spans = comparison.spans(at);

    let mut obstacles: Vec<Area> = data.points.iter().map(|point| Area::around(of(point), 3.5)).collect();
    let mut callouts = Vec::new();
    if let Some((_, target)) = &comparison.target {
        obstacles.push(Area::around(of(target), 6.5));
        callouts.push(Callout::of_point(target, of(target), 7.5, &series));
    }
    callouts.extend(comparison.others().into_iter().map(|point| Callout::of_point(point, of(point), 4.5, &series)));
    callouts.extend(spans.iter().map(|((from, to), text)| Callout {
        point: ((from.0 + to.0) / 2.0, (from.1 + to.1) / 2.0),
        clearance: 2.5,
        text: text.clone(),
        line: format!("{text} (dotted)"),
        color: colors::BLACK,
    }));
    let chains = lines.iter().chain([&stairs]);
    let mut segments: Vec<Segment> = chains.flat_map(|line| line.windows(2).map(|pair| (pair[0], pair[1]))).collect();
    segments.extend(spans.iter().map(|(segment, _)| *segment));
    let (values, below) = place_callouts(&callouts, &obstacles, &segments, plot.grown(-1.5));

    let metrics: Vec<String> = metrics(data, &series).into_iter().chain(below).collect();
    let metrics_box = Area {
        x: MARGIN,
        y: plot.bottom() + 40.0,
        width: WIDTH - 2.0 * MARGIN,
        height: 8.0 + 11.0 * metrics.len() as f64,
    };
    let mut canvas = Canvas::new(WIDTH, metrics_box.bottom() + MARGIN, &title);
    canvas.group("dominated", |canvas| canvas.path(dominated(&corners, plot), Some(SHADE), "none", 0.0));
    if data.simulated {
        canvas.watermark(plot);
    }
    canvas.text((MARGIN, 20.0), &title, Text::new(11).bold());
    canvas.group("axes", |canvas| {
        canvas.axes(&axes, |layout| layout.with_ticks(6));
        let middle = Text::new(9).anchor(Anchor::Middle);
        let log = |log| if log { ", log scale" } else { "" };
        let name = format!("compute a token ({unit_name}{})", log(x.log));
        canvas.text((plot.center().0, plot.bottom() + 30.0), &name, middle);
        let name = format!("perplexity (lower is better{})", log(y.log));
        canvas.rotated_text((16.0, plot.center().1), &name, middle, Some(-90.0));
    });
    canvas.group("frontier", |canvas| canvas.polyline(stairs.clone(), colors::GREEN, 1.4, "4 2.5"));
    canvas.group("lines", |canvas| {
        for (line, series) in lines.iter().zip(&series).filter(|(line, _)| line.len() > 1) {
            canvas.polyline(line.clone(), series.color, 1.4, "");
        }
    });
    canvas.group("comparison", |canvas| {
        for ((from, to), _) in &spans {
            canvas.line(*from, *to, colors::BLACK, 1.2, DOTS);
        }
    });
    canvas.group("markers", |canvas| {
        for point in &data.points {
            let series = &series[point.model];
            shape_at(canvas, series.shape, of(point), 3.0, series.color);
        }
        if let Some((_, target)) = &comparison.target {
            star(canvas, of(target), 6.5, colors::ORANGE);
        }
    });
    canvas.group("values", |canvas| {
        for (area, text, style) in &values {
            let baseline = area.bottom() - 0.22 * f64::from(LABEL);
            canvas.text((area.center().0, baseline), text, style.anchor(Anchor::Middle));
        }
    });
    canvas.group("metrics", |canvas| {
        canvas.rect(metrics_box, "#f4f4f4");
        for (index, line) in metrics.iter().enumerate() {
            let line = fit(line, 8.0, false, metrics_box.width - 12.0);
            canvas.text((metrics_box.x + 6.0, metrics_box.y + 12.0 + 11.0 * index as f64), &line, Text::new(8));
        }
    });
    legend(&mut canvas, &entries, legend_top);
    canvas.finish()
}

/// Something that is pointed out in the plot.
struct Callout {
    point: (f64, f64),
    /// How far from the point its text begins.
    clearance: f64,
    text: String,
    /// What it says where it does not stand beside its point.
    line: String,
    color: &'static str,
}

impl Callout {
    fn of_point(point: &Point, at: (f64, f64), clearance: f64, series: &[Series]) -> Self {
        let Series { name, color, .. } = &series[point.model];
        let text = described(point);
        Self { point: at, clearance, line: format!("{name} {text}"), text, color }
    }

    fn label(&self, text: &str, style: Text) -> Label {
        let size = f64::from(style.size);
        Label { point: self.point, width: width(text, size, style.bold), height: size, clearance: self.clearance }
    }
}

/// Texts where there is room for them, numbers in place of the others, and the lines that say what the numbers stand for.
fn place_callouts(
    callouts: &[Callout],
    obstacles: &[Area],
    segments: &[Segment],
    bounds: Area,
) -> (Vec<(Area, String, Text)>, Vec<String>) {
    let style = |callout: &Callout| Text::new(LABEL).color(callout.color);
    let wanted: Vec<Label> = callouts.iter().map(|callout| callout.label(&callout.text, style(callout))).collect();
    let places = place(&wanted, obstacles, segments, bounds);
    let mut taken: Vec<Area> = obstacles.iter().copied().chain(places.iter().flatten().copied()).collect();
    let (mut values, mut lines) = (Vec::new(), Vec::new());
    for (callout, area) in callouts.iter().zip(places) {
        if let Some(area) = area {
            values.push((area, callout.text.clone(), style(callout)));
            continue;
        }
        let (number, style) = (format!("[{}]", lines.len() + 1), style(callout).bold());
        let label = [callout.label(&number, style)];
        // A number is read over a line, too.
        let area = place(&label, &taken, segments, bounds)[0].or_else(|| place(&label, &taken, &[], bounds)[0]);
        // Without a number the line still tells FLOPs and perplexity, and so the point.
        lines.push(if area.is_some() { format!("{number} {}", callout.line) } else { callout.line.clone() });
        if let Some(area) = area {
            taken.push(area);
            values.push((area, number, style));
        }
    }
    (values, lines)
}

/// What is pointed out: the target, and the first two models side by side.
struct Comparison {
    /// The perplexity that is asked for, and the first model's cheapest configuration that reaches it.
    target: Option<(f64, Point)>,
    equal_ppl: Option<EqualPpl>,
    equal_flops: Option<EqualFlops>,
}

impl Comparison {
    fn of(data: &Efficiency) -> Self {
        let two = data.models.len() > 1;
        let compared = if two { data.equal_ppl() } else { Vec::new() };
        let equal_ppl = compared.iter().find(|it| it.points.iter().all(Option::is_some)).cloned();
        let asked = data.reaching(0, data.target_ppl).map(|point| (data.target_ppl, point.clone()));
        let both = || equal_ppl.as_ref().and_then(|it| Some((it.ppl, it.points[0].clone()?)));
        Self { target: asked.or_else(both), equal_ppl, equal_flops: data.equal_flops().into_iter().next() }
    }

    /// Points other than the target that deserve their numbers.
    fn others(&self) -> Vec<&Point> {
        let mut points: Vec<&Point> = Vec::new();
        let equal_ppl = self.equal_ppl.iter().flat_map(|it| it.points.iter().flatten());
        for point in equal_ppl.chain(self.equal_flops.iter().flat_map(|it| &it.points)) {
            if !points.contains(&point) && self.target.as_ref().is_none_or(|(_, target)| target != point) {
                points.push(point);
            }
        }
        points
    }

    /// The lines that join what is compared, and what they say.
    fn spans(&self, at: impl Fn(f64, f64) -> (f64, f64)) -> Vec<(Segment, String)> {
        let mut spans = Vec::new();
        if let Some(EqualPpl { ppl, points: [Some(first), Some(second)], .. }) = &self.equal_ppl
            && first.flops != second.flops
        {
            let (less, more) = (first.flops.min(second.flops), first.flops.max(second.flops));
            spans.push(((at(first.flops, *ppl), at(second.flops, *ppl)), format!("{:.2}× the FLOPs", more / less)));
        }
        if let Some(EqualFlops { flops, points: [first, second], lower_percent }) = &self.equal_flops
            && first.ppl != second.ppl
        {
            let worse = if *lower_percent > 0.0 { *lower_percent } else { 100.0 * (1.0 - second.ppl / first.ppl) };
            spans.push(((at(*flops, first.ppl), at(*flops, second.ppl)), format!("{worse:.1} % lower PPL")));
        }
        spans
    }
}

fn legend_of<'a>(data: &Efficiency, series: &'a [Series], comparison: &Comparison) -> Vec<(Sample<'a>, String)> {
    let mut entries: Vec<(Sample, String)> = Vec::new();
    for (model, series) in series.iter().enumerate() {
        let ahead = if data.looks_ahead(model) { " (LOOKS AHEAD)" } else { "" };
        entries.push((Sample::Line(series), format!("{}{ahead}", series.name)));
    }
    entries.push((Sample::Dashes(colors::GREEN), "Pareto frontier".into()));
    let by = data.dominating().map_or("the frontier".to_owned(), |model| series[model].name.clone());
    entries.push((Sample::Fill(SHADE), format!("dominated by {by}")));
    if let Some((ppl, point)) = &comparison.target {
        entries.push((Sample::Star(colors::ORANGE), format!("{} at PPL ≤ {}", series[point.model].name, shown(*ppl))));
    }
    entries
}

/// The lines of the box.
fn metrics(data: &Efficiency, series: &[Series]) -> Vec<String> {
    let frontier = data.frontier();
    let owners = series.iter().enumerate().filter_map(|(model, series)| {
        let count = frontier.iter().filter(|point| point.model == model).count();
        (count > 0).then(|| format!("{count} of {}", series.name))
    });
    let owners: Vec<String> = owners.collect();
    let mut lines =
        vec![format!("Frontier: {} of {} configurations, {}", frontier.len(), data.points.len(), owners.join(", "))];
    if series.len() < 2 {
        return lines;
    }
    let (first, second) = (&series[0].name, &series[1].name);
    for it in data.equal_ppl() {
        let [a, b] = it.points.each_ref().map(|it| it.as_ref().map_or("not reached".into(), |it| flops(it.flops)));
        let ratio = it.ratio.finite().map(|_| format!(" ({})", it.ratio_text())).unwrap_or_default();
        lines.push(format!("PPL ≤ {}: {first} {a}, {second} {b}{ratio}", shown(it.ppl)));
    }
    match data.equal_flops().first() {
        Some(it) => {
            let [a, b] = it.points.each_ref().map(|it| shown(it.ppl));
            let change = format!("{:+.1}", -it.lower_percent).replace('-', "−");
            lines.push(format!("Within {}: {first} PPL {a}, {second} PPL {b} ({change} %)", flops(it.flops)));
        }
        None => lines.push("No number of FLOPs within which both have a configuration".into()),
    }
    lines
}

fn described(point: &Point) -> String {
    format!("{}, PPL {}", flops(point.flops), shown(point.ppl))
}

/// The corners of the frontier's stairs, from its first point to the right edge.
fn stairs(corners: &[(f64, f64)], plot: Area) -> Vec<(f64, f64)> {
    let mut stairs = vec![corners[0]];
    for pair in corners.windows(2) {
        stairs.extend([(pair[1].0, pair[0].1), pair[1]]);
    }
    stairs.push((plot.right(), corners[corners.len() - 1].1));
    stairs
}

/// All that lies above and to the right of the frontier.
fn dominated(corners: &[(f64, f64)], plot: Area) -> String {
    let mut d = format!("M{:.2} {:.2}", corners[0].0, plot.y);
    for (x, y) in stairs(corners, plot) {
        d.push_str(&format!("L{x:.2} {y:.2}"));
    }
    format!("{d}L{:.2} {:.2}Z", plot.right(), plot.y)
}

/// What an axis spans.
struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

impl Scale {
    /// All values, with `room` (a share of them) on both sides.
    fn of(values: impl Iterator<Item = f64>, room: f64) -> Self {
        let (least, most) =
            values.fold((f64::INFINITY, 0.0f64), |(least, most), value| (least.min(value), most.max(value)));
        if most / least > LOG_FROM {
            let factor = (most / least).powf(room);
            Self { low: least / factor, high: most * factor, log: true }
        } else {
            let space = ((most - least) * room).max(least * 0.02);
            Self { low: least - space, high: most + space, log: false }
        }
    }

    fn share(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }
}
