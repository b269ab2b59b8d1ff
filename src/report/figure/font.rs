//! The one font of all figures, shipped with the program so that they look the same everywhere, and its measure.

use std::sync::{Arc, LazyLock};

use resvg::usvg::fontdb::Database;
use ttf_parser::Face;

use crate::error::long;

/// DejaVu Sans, reduced to Latin, Greek and some signs; without kerning, so that a text is as wide as its characters.
pub const REGULAR: &[u8] = include_bytes!("fonts/DejaVuSans.ttf");
pub const BOLD: &[u8] = include_bytes!("fonts/DejaVuSans-Bold.ttf");

/// The family name, and what a viewer without the embedded font may take: none of them is wider.
pub const FAMILY: &str = "DejaVu Sans, Liberation Sans, Arial, sans-serif";

/// How far capitals and digits rise over the baseline, and descenders fall below it, in sizes.
pub const RISE: f64 = 0.76;
pub const FALL: f64 = 0.24;

static FACES: LazyLock<[Face<'static>; 2]> =
    LazyLock::new(|| [REGULAR, BOLD].map(|bytes| Face::parse(bytes, 0).expect("the font of the program")));

/// The fonts for programs that draw SVG.
pub fn database() -> Arc<Database> {
    static DATABASE: LazyLock<Arc<Database>> = LazyLock::new(|| {
        let mut database = Database::new();
        database.load_font_data(REGULAR.to_vec());
        database.load_font_data(BOLD.to_vec());
        Arc::new(database)
    });
    DATABASE.clone()
}

/// The width of a text in the unit of `size`.
pub fn width(text: &str, size: f64, bold: bool) -> f64 {
    let face = &FACES[usize::from(bold)];
    let units: f64 = text.chars().map(|c| advance(face, c)).sum();
    units / f64::from(face.units_per_em()) * size
}

fn advance(face: &Face, c: char) -> f64 {
    face.glyph_index(c).and_then(|glyph| face.glyph_hor_advance(glyph)).unwrap_or_default().into()
}

/// A text as it can be drawn: control characters escaped, and `?` for each character that the font lacks.
pub fn drawable(text: &str) -> String {
    long(text).to_string().chars().map(|c| if FACES[0].glyph_index(c).is_some() { c } else { '?' }).collect()
}

/// A text that takes at most `room`: characters in its middle give way to an ellipsis.
pub fn fit(text: &str, size: f64, bold: bool, room: f64) -> String {
    if width(text, size, bold) <= room {
        return text.to_owned();
    }
    let characters: Vec<char> = text.chars().collect();
    // The end of a tensor's name tells more than its start.
    let shortened = |kept: usize| {
        let head: String = characters[..kept / 3].iter().collect();
        let tail: String = characters[characters.len() - (kept - kept / 3)..].iter().collect();
        format!("{head}…{tail}")
    };
    let kept = (0..characters.len()).rev().find(|&kept| width(&shortened(kept), size, bold) <= room);
    kept.map_or_else(|| "…".to_owned(), shortened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_measured_cut_and_made_drawable() {
        assert!((width("0", 10.0, false) - 6.362).abs() < 1e-2, "{}", width("0", 10.0, false));
        assert!(width("W", 10.0, true) > width("W", 10.0, false));
        assert_eq!(fit("layer.weight", 10.0, false, 100.0), "layer.weight");
        let cut = fit("model.layers.0.self_attn.q_proj.weight", 8.0, false, 90.0);
        assert!(cut.starts_with("mode") && cut.ends_with("proj.weight") && cut.contains('…'), "{cut}");
        assert!(width(&cut, 8.0, false) <= 90.0);
        assert_eq!(fit("anything", 8.0, false, 0.0), "…");
        assert_eq!(drawable("a\u{1b}[31m 語 é ≥"), "a\\u{1b}[31m ? é ≥");
    }
}
