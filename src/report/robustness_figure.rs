//! The figure of perplexity against bit width.

use super::{
    figure::{
        Anchor, Axes, Canvas, Figure, Sample, Series, Text, colors, cross, drawable, fit,
        labels::{Area, Label, Segment, place},
        legend, legend_rows, shape_at, star, width,
    },
    robustness::{Robustness, width_name},
};

const WIDTH: f64 = 400.0;
const PLOT_HEIGHT: f64 = 210.0;
const MARGIN: f64 = 10.0;
/// Space for tick labels and the title of the vertical axis.
const LEFT: f64 = 52.0;
const LABEL: u32 = 7;
/// The height of a row of the table of values.
const TABLE_ROW: f64 = 11.0;
const SHADE: &str = "#e6f4ee";
/// Values whose largest is this many times the smallest are drawn on a logarithmic axis.
const LOG_FROM: f64 = 3.0;
/// Larger values tell nothing more, and would squeeze all others.
const MOST: f64 = 1e9;

/// Draws the lines of all models. Values stand beside their points if there is room for all of them, and otherwise in a table
/// under the axis.
pub fn draw(data: &Robustness, title: &str) -> Figure {
    let title = fit(&drawable(title), 11.0, true, WIDTH - 2.0 * MARGIN);
    let series = Series::of(&data.models);
    let (entries, legend_height) = legend_rows(legend_of(data, &series), MARGIN, WIDTH - MARGIN);
    let legend_top = 28.0;
    let plot = Area { x: LEFT, y: legend_top + legend_height + 6.0, width: WIDTH - LEFT - MARGIN, height: PLOT_HEIGHT };
    let (low, high, log_y) = span(data);
    let axes = Axes { plot, x: (0.5, data.widths.len() as f64 + 0.5), y: (low, high), log_x: false, log_y };
    let count = data.widths.len() as f64;
    let of_x = move |index: usize| plot.x + (index as f64 + 0.5) / count * plot.width;
    let of_y = move |value: f64| {
        let share = if log_y { (value / low).ln() / (high / low).ln() } else { (value - low) / (high - low) };
        plot.bottom() - share * plot.height
    };

    let limit = of_y(data.threshold).clamp(plot.y, plot.bottom());
    let lines: Vec<(&Series, Vec<(f64, f64)>)> = series
        .iter()
        .zip(&data.models)
        .flat_map(|(series, model)| {
            runs(data, model)
                .into_iter()
                .map(move |run| (series, run.into_iter().map(|(index, ppl)| (of_x(index), of_y(ppl))).collect()))
        })
        .collect();
    let marks = marks(data, &series, plot, of_x, of_y);
    let obstacles: Vec<Area> = marks.iter().map(|mark| Area::around(mark.at, mark.radius())).collect();
    let mut segments: Vec<Segment> =
        lines.iter().flat_map(|(_, line)| line.windows(2).map(|pair| (pair[0], pair[1]))).collect();
    segments.push(((plot.x, limit), (plot.right(), limit)));
    let labels: Vec<Label> = marks.iter().map(Mark::label).collect();
    let places = place(&labels, &obstacles, &segments, plot.grown(-1.5));
    // In part beside the points and in part elsewhere, values would be hard to find.
    let places: Option<Vec<Area>> = places.into_iter().collect();
    let rows = if places.is_some() { 0 } else { data.models.len() };
    let table_top = plot.bottom() + 38.0;
    let mut canvas = Canvas::new(WIDTH, table_top + TABLE_ROW * rows as f64 + 4.0, &title);
    canvas.group("deployable", |canvas| {
        canvas.rect(Area { y: limit, height: plot.bottom() - limit, ..plot }, SHADE);
    });
    if data.simulated {
        canvas.watermark(plot);
    }
    canvas.text((MARGIN, 20.0), &title, Text::new(11).bold());
    canvas.group("axes", |canvas| {
        let names = data.widths.iter().map(|&width| width_name(width)).collect();
        canvas.axes(&axes, |layout| layout.with_x_categories(names).with_ticks(6));
        let middle = Text::new(9).anchor(Anchor::Middle);
        canvas.text((plot.center().0, plot.bottom() + 30.0), "precision of the weights", middle);
        let name = if log_y { "perplexity (log scale, lower is better)" } else { "perplexity (lower is better)" };
        canvas.rotated_text((16.0, plot.center().1), name, middle, Some(-90.0));
    });
    if (low..=high).contains(&data.threshold) {
        canvas.group("threshold", |canvas| {
            canvas.line((plot.x, limit), (plot.right(), limit), colors::DARK, 1.0, "4 2.5");
        });
    }
    canvas.group("lines", |canvas| {
        for (series, line) in lines.iter().filter(|(_, line)| line.len() > 1) {
            canvas.polyline(line.clone(), series.color, 1.6, "");
        }
    });
    canvas.group("markers", |canvas| marks.iter().for_each(|mark| mark.draw(canvas)));
    canvas.group("values", |canvas| match &places {
        Some(places) => {
            for (mark, area) in marks.iter().zip(places) {
                let style = Text::new(LABEL).anchor(Anchor::Middle).color(mark.series.color);
                let baseline = area.bottom() - 0.22 * f64::from(LABEL);
                canvas.text((area.center().0, baseline), &mark.text, style);
            }
        }
        None => {
            let column = plot.width / count - 2.0;
            for (row, (series, model)) in series.iter().zip(&data.models).enumerate() {
                let baseline = table_top + TABLE_ROW * (row as f64 + 0.75);
                let (name, value) = (Text::new(LABEL).color(series.color), Text::new(LABEL).anchor(Anchor::Middle));
                let size = f64::from(LABEL);
                canvas.text((MARGIN, baseline), &fit(&series.name, size, false, LEFT - MARGIN - 3.0), name);
                for (index, &width) in data.widths.iter().enumerate() {
                    let Some(point) = data.point(model, width) else { continue };
                    let text = point.perplexity.map_or("not finite".to_owned(), shown);
                    let text = fit(&text, size, false, column);
                    canvas.text((of_x(index), baseline), &text, value);
                }
            }
        }
    });
    legend(&mut canvas, &entries, legend_top);
    canvas.finish()
}

