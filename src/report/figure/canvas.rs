//! The drawing surface of all figures: marks in points, text in the one font, and axes by the plotting library.

use std::sync::Arc;

use kuva::{
    backend::svg::SvgBackend,
    render::{
        axis::add_axes_and_grid,
        color::Color,
        layout::{ComputedLayout, Layout, TickFormat},
        render::{PathData, Primitive, Scene, TextAnchor},
        theme::Theme,
    },
};

use super::{Figure, font, labels::Area};

/// Colours that people with any kind of colour blindness can tell apart (Okabe and Ito, 2008), and greys.
pub mod colors {
    pub const BLACK: &str = "#000000";
    pub const ORANGE: &str = "#e69f00";
    pub const SKY: &str = "#56b4e9";
    pub const GREEN: &str = "#009e73";
    pub const BLUE: &str = "#0072b2";
    pub const RED: &str = "#d55e00";
    pub const PURPLE: &str = "#cc79a7";
    pub const DARK: &str = "#444444";
    pub const GREY: &str = "#8c8c8c";
    pub const LIGHT: &str = "#dddddd";
}

/// The side of its point that a text begins at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks. Sizes are whole points.
#[derive(Clone, Copy, Debug)]
pub struct Text {
    pub size: u32,
    pub bold: bool,
    pub color: &'static str,
    pub anchor: Anchor,
}

impl Text {
    /// Plain black text that begins at its point.
    pub const fn new(size: u32) -> Self {
        Self { size, bold: false, color: colors::BLACK, anchor: Anchor::Start }
    }

    pub const fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    pub const fn color(self, color: &'static str) -> Self {
        Self { color, ..self }
    }

    pub const fn anchor(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }

    /// What the text takes when its baseline begins, is centred or ends at a point.
    pub fn area(self, text: &str, (x, baseline): (f64, f64)) -> Area {
        let size = f64::from(self.size);
        let width = font::width(text, size, self.bold);
        let x = match self.anchor {
            Anchor::Start => x,
            Anchor::Middle => x - width / 2.0,
            Anchor::End => x - width,
        };
        Area { x, y: baseline - font::RISE * size, width, height: (font::RISE + font::FALL) * size }
    }
}

/// The frame of a plot: where it lies and what its axes span.
#[derive(Debug)]
pub struct Axes {
    pub plot: Area,
    pub x: (f64, f64),
    pub y: (f64, f64),
    pub log_x: bool,
    pub log_y: bool,
}

/// A figure while it is drawn.
pub struct Canvas {
    scene: Scene,
    title: String,
}

