//! A bar chart of how much each tensor matters.

use kuva::render::render_utils::generate_ticks;

use super::figure::{Anchor, Axes, Canvas, Figure, Text, colors, drawable, fit, labels::Area, width};

/// One bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    pub name: String,
    /// Bars of one component have one colour.
    pub component: String,
    /// A finite number.
    pub score: f64,
}

/// Up to this many bars are all shown; of more, half as many of each end.
pub const MOST_BARS: usize = 60;

const WIDTH: f64 = 468.0;
const MARGIN: f64 = 10.0;
const ROW: f64 = 11.0;
const NAMES_MOST: f64 = 200.0;
const NAME: Text = Text::new(8).anchor(Anchor::End);
const VALUE: Text = Text::new(7).color(colors::DARK);

/// Draws the bars in the order of `bars`, the first on top. `subtitle` says what was measured on what.
pub fn draw(title: &str, subtitle: &str, bars: &[Bar]) -> Figure {
    let (title, subtitle) = (drawable(title), drawable(subtitle));
    let rows = rows(bars);
    let names: Vec<String> = bars.iter().map(|bar| fit(&drawable(&bar.name), 8.0, false, NAMES_MOST)).collect();
    let shown = || rows.iter().filter_map(|row| *row);
    let name_width = shown().map(|index| width(&names[index], 8.0, false)).fold(0.0, f64::max);
    let legend = legend(bars);

    let legend_top = 44.0;
    let legend_rows = legend.iter().map(|entry| entry.row).max().map_or(0, |last| last + 1);
    let plot = Area {
        x: MARGIN + name_width + 6.0,
        y: legend_top + 13.0 * legend_rows as f64 + 6.0,
        width: WIDTH - 2.0 * MARGIN - name_width - 6.0,
        height: ROW * rows.len().max(1) as f64,
    };
    let mut canvas = Canvas::new(WIDTH, plot.bottom() + 36.0, &title);
    let room = WIDTH - 2.0 * MARGIN;
    canvas.text((MARGIN, 20.0), &fit(&title, 11.0, true, room), Text::new(11).bold());
    canvas.text((MARGIN, 34.0), &fit(&subtitle, 8.0, false, room), Text::new(8).color(colors::DARK));
    canvas.group("legend", |canvas| {
        for entry in &legend {
            let y = legend_top + 13.0 * entry.row as f64;
            canvas.rect(Area { x: entry.x, y: y - 1.0, width: 8.0, height: 8.0 }, color(entry.component));
            canvas.text((entry.x + 12.0, y + 6.5), &entry.text, Text::new(8));
        }
    });

    let values = shown().map(|index| bars[index].score);
    let (least, most) = values.fold((0.0f64, 0.0f64), |(least, most), score| (least.min(score), most.max(score)));
    let span = if most - least > f64::MIN_POSITIVE { most - least } else { 1.0 };
    // Values stand at the ends of the bars, inside the frame.
    let label = shown().map(|index| width(&shown_value(bars[index].score), 7.0, false)).fold(0.0, f64::max) + 5.0;
    let before = if least < 0.0 { label } else { 0.0 };
    let scale = (plot.width - before - label) / span;
    let x = (least - before / scale, least + span + label / scale);
    let axes = Axes { plot, x, y: (0.5, rows.len().max(1) as f64 + 0.5), log_x: false, log_y: false };
    let at = |value: f64| plot.x + (value - x.0) / (x.1 - x.0) * plot.width;
    canvas.group("grid", |canvas| {
        for tick in generate_ticks(x.0, x.1, 6) {
            canvas.line((at(tick), plot.y), (at(tick), plot.bottom()), colors::LIGHT, 0.5, "");
        }
    });
    canvas.group("axes", |canvas| {
        canvas.axes(&axes, |mut layout| {
            layout.suppress_y_ticks = true;
            layout.with_show_grid(false).with_ticks(6)
        });
        let style = Text::new(8).anchor(Anchor::Middle);
        canvas.text((WIDTH / 2.0, plot.bottom() + 28.0), "score (standard deviations over all tensors)", style);
    });
    canvas.group("bars", |canvas| {
        canvas.line((at(0.0), plot.y), (at(0.0), plot.bottom()), colors::DARK, 0.8, "");
        for (index, row) in rows.iter().enumerate() {
            let middle = plot.y + ROW * (index as f64 + 0.5);
            match row {
                Some(bar) => {
                    let Bar { score, component, .. } = &bars[*bar];
                    let (from, to) = (at(score.min(0.0)), at(score.max(0.0)));
                    let area = Area { x: from, y: middle - 4.0, width: (to - from).max(0.4), height: 8.0 };
                    canvas.rect(area, color(component));
                    canvas.text((plot.x - 5.0, middle + 2.8), &names[*bar], NAME);
                    let (x, anchor) = if *score < 0.0 { (from - 2.5, Anchor::End) } else { (to + 2.5, Anchor::Start) };
                    canvas.text((x, middle + 2.6), &shown_value(*score), VALUE.anchor(anchor));
                }
                None => gap(canvas, bars, plot, middle),
            }
        }
    });
    canvas.finish()
}

/// Which bar each row shows; `None` stands for those that are left out.
fn rows(bars: &[Bar]) -> Vec<Option<usize>> {
    let count = bars.len();
    if count <= MOST_BARS {
        return (0..count).map(Some).collect();
    }
    let half = MOST_BARS / 2;
    (0..half).map(Some).chain([None]).chain((count - half..count).map(Some)).collect()
}

/// The row that stands for the bars between the two ends.
fn gap(canvas: &mut Canvas, bars: &[Bar], plot: Area, middle: f64) {
    let half = MOST_BARS / 2;
    let hidden = &bars[half..bars.len() - half];
    let (first, last) = (hidden[0].score, hidden[hidden.len() - 1].score);
    let text = format!("… {} more, from {} to {} …", hidden.len(), shown_value(first), shown_value(last));
    canvas.rect(Area { x: plot.x + 0.5, y: middle - ROW / 2.0, width: plot.width, height: ROW }, "#ffffff");
    let style = Text::new(8).color(colors::DARK).anchor(Anchor::Middle);
    canvas.text((plot.center().0, middle + 2.8), &text, style);
}

fn shown_value(score: f64) -> String {
    if score.abs() < 1e3 { format!("{score:+.2}") } else { format!("{score:+.2e}") }.replace('-', "−")
}

struct Entry<'a> {
    component: &'a str,
    text: String,
    x: f64,
    row: usize,
}

/// The components in the order of their first bars, in lines that are not too long.
fn legend(bars: &[Bar]) -> Vec<Entry<'_>> {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for bar in bars {
        match counts.iter_mut().find(|(component, _)| *component == bar.component) {
            Some((_, count)) => *count += 1,
            None => counts.push((&bar.component, 1)),
        }
    }
    let (mut x, mut row) = (MARGIN, 0);
    let mut entries = Vec::new();
    for (component, count) in counts {
        let text = fit(&format!("{} ({count})", drawable(component)), 8.0, false, 200.0);
        let next = 12.0 + width(&text, 8.0, false) + 14.0;
        if x + next > WIDTH - MARGIN && x > MARGIN {
            (x, row) = (MARGIN, row + 1);
        }
        entries.push(Entry { component, text, x, row });
        x += next;
    }
    entries
}

fn color(component: &str) -> &'static str {
    match component {
        "expert" => colors::ORANGE,
        "bk_core" => colors::PURPLE,
        "output" => colors::RED,
        "embedding" => colors::GREEN,
        "other" => colors::BLUE,
        _ => colors::GREY,
    }
}