/// The values of a model as `(index of the width, perplexity)`: a run ends where one cannot be drawn, not where one is
/// missing.
fn runs(data: &Robustness, model: &str) -> Vec<Vec<(usize, f64)>> {
    let mut runs = vec![Vec::new()];
    for (index, &width) in data.widths.iter().enumerate() {
        match data.point(model, width).map(|point| point.perplexity.filter(drawn)) {
            Some(Some(ppl)) => runs.last_mut().expect("never empty").push((index, ppl)),
            Some(None) => runs.push(Vec::new()),
            None => {}
        }
    }
    runs
}

fn legend_of<'a>(data: &Robustness, series: &'a [Series]) -> Vec<(Sample<'a>, String)> {
    let mut entries: Vec<(Sample, String)> = Vec::new();
    for (series, model) in series.iter().zip(&data.models) {
        let ahead = if data.looks_ahead(model) { " (LOOKS AHEAD)" } else { "" };
        entries.push((Sample::Line(series), format!("{}{ahead}", series.name)));
    }
    let at_four = || data.models.iter().filter_map(|model| data.point(model, 4.0.into())?.perplexity);
    if at_four().any(|ppl| ppl < data.threshold) {
        entries.push((Sample::Star(colors::GREEN), "deployable at INT4".into()));
    }
    if at_four().any(|ppl| ppl >= data.threshold) {
        entries.push((Sample::Cross, "not deployable at INT4".into()));
    }
    entries.push((Sample::Dashes(colors::DARK), "deployment threshold".into()));
    entries.push((Sample::Fill(SHADE), format!("deployable (PPL < {})", data.threshold)));
    entries
}

