//! A figure as Encapsulated PostScript: paths in solid colours, text as outlines, so that no font is needed.

use std::fmt::Write;

use resvg::{
    tiny_skia::{PathSegment, Point, Transform},
    usvg::{FillRule, Group, LineCap, LineJoin, Node, Paint, Path, Stroke, Tree},
};

/// The file. PostScript knows no transparency: the drawing must have none.
pub fn write(tree: &Tree, title: &str) -> String {
    let (width, height) = (tree.size().width(), tree.size().height());
    // Header comments are ASCII lines of at most 255 characters.
    let title: String = title.chars().filter(|c| matches!(c, ' '..='~')).take(200).collect();
    let mut out = format!(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 {} {}\n%%HiResBoundingBox: 0 0 {width} {height}\n\
         %%Creator: bkpack {}\n%%Title: {title}\n%%LanguageLevel: 2\n%%EndComments\n\
         gsave\n0 {height} translate 1 -1 scale\n\
         /m {{moveto}} bind def /l {{lineto}} bind def /c {{curveto}} bind def /h {{closepath}} bind def\n\
         /k {{setrgbcolor}} bind def\n",
        width.ceil(),
        height.ceil(),
        env!("CARGO_PKG_VERSION"),
    );
    group(&mut out, tree.root(), Transform::identity());
    out.push_str("grestore\nshowpage\n%%EOF\n");
    out
}

/// Draws a group; `outer` maps what surrounds it to the page. The outlines of a text do not know their place on the page,
/// so transforms are followed from the root on.
fn group(out: &mut String, parent: &Group, outer: Transform) {
    let transform = outer.pre_concat(parent.transform());
    for node in parent.children() {
        match node {
            Node::Group(inner) => group(out, inner, transform),
            Node::Path(path) => draw(out, path, transform),
            Node::Text(text) => group(out, text.flattened(), transform),
            Node::Image(_) => unreachable!("the canvas draws no images"),
        }
    }
}

fn draw(out: &mut String, path: &Path, transform: Transform) {
    if !path.is_visible() {
        return;
    }
    if let Some(fill) = path.fill() {
        outline(out, path, transform);
        color(out, fill.paint());
        out.push_str(if fill.rule() == FillRule::EvenOdd { "eofill\n" } else { "fill\n" });
    }
    if let Some(stroke) = path.stroke() {
        outline(out, path, transform);
        color(out, stroke.paint());
        pen(out, stroke, transform);
        out.push_str("stroke\n");
    }
}

fn outline(out: &mut String, path: &Path, transform: Transform) {
    let at = |mut point: Point| {
        transform.map_point(&mut point);
        format!("{} {}", short(point.x), short(point.y))
    };
    out.push_str("newpath\n");
    let mut current = Point::zero();
    for segment in path.data().segments() {
        let _ = match segment {
            PathSegment::MoveTo(to) => writeln!(out, "{} m", at(to)),
            PathSegment::LineTo(to) => writeln!(out, "{} l", at(to)),
            PathSegment::QuadTo(control, to) => {
                // The same curve as a cubic one: its control points lie two thirds of the way to the quadratic one's.
                let toward = |from: Point| {
                    let third = |from: f32, to: f32| from + (to - from) * (2.0 / 3.0);
                    Point::from_xy(third(from.x, control.x), third(from.y, control.y))
                };
                writeln!(out, "{} {} {} c", at(toward(current)), at(toward(to)), at(to))
            }
            PathSegment::CubicTo(first, second, to) => writeln!(out, "{} {} {} c", at(first), at(second), at(to)),
            PathSegment::Close => writeln!(out, "h"),
        };
        if let PathSegment::MoveTo(to)
        | PathSegment::LineTo(to)
        | PathSegment::QuadTo(_, to)
        | PathSegment::CubicTo(_, _, to) = segment
        {
            current = to;
        }
    }
}

fn color(out: &mut String, paint: &Paint) {
    let Paint::Color(color) = paint else { unreachable!("the canvas paints in solid colours") };
    let [red, green, blue] = [color.red, color.green, color.blue].map(|part| format!("{:.3}", f32::from(part) / 255.0));
    let _ = writeln!(out, "{red} {green} {blue} k");
}

fn pen(out: &mut String, stroke: &Stroke, transform: Transform) {
    let cap = match stroke.linecap() {
        LineCap::Butt => 0,
        LineCap::Round => 1,
        LineCap::Square => 2,
    };
    let join = match stroke.linejoin() {
        LineJoin::Miter | LineJoin::MiterClip => 0,
        LineJoin::Round => 1,
        LineJoin::Bevel => 2,
    };
    let scale = transform.get_scale().0;
    let dashes: Vec<String> =
        stroke.dasharray().unwrap_or_default().iter().map(|&length| short(length * scale)).collect();
    let offset = short(stroke.dashoffset() * scale);
    let width = short(stroke.width().get() * scale);
    let _ = writeln!(
        out,
        "{width} setlinewidth {cap} setlinecap {join} setlinejoin [{}] {offset} setdash",
        dashes.join(" ")
    );
}

/// Hundredths (of a point, 4 µm), without zeros at the end.
fn short(value: f32) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use crate::report::figure::{Canvas, Format, Text};

    #[test]
    fn a_text_that_is_turned_stands_upright() {
        let mut canvas = Canvas::new(100.0, 200.0, "é, (a title)");
        canvas.rotated_text((50.0, 150.0), "perplexity", Text::new(10), Some(-90.0));
        let eps = String::from_utf8(canvas.finish().render(Format::Eps, 72).unwrap()).unwrap();
        let starts = eps.lines().filter_map(|line| line.strip_suffix(" m"));
        let points: Vec<(f64, f64)> = starts
            .map(|point| point.split_once(' ').unwrap())
            .map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap()))
            .collect();
        // The first outline is that of the page.
        let letters = &points[1..];
        assert!(letters.len() > 10, "{eps}");
        assert!(letters.iter().all(|(x, y)| (41.0..54.0).contains(x) && (90.0..151.0).contains(y)), "{letters:?}");
        assert!(eps.contains("%%BoundingBox: 0 0 100 200\n") && eps.contains("%%Title: , (a title)\n"));
    }
}
