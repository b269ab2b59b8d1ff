//! How the lines of several models look: colours, markers, names and legends, the same in every figure.

use super::{
    canvas::{Canvas, Text, colors},
    font::{drawable, fit, width},
    labels::Area,
};

/// A marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Circle,
    Square,
    Triangle,
    Diamond,
}

/// The look of one model.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub color: &'static str,
    pub shape: Shape,
}

impl Series {
    /// The looks of `models`: ResNet-BK is blue and Mamba red whatever stands beside them.
    pub fn of(models: &[String]) -> Vec<Self> {
        const OTHERS: [&str; 6] =
            [colors::GREEN, colors::ORANGE, colors::PURPLE, colors::SKY, colors::BLACK, colors::GREY];
        const SHAPES: [Shape; 4] = [Shape::Triangle, Shape::Diamond, Shape::Circle, Shape::Square];
        let (mut blue, mut red, mut others) = (false, false, 0);
        let mut series = |model: &String| {
            let (color, shape) = if is_resnet_bk(model) && !std::mem::replace(&mut blue, true) {
                (colors::BLUE, Shape::Circle)
            } else if is_mamba(model) && !std::mem::replace(&mut red, true) {
                (colors::RED, Shape::Square)
            } else {
                others += 1;
                // Shapes go on where colours begin again.
                (OTHERS[(others - 1) % OTHERS.len()], SHAPES[(others - 1 + (others - 1) / 6) % SHAPES.len()])
            };
            Self { name: display_name(model), color, shape }
        };
        models.iter().map(&mut series).collect()
    }
}

fn plain(model: &str) -> String {
    model.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Whether a series of results is one of ResNet-BK.
pub fn is_resnet_bk(model: &str) -> bool {
    plain(model).starts_with("resnetbk")
}

/// Whether a series of results is one of Mamba.
pub fn is_mamba(model: &str) -> bool {
    plain(model).starts_with("mamba")
}

/// A model's name as papers write it; a name that is not known stays as it is.
pub fn display_name(model: &str) -> String {
    match model {
        "resnetbk" | "resnet_bk" => "ResNet-BK".into(),
        "mamba" => "Mamba".into(),
        "llama" => "Llama".into(),
        "smollm2" => "SmolLM2".into(),
        _ => fit(&drawable(model), 8.0, false, 120.0),
    }
}

/// What a legend shows before the words.
#[derive(Clone, Copy, Debug)]
pub enum Sample<'a> {
    Line(&'a Series),
    Dashes(&'static str),
    Fill(&'static str),
    Star(&'static str),
    Cross,
}

/// An entry of a legend and where it stands.
#[derive(Debug)]
pub struct Entry<'a> {
    sample: Sample<'a>,
    text: String,
    x: f64,
    row: usize,
}

const LINE: f64 = 13.0;
const SAMPLE: f64 = 18.0;

/// Entries in rows that fit between `left` and `right`.
pub fn legend_rows<'a>(entries: Vec<(Sample<'a>, String)>, left: f64, right: f64) -> (Vec<Entry<'a>>, f64) {
    let (mut x, mut row) = (left, 0);
    let mut placed = Vec::with_capacity(entries.len());
    for (sample, text) in entries {
        let text = fit(&text, 8.0, false, right - left - SAMPLE - 4.0);
        let next = SAMPLE + 4.0 + width(&text, 8.0, false);
        if x + next > right && x > left {
            (x, row) = (left, row + 1);
        }
        placed.push(Entry { sample, text, x, row });
        x += next + 12.0;
    }
    (placed, LINE * (row + 1) as f64)
}

/// Draws a legend whose first row begins at `top`.
pub fn legend(canvas: &mut Canvas, entries: &[Entry], top: f64) {
    canvas.group("legend", |canvas| {
        for Entry { sample, text, x, row } in entries {
            let middle = top + LINE * (*row as f64 + 0.5);
            let (from, to, center) = ((*x, middle), (x + SAMPLE, middle), (x + SAMPLE / 2.0, middle));
            match sample {
                Sample::Line(series) => {
                    canvas.line(from, to, series.color, 1.6, "");
                    shape_at(canvas, series.shape, center, 3.0, series.color);
                }
                Sample::Dashes(color) => canvas.line(from, to, color, 1.0, "4 2.5"),
                Sample::Fill(color) => {
                    canvas.rect(Area { x: x + 3.0, y: middle - 4.0, width: 12.0, height: 8.0 }, color);
                }
                Sample::Star(color) => star(canvas, center, 5.0, color),
                Sample::Cross => cross(canvas, center, 3.4),
            }
            canvas.text((x + SAMPLE + 4.0, middle + 2.8), text, Text::new(8));
        }
    });
}

/// Draws a marker with a white rim.
pub fn shape_at(canvas: &mut Canvas, shape: Shape, (x, y): (f64, f64), radius: f64, color: &str) {
    let r = radius;
    let d = match shape {
        Shape::Circle => return canvas.circle((x, y), r, color),
        Shape::Square => {
            let s = r * 0.9;
            format!("M{} {}H{}V{}H{}Z", x - s, y - s, x + s, y + s, x - s)
        }
        Shape::Triangle => format!("M{x} {}L{} {}H{}Z", y - 1.15 * r, x + 1.1 * r, y + 0.8 * r, x - 1.1 * r),
        Shape::Diamond => format!("M{x} {}L{} {y}L{x} {}L{} {y}Z", y - 1.2 * r, x + 1.2 * r, y + 1.2 * r, x - 1.2 * r),
    };
    canvas.path(d, Some(color), "#ffffff", 0.8);
}

/// A five-pointed star.
pub fn star(canvas: &mut Canvas, (x, y): (f64, f64), radius: f64, color: &str) {
    let corner = |index: u32| {
        let angle = std::f64::consts::PI * (f64::from(index) / 5.0 - 0.5);
        let length = if index.is_multiple_of(2) { radius } else { 0.45 * radius };
        format!("{:.2} {:.2}", x + length * angle.cos(), y + length * angle.sin())
    };
    let corners: Vec<String> = (0..10).map(corner).collect();
    canvas.path(format!("M{}Z", corners.join("L")), Some(color), "#ffffff", 0.8);
}

/// A diagonal cross in dark red on white.
pub fn cross(canvas: &mut Canvas, (x, y): (f64, f64), radius: f64) {
    let r = radius;
    let d = || format!("M{} {}L{} {}M{} {}L{} {}", x - r, y - r, x + r, y + r, x - r, y + r, x + r, y - r);
    canvas.path(d(), None, "#ffffff", 4.2);
    canvas.path(d(), None, "#b30000", 2.2);
}