/// What the vertical axis spans, and whether it is logarithmic.
fn span(data: &Robustness) -> (f64, f64, bool) {
    let values = data.models.iter().flat_map(|model| {
        data.widths.iter().filter_map(move |&width| data.point(model, width)?.perplexity.filter(drawn))
    });
    let (least, most) =
        values.fold((data.threshold, data.threshold), |(least, most), value| (least.min(value), most.max(value)));
    // Room for labels above and below the outermost points.
    if most / least > LOG_FROM {
        let room = (most / least).powf(0.12);
        (least / room, most * room, true)
    } else {
        let room = ((most - least) * 0.12).max(least * 0.02);
        (least - room, most + room, false)
    }
}

/// A point that is drawn.
struct Mark<'a> {
    series: &'a Series,
    at: (f64, f64),
    kind: Kind,
    text: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Point,
    Star,
    Cross,
    /// Above what the axis spans: too large, or NaN or infinite.
    Beyond,
}

impl Mark<'_> {
    fn radius(&self) -> f64 {
        match self.kind {
            Kind::Point => 3.5,
            Kind::Star => 6.0,
            Kind::Cross => 5.0,
            Kind::Beyond => 4.0,
        }
    }

    fn label(&self) -> Label {
        let size = f64::from(LABEL);
        Label { point: self.at, width: width(&self.text, size, false), height: size, clearance: self.radius() + 1.2 }
    }

    fn draw(&self, canvas: &mut Canvas) {
        let (x, y) = self.at;
        match self.kind {
            Kind::Point => shape_at(canvas, self.series.shape, self.at, 3.0, self.series.color),
            Kind::Star => {
                canvas.circle(self.at, 3.0, self.series.color);
                star(canvas, self.at, 6.0, colors::GREEN);
            }
            Kind::Cross => cross(canvas, self.at, 4.0),
            Kind::Beyond => {
                let arrow = format!(
                    "M{x} {}L{} {}M{x} {}L{} {}M{x} {}V{}",
                    y - 4.0,
                    x - 3.0,
                    y,
                    y - 4.0,
                    x + 3.0,
                    y,
                    y - 4.0,
                    y + 4.0
                );
                canvas.path(arrow, None, self.series.color, 1.4);
            }
        }
    }
}

fn marks<'a>(
    data: &Robustness,
    series: &'a [Series],
    plot: Area,
    of_x: impl Fn(usize) -> f64,
    of_y: impl Fn(f64) -> f64,
) -> Vec<Mark<'a>> {
    let mut marks = Vec::new();
    for (series, model) in series.iter().zip(&data.models) {
        for (index, &width) in data.widths.iter().enumerate() {
            let Some(point) = data.point(model, width) else { continue };
            let x = of_x(index);
            let text = point.perplexity.map_or("not finite".to_owned(), shown);
            let (at, kind) = match point.perplexity.filter(drawn) {
                None => {
                    // Several models may fail at one width: side by side.
                    let same = |mark: &&Mark| mark.kind == Kind::Beyond && (mark.at.0 - x).abs() < 30.0;
                    let shift = 9.0 * marks.iter().filter(same).count() as f64;
                    ((x + shift, plot.y + 6.0), Kind::Beyond)
                }
                Some(ppl) => {
                    let kind = match width.bits == 4.0 {
                        true if ppl < data.threshold => Kind::Star,
                        true => Kind::Cross,
                        false => Kind::Point,
                    };
                    ((x, of_y(ppl)), kind)
                }
            };
            marks.push(Mark { series, at, kind, text });
        }
    }
    marks
}

/// Whether the axis can span a perplexity.
fn drawn(ppl: &f64) -> bool {
    (1e-9..=MOST).contains(ppl)
}

/// A perplexity in at most six characters.
pub(super) fn shown(ppl: f64) -> String {
    match ppl {
        ppl if ppl < 100.0 => format!("{ppl:.2}"),
        ppl if ppl < 1e3 => format!("{ppl:.1}"),
        ppl if ppl < 1e5 => format!("{ppl:.0}"),
        ppl => format!("{ppl:.1e}"),
    }
}
