//! Reads figures back: their marks and texts, and whether anything overlaps or is cut.

use bkpack::report::figure::{Figure, Format, labels::Area, text_width};

/// A text with the space it takes.
struct Placed {
    text: String,
    group: String,
    area: Area,
}

/// An element other than text.
struct Mark {
    tag: String,
    group: String,
    color: String,
}

/// A figure that was read back.
pub struct Drawing {
    size: (f64, f64),
    texts: Vec<Placed>,
    marks: Vec<Mark>,
}

impl Drawing {
    pub fn of(figure: &Figure) -> Self {
        Self::parse(&String::from_utf8(figure.render(Format::Svg, 72).unwrap()).unwrap())
    }

    pub fn parse(svg: &str) -> Self {
        let document = roxmltree::Document::parse(svg).unwrap();
        let root = document.root_element();
        let points = |name| root.attribute(name).and_then(|value: &str| value.strip_suffix("pt")).unwrap();
        let size = (points("width").parse().unwrap(), points("height").parse().unwrap());
        let (mut texts, mut marks) = (Vec::new(), Vec::new());
        for node in root.descendants().filter(roxmltree::Node::is_element) {
            let of_group = |node: roxmltree::Node| node.attribute("class").map(str::to_owned);
            let group = node.ancestors().find_map(of_group).unwrap_or_default();
            match node.tag_name().name() {
                "text" if group == "watermark" => {
                    let area = Area { x: 0.0, y: 0.0, width: 0.0, height: 0.0 };
                    texts.push(Placed { area, text: node.text().unwrap_or("").into(), group });
                }
                "text" => texts.push(Placed { area: area(node), text: node.text().unwrap_or("").into(), group }),
                tag @ ("rect" | "circle" | "path" | "line" | "polyline") => {
                    let mut paint = ["fill", "stroke"].into_iter().filter_map(|name| node.attribute(name));
                    let color = paint.find(|paint| *paint != "none").unwrap_or_default().to_owned();
                    marks.push(Mark { tag: tag.into(), group, color });
                }
                _ => {}
            }
        }
        Self { size, texts, marks }
    }

    pub fn texts(&self) -> Vec<&str> {
        self.texts.iter().map(|placed| placed.text.as_str()).collect()
    }

    /// The texts of the innermost group with a class.
    pub fn texts_of(&self, group: &str) -> Vec<String> {
        self.texts.iter().filter(|placed| placed.group == group).map(|placed| placed.text.clone()).collect()
    }

    /// How many elements of a kind a group holds.
    pub fn count(&self, group: &str, tag: &str) -> usize {
        self.marks.iter().filter(|mark| mark.group == group && mark.tag == tag).count()
    }

    /// The colours of a group's elements of a kind.
    pub fn colors(&self, group: &str, tag: &str) -> Vec<&str> {
        let found = self.marks.iter().filter(|mark| mark.group == group && mark.tag == tag);
        found.map(|mark| mark.color.as_str()).collect()
    }

    /// No text leaves the page, and no two texts overlap (but for a watermark).
    #[track_caller]
    pub fn assert_tidy(&self) {
        let page = Area { x: 0.0, y: 0.0, width: self.size.0, height: self.size.1 };
        let texts: Vec<&Placed> = self.texts.iter().filter(|placed| placed.group != "watermark").collect();
        for (index, placed) in texts.iter().enumerate() {
            assert!(page.holds(placed.area), "{:?} leaves the page: {:?}", placed.text, placed.area);
            for other in &texts[..index] {
                assert!(!placed.area.meets(other.area), "{:?} overlaps {:?}", placed.text, other.text);
            }
        }
    }
}

fn area(node: roxmltree::Node) -> Area {
    let number = |name| node.attribute(name).unwrap().parse::<f64>().unwrap();
    let (x, y, size) = (number("x"), number("y"), number("font-size"));
    let width = text_width(node.text().unwrap_or(""), size, node.attribute("font-weight").is_some());
    let start = match node.attribute("text-anchor").unwrap() {
        "start" => 0.0,
        "middle" => -width / 2.0,
        _ => -width,
    };
    // Capitals and descenders, less than a line's height: lines of one text may touch.
    let (rise, fall) = (0.73 * size, 0.2 * size);
    match node.attribute("transform") {
        None => Area { x: x + start, y: y - rise, width, height: rise + fall },
        Some(turn) => {
            assert!(turn.starts_with("rotate(-90"), "{turn}");
            Area { x: x - rise, y: y - start - width, width: rise + fall, height: width }
        }
    }
}
