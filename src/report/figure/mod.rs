//! Figures: drawn once as SVG with the fonts of the program, and from it as PNG, PDF and EPS.

mod canvas;
mod eps;
mod font;
pub mod labels;
mod series;

use std::{io::Cursor, str::FromStr};

use base64::{Engine, prelude::BASE64_STANDARD};
use krilla::{Document, geom::Size, metadata::Metadata, page::PageSettings};
use krilla_svg::{SurfaceExt, SvgSettings};
use resvg::{
    tiny_skia::{Color, Pixmap, Transform},
    usvg,
};

pub(super) use canvas::{Anchor, Axes, Canvas, Text, colors};
pub(super) use font::{drawable, fit, width};
pub(super) use series::{Sample, Series, cross, legend, legend_rows, shape_at, star};
pub use series::{display_name, is_mamba, is_resnet_bk};

use crate::error::{Error, Result};

/// The width of a text in a figure, in the unit of `size`.
pub fn text_width(text: &str, size: f64, bold: bool) -> f64 {
    width(text, size, bold)
}

/// The rules of CSS that bring the fonts into a page with figures.
pub fn font_faces() -> String {
    face(font::REGULAR, "normal") + &face(font::BOLD, "bold")
}

fn face(font: &[u8], weight: &str) -> String {
    let data = BASE64_STANDARD.encode(font);
    format!(
        "@font-face{{font-family:'DejaVu Sans';font-weight:{weight};\
         src:url('data:font/ttf;base64,{data}') format('truetype')}}"
    )
}

/// Points in an inch: the unit of a figure is the point.
const POINTS: f64 = 72.0;

/// A PNG has no more pixels: they take 1 GiB while they are drawn.
const MOST_PIXELS: u64 = 1 << 28;

/// What a figure can be written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Format {
    Pdf,
    Svg,
    Png,
    Eps,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Pdf, Self::Svg, Self::Png, Self::Eps];

    /// The name, which is also the extension.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pdf => "pdf",
            Self::Svg => "svg",
            Self::Png => "png",
            Self::Eps => "eps",
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| format!("{text:?} is no format of figures; they are pdf, svg, png and eps"))
    }
}

/// A figure that has been laid out. Its unit is the point.
#[derive(Clone, Debug)]
pub struct Figure {
    /// SVG that names the fonts and does not hold them.
    svg: String,
    title: String,
    width: f64,
    height: f64,
}

impl Figure {
    /// Width and height in points.
    pub fn size(&self) -> (f64, f64) {
        (self.width, self.height)
    }

    /// The bytes of a file; `dpi` is the resolution of pixels (PNG).
    ///
    /// # Errors
    /// [`Error::Figure`]: more than 2^28 pixels, or no page that the format can hold.
    pub fn render(&self, format: Format, dpi: u16) -> Result<Vec<u8>> {
        match format {
            Format::Svg => Ok(self.svg_with_fonts().into_bytes()),
            Format::Png => self.png(dpi),
            Format::Pdf => self.pdf(),
            Format::Eps => Ok(eps::write(&self.tree(), &self.title).into_bytes()),
        }
    }

    fn svg_with_fonts(&self) -> String {
        let bold = if self.svg.contains("font-weight=\"bold\"") { face(font::BOLD, "bold") } else { String::new() };
        let style = format!("<defs><style>{}{bold}</style></defs>", face(font::REGULAR, "normal"));
        let start = self.svg.find('>').expect("the root element") + 1;
        format!("{}{style}{}", &self.svg[..start], &self.svg[start..])
    }

    /// An element for a page in HTML that holds [`font_faces`].
    pub fn inline_svg(&self) -> &str {
        &self.svg
    }

    fn tree(&self) -> usvg::Tree {
        let options = usvg::Options { fontdb: font::database(), dpi: POINTS as f32, ..Default::default() };
        usvg::Tree::from_str(&self.svg, &options).expect("what the canvas wrote is SVG")
    }

    fn png(&self, dpi: u16) -> Result<Vec<u8>> {
        let scale = f64::from(dpi) / POINTS;
        let pixels = |points: f64| (points * scale).round().max(1.0) as u32;
        let (width, height) = (pixels(self.width), pixels(self.height));
        let refuse = || Error::Figure { why: format!("{width} x {height} pixels are too many; lower --dpi") };
        if u64::from(width) * u64::from(height) > MOST_PIXELS {
            return Err(refuse());
        }
        let mut pixmap = Pixmap::new(width, height).ok_or_else(refuse)?;
        // The page may end within the last pixels.
        pixmap.fill(Color::WHITE);
        resvg::render(&self.tree(), Transform::from_scale(scale as f32, scale as f32), &mut pixmap.as_mut());
        // The background is opaque, so the fourth channel says nothing.
        let colors: Vec<u8> = pixmap.data().chunks_exact(4).flat_map(|pixel| &pixel[..3]).copied().collect();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(Cursor::new(&mut bytes), width, height);
        encoder.set_color(png::ColorType::Rgb);
        let per_metre = (f64::from(dpi) / 0.0254).round() as u32;
        let unit = png::Unit::Meter;
        encoder.set_pixel_dims(Some(png::PixelDimensions { xppu: per_metre, yppu: per_metre, unit }));
        let mut writer = encoder.write_header().expect("a valid header into memory");
        writer.write_image_data(&colors).expect("as many bytes as the header says");
        writer.finish().expect("into memory");
        Ok(bytes)
    }

    fn pdf(&self) -> Result<Vec<u8>> {
        let refuse = |why: &str| Error::Figure { why: format!("PDF: {why}") };
        let size = Size::from_wh(self.width as f32, self.height as f32).ok_or_else(|| refuse("no valid page size"))?;
        let mut document = Document::new();
        let creator = concat!("bkpack ", env!("CARGO_PKG_VERSION")).to_owned();
        document.set_metadata(Metadata::new().title(self.title.clone()).creator(creator));
        let mut page = document.start_page_with(PageSettings::new(size));
        let mut surface = page.surface();
        surface.draw_svg(&self.tree(), size, SvgSettings::default()).ok_or_else(|| refuse("no valid drawing"))?;
        surface.finish();
        page.finish();
        document.finish().map_err(|error| refuse(&format!("{error:?}")))
    }
}