impl Canvas {
    /// A white page of whole points; the title is that of the document.
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        let mut scene = Scene::new(width.ceil(), height.ceil());
        scene.font_family = Some(font::FAMILY.to_owned());
        Self { scene, title: title.to_owned() }
    }

    /// What is drawn, as a figure.
    pub fn finish(self) -> Figure {
        let Scene { width, height, .. } = self.scene;
        let svg = SvgBackend::new().render_scene(&self.scene);
        // The library says pixels; a figure has a size on paper.
        let (library, own) = (
            format!(r#"width="{width}" height="{height}""#),
            format!(r#"width="{width}pt" height="{height}pt" viewBox="0 0 {width} {height}""#),
        );
        Figure { svg: svg.replacen(&library, &own, 1), title: self.title, width, height }
    }

    /// Draws into a group of its own, found by its class.
    pub fn group(&mut self, class: &'static str, draw: impl FnOnce(&mut Self)) {
        let extra_attrs = Some(format!("class=\"{class}\""));
        self.scene.add(Primitive::GroupStart { transform: None, title: None, extra_attrs });
        draw(self);
        self.scene.add(Primitive::GroupEnd);
    }

    /// One line of text with its baseline at a point; returns what it takes.
    pub fn text(&mut self, at: (f64, f64), text: &str, style: Text) -> Area {
        self.rotated_text(at, text, style, None);
        style.area(text, at)
    }

    /// One line of text, turned about its point by `degrees` clockwise.
    pub fn rotated_text(&mut self, (x, y): (f64, f64), text: &str, style: Text, degrees: Option<f64>) {
        self.scene.add(Primitive::Text {
            x,
            y,
            // The library takes what stands between dollar signs for a formula.
            content: text.replace('$', "\\$"),
            size: style.size,
            anchor: match style.anchor {
                Anchor::Start => TextAnchor::Start,
                Anchor::Middle => TextAnchor::Middle,
                Anchor::End => TextAnchor::End,
            },
            rotate: degrees,
            bold: style.bold,
            color: Some(Color::from(style.color)),
        });
    }

    /// A straight line; `dashes` as in SVG, `""` for none.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), color: &str, width: f64, dashes: &str) {
        self.scene.add(Primitive::Line {
            x1: from.0,
            y1: from.1,
            x2: to.0,
            y2: to.1,
            stroke: Color::from(color),
            stroke_width: width,
            stroke_dasharray: (!dashes.is_empty()).then(|| dashes.to_owned()),
        });
    }

    /// A filled rectangle.
    pub fn rect(&mut self, area: Area, fill: &str) {
        let Area { x, y, width, height } = area;
        self.scene.add(Primitive::Rect {
            x,
            y,
            width,
            height,
            fill: Color::from(fill),
            stroke: None,
            stroke_width: None,
            opacity: None,
        });
    }

    /// A path (`d` as in SVG), filled where `fill` names a colour.
    pub fn path(&mut self, d: String, fill: Option<&str>, stroke: &str, width: f64) {
        self.scene.add(Primitive::Path(Box::new(PathData {
            d,
            fill: fill.map(Color::from),
            stroke: Color::from(stroke),
            stroke_width: width,
            opacity: None,
            stroke_dasharray: None,
        })));
    }

    /// A polyline; `dashes` as in SVG, `""` for none.
    pub fn polyline(&mut self, points: Vec<(f64, f64)>, color: &str, width: f64, dashes: &str) {
        self.scene.add(Primitive::PolyLine {
            points,
            stroke: Color::from(color),
            stroke_width: width,
            stroke_dasharray: (!dashes.is_empty()).then(|| dashes.to_owned()),
        });
    }

    /// A circle with a white rim, which sets it off from lines below.
    pub fn circle(&mut self, (cx, cy): (f64, f64), r: f64, fill: &str) {
        self.scene.add(Primitive::Circle {
            cx,
            cy,
            r,
            fill: Color::from(fill),
            fill_opacity: None,
            stroke: Some(Color::from("#ffffff")),
            stroke_width: Some(0.8),
        });
    }

    /// SIMULATED across a plot.
    pub fn watermark(&mut self, plot: Area) {
        let size = (plot.width / 7.2) as u32;
        let style = Text::new(size).bold().color("#d8d8d8").anchor(Anchor::Middle);
        let (x, y) = plot.center();
        let middle = (x + f64::from(size) / 6.0, y + f64::from(size) / 3.0);
        self.group("watermark", |canvas| canvas.rotated_text(middle, "SIMULATED", style, Some(-26.0)));
    }

    /// Grid, axes, tick marks and their labels; returns how values map to points.
    pub fn axes(&mut self, axes: &Axes, adjust: impl FnOnce(Layout) -> Layout) -> ComputedLayout {
        let Area { x, y, .. } = axes.plot;
        let (width, height) = (self.scene.width, self.scene.height);
        let theme = Theme {
            axis_color: colors::DARK.into(),
            tick_color: colors::DARK.into(),
            grid_color: colors::LIGHT.into(),
            ..Theme::light()
        };
        let mut layout = Layout::new(axes.x, axes.y)
            .with_width(width)
            .with_height(height)
            .with_theme(theme)
            .with_tick_size(8)
            .with_tick_format(TickFormat::Custom(Arc::new(tick)))
            .with_axis_line_width(0.8)
            .with_tick_width(0.8)
            .with_tick_length(3.0)
            .with_grid_line_width(0.5)
            .with_x_axis_min(axes.x.0)
            .with_x_axis_max(axes.x.1)
            .with_y_axis_min(axes.y.0)
            .with_y_axis_max(axes.y.1)
            .with_force_margins(x, width - axes.plot.right())
            .with_force_margins_y(y, height - axes.plot.bottom());
        layout.log_x = axes.log_x;
        layout.log_y = axes.log_y;
        let layout = adjust(layout);
        let computed = ComputedLayout::from_layout(&layout);
        add_axes_and_grid(&mut self.scene, &computed, &layout);
        computed
    }
}

/// A number beside a tick mark, as short as it is exact, with a real minus sign.
fn tick(value: f64) -> String {
    let text = if value == 0.0 || (1e-2..1e5).contains(&value.abs()) {
        // Ticks are multiples of a step; what lies beyond twelve digits is rounding.
        let rounded: f64 = format!("{value:.12e}").parse().expect("a number");
        rounded.to_string()
    } else {
        format!("{value:.1e}").replace(".0e", "e")
    };
    text.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::tick;

    #[test]
    fn ticks_are_short() {
        let shown = [0.0, -1.0, 0.30000000000000004, 2500.0, 1e5, -2.5e-7].map(tick);
        assert_eq!(shown, ["0", "−1", "0.3", "2500", "1e5", "−2.5e−7"]);
    }
}
