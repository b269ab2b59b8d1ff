//! A heat map of what each tensor of a packed model takes: layers down, kinds of tensors across.

use std::collections::{HashMap, hash_map};

use super::{
    figure::{Anchor, Canvas, Figure, Text, colors, drawable, fit, labels::Area, width},
    table::count,
};

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub name: String,
    /// As the legend names it; tensors of one encoding have one colour.
    pub encoding: String,
    /// Bits of one code: 32, 16, 8 ..., 1.6 (ternary), 1. It decides the colour.
    pub bits: f64,
    /// With scales and all other parts.
    pub bytes: u64,
}

const MARGIN: f64 = 10.0;
const CELL: f64 = 36.0;
const ROW: f64 = 12.0;
const NAME: u32 = 8;
const NAMES_MOST: f64 = 150.0;
/// Pages are not narrower, so that titles have room.
const WIDTH_LEAST: f64 = 400.0;
const MIXED: &str = "several encodings";
/// Up to this many layers, kinds and tensors outside of layers are shown; of more, the first, and a line says so.
pub const MOST: [usize; 3] = [256, 64, 64];

/// The line under the title: of which file, and what it takes.
pub fn subtitle(file: &str, parameters: u64, bytes: u64) -> String {
    let bits = 8.0 * bytes as f64 / parameters as f64;
    format!("{file}: {} parameters in {} bytes, {bits:.3} bits a weight", count(parameters), count(bytes))
}

/// Draws all tensors. `subtitle` says of what model. Of more than [`MOST`], those that are left out count in the sums.
pub fn draw(title: &str, subtitle: &str, tensors: &[Stored]) -> Figure {
    let (title, subtitle) = (drawable(title), drawable(subtitle));
    let grid = Grid::of(tensors);
    let [layers_most, kinds_most, outside_most] = MOST;
    let row_names: Vec<String> =
        grid.layers.iter().take(layers_most).map(|layer| fit(&drawable(layer), 8.0, false, NAMES_MOST)).collect();
    let kinds: Vec<String> =
        grid.kinds.iter().take(kinds_most).map(|kind| fit(&drawable(kind), 8.0, false, NAMES_MOST)).collect();
    let outside = &grid.outside[..grid.outside.len().min(outside_most)];
    let left_out = left_out(&grid);
    let widest = |names: &[String]| names.iter().map(|name| width(name, 8.0, false)).fold(0.0, f64::max);
    let header = if kinds.is_empty() { 0.0 } else { widest(&kinds) + 6.0 };
    let left = MARGIN + widest(&row_names).max(30.0) + 6.0;
    // A column more for the sums.
    let page = (left + CELL * (kinds.len() + 1) as f64 + MARGIN).max(WIDTH_LEAST);

    let legend = legend(tensors, &grid, page);
    let legend_top = 44.0;
    let legend_rows = legend.iter().map(|entry| entry.row).max().map_or(0, |last| last + 1);
    let top = legend_top + 13.0 * legend_rows as f64 + 8.0 + header;
    let sums = if kinds.is_empty() { 0 } else { 1 };
    let outside_top = top + ROW * (row_names.len() + sums) as f64 + if kinds.is_empty() { 0.0 } else { 14.0 };
    let height = outside_top + ROW * (outside.len() + usize::from(left_out.is_some())) as f64 + MARGIN;

    let mut canvas = Canvas::new(page, height, &title);
    let room = page - 2.0 * MARGIN;
    canvas.text((MARGIN, 20.0), &fit(&title, 11.0, true, room), Text::new(11).bold());
    canvas.text((MARGIN, 34.0), &fit(&subtitle, 8.0, false, room), Text::new(8).color(colors::DARK));
    canvas.group("legend", |canvas| {
        for entry in &legend {
            let y = legend_top + 13.0 * entry.row as f64;
            canvas.rect(Area { x: entry.x, y: y - 1.0, width: 12.0, height: 8.0 }, entry.color);
            canvas.text((entry.x + 16.0, y + 6.5), &entry.text, Text::new(8));
        }
    });
    let column = |index: usize| left + CELL * index as f64;
    canvas.group("kinds", |canvas| {
        for (index, kind) in kinds.iter().enumerate() {
            let at = (column(index) + CELL / 2.0 + 3.0, top - 4.0);
            canvas.rotated_text(at, kind, Text::new(NAME), Some(-90.0));
        }
    });
    let baseline = |row: usize| top + ROW * row as f64 + 8.8;
    canvas.group("layers", |canvas| {
        for (row, name) in row_names.iter().enumerate() {
            canvas.text((left - 5.0, baseline(row)), name, Text::new(NAME).anchor(Anchor::End));
        }
    });
    canvas.group("cells", |canvas| {
        for cell in grid.cells.iter().filter(|cell| cell.row < row_names.len() && cell.column < kinds.len()) {
            let area = Area { x: column(cell.column), y: top + ROW * cell.row as f64, width: CELL, height: ROW };
            draw_cell(canvas, area, cell.look(), cell.bytes);
        }
    });
    if !kinds.is_empty() {
        canvas.group("sums", |canvas| {
            let style = Text::new(7).color(colors::DARK).anchor(Anchor::Middle);
            let last = row_names.len();
            let sum =
                |of: &dyn Fn(&Cell) -> bool| grid.cells.iter().filter(|cell| of(cell)).map(|cell| cell.bytes).sum();
            for index in 0..kinds.len() {
                canvas.text(
                    (column(index) + CELL / 2.0, baseline(last)),
                    &size(sum(&|cell| cell.column == index)),
                    style,
                );
            }
            for row in 0..last {
                canvas.text(
                    (column(kinds.len()) + CELL / 2.0, baseline(row)),
                    &size(sum(&|cell| cell.row == row)),
                    style,
                );
            }
            canvas.text((column(kinds.len()) + CELL / 2.0, baseline(last)), &size(sum(&|_| true)), style.bold());
            canvas.text((left - 5.0, baseline(last)), "sum", Text::new(NAME).color(colors::DARK).anchor(Anchor::End));
        });
    }
    canvas.group("outside", |canvas| {
        for (index, tensor) in outside.iter().enumerate() {
            let y = outside_top + ROW * index as f64;
            draw_cell(
                canvas,
                Area { x: MARGIN, y, width: CELL, height: ROW },
                (color(tensor.bits), tensor.bits),
                tensor.bytes,
            );
            let text = format!("{}  ({})", drawable(&tensor.name), tensor.encoding);
            let text = fit(&text, 8.0, false, page - 2.0 * MARGIN - CELL - 6.0);
            canvas.text((MARGIN + CELL + 6.0, y + 8.8), &text, Text::new(NAME));
        }
    });
    if let Some(text) = left_out {
        let y = outside_top + ROW * outside.len() as f64 + 8.8;
        let text = fit(&text, 8.0, false, room);
        let style = Text::new(NAME).color(colors::DARK);
        canvas.group("left-out", |canvas| {
            canvas.text((MARGIN, y), &text, style);
        });
    }
    canvas.finish()
}

/// What has no room, as the figure says it.
fn left_out(grid: &Grid) -> Option<String> {
    let counts = [grid.layers.len(), grid.kinds.len(), grid.outside.len()];
    let names = ["layers", "kinds", "tensors outside"];
    let more: Vec<String> = counts
        .into_iter()
        .zip(MOST)
        .zip(names)
        .filter(|((count, most), _)| count > most)
        .map(|((found, most), name)| format!("{} more {name}", count((found - most) as u64)))
        .collect();
    (!more.is_empty()).then(|| format!("… not shown, but in sums and legend: {} …", more.join(", ")))
}

fn draw_cell(canvas: &mut Canvas, area: Area, (fill, bits): (&str, f64), bytes: u64) {
    canvas.rect(Area { width: area.width - 0.8, height: area.height - 0.8, ..area }, fill);
    let ink = if bits > 4.5 { "#ffffff" } else { colors::BLACK };
    let style = Text::new(7).color(ink).anchor(Anchor::Middle);
    canvas.text((area.x + area.width / 2.0, area.y + 8.4), &size(bytes), style);
}

/// Bytes in at most six characters, in powers of ten.
pub(super) fn size(bytes: u64) -> String {
    let value = bytes as f64;
    let (unit, name) = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        .into_iter()
        .find(|(unit, _)| value >= 0.9995 * unit)
        .unwrap_or((1.0, "B"));
    let scaled = value / unit;
    let digits = if unit == 1.0 || scaled >= 99.95 {
        0
    } else if scaled >= 9.995 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$} {name}")
}

/// From light yellow (1 bit) to dark purple (32 bits): the order of lightness is that of the bits.
pub(super) fn color(bits: f64) -> &'static str {
    match bits {
        bits if bits < 1.3 => "#fde725",
        bits if bits < 1.8 => "#d0e11c",
        bits if bits < 2.5 => "#a0da39",
        bits if bits < 3.5 => "#73d056",
        bits if bits < 4.5 => "#4ac16d",
        bits if bits < 5.5 => "#1f8a70",
        bits if bits < 6.5 => "#277f8e",
        bits if bits < 7.5 => "#365c8d",
        bits if bits < 12.0 => "#46327e",
        bits if bits < 24.0 => "#66125f",
        _ => "#000000",
    }
}

/// Tensors of one kind in one layer: one, or all experts of a mixture.
struct Cell<'a> {
    row: usize,
    column: usize,
    bytes: u64,
    first: &'a Stored,
    mixed: bool,
}

impl Cell<'_> {
    fn look(&self) -> (&'static str, f64) {
        if self.mixed { (colors::GREY, 4.0) } else { (color(self.first.bits), self.first.bits) }
    }
}

struct Grid<'a> {
    layers: Vec<String>,
    kinds: Vec<String>,
    cells: Vec<Cell<'a>>,
    outside: Vec<&'a Stored>,
}

impl<'a> Grid<'a> {
    fn of(tensors: &'a [Stored]) -> Self {
        let mut stacks: Vec<&str> = tensors.iter().filter_map(|tensor| Some(split(&tensor.name)?.0)).collect();
        stacks.sort_unstable();
        stacks.dedup();
        let mut rows: Vec<(&str, u64)> =
            tensors.iter().filter_map(|tensor| split(&tensor.name)).map(|(stack, layer, _)| (stack, layer)).collect();
        rows.sort_unstable();
        rows.dedup();
        let (mut kinds, mut cells, mut outside) = (Vec::new(), Vec::<Cell>::new(), Vec::new());
        let (mut columns, mut places) = (HashMap::new(), HashMap::new());
        for tensor in tensors {
            let Some((stack, layer, kind)) = split(&tensor.name) else {
                outside.push(tensor);
                continue;
            };
            let row = rows.binary_search(&(stack, layer)).expect("collected above");
            let column = *columns.entry(kind).or_insert_with_key(|kind: &String| {
                kinds.push(kind.clone());
                kinds.len() - 1
            });
            match places.entry((row, column)) {
                hash_map::Entry::Occupied(place) => {
                    let cell: &mut Cell = &mut cells[*place.get()];
                    cell.bytes += tensor.bytes;
                    cell.mixed |= cell.first.encoding != tensor.encoding;
                }
                hash_map::Entry::Vacant(place) => {
                    place.insert(cells.len());
                    cells.push(Cell { row, column, bytes: tensor.bytes, first: tensor, mixed: false });
                }
            }
        }
        let name = |(stack, layer): &(&str, u64)| {
            if stacks.len() > 1 { format!("{stack}.{layer}") } else { format!("layer {layer}") }
        };
        Self { layers: rows.iter().map(name).collect(), kinds, cells, outside }
    }
}

/// `model.layers.3.mlp.experts.7.up_proj.weight` is `("model.layers", 3, "mlp.experts.*.up_proj")`.
pub(super) fn split(name: &str) -> Option<(&str, u64, String)> {
    let mut start = 0;
    for part in name.split('.') {
        if let Ok(layer) = part.parse::<u64>()
            && start > 0
            && start + part.len() < name.len()
        {
            let kind: Vec<&str> = name[start + part.len() + 1..]
                .split('.')
                .map(|part| if part.bytes().all(|byte| byte.is_ascii_digit()) { "*" } else { part })
                .collect();
            let kind = kind.join(".");
            return Some((&name[..start - 1], layer, kind.strip_suffix(".weight").unwrap_or(&kind).to_owned()));
        }
        start += part.len() + 1;
    }
    None
}

struct Entry {
    color: &'static str,
    text: String,
    x: f64,
    row: usize,
}

/// The encodings, those with the most bits first, each with how many tensors and bytes it has.
fn legend(tensors: &[Stored], grid: &Grid, page: f64) -> Vec<Entry> {
    let mut found: Vec<(&str, f64, usize, u64)> = Vec::new();
    for tensor in tensors {
        match found.iter_mut().find(|(encoding, ..)| *encoding == tensor.encoding) {
            Some((_, _, tensors, bytes)) => (*tensors, *bytes) = (*tensors + 1, *bytes + tensor.bytes),
            None => found.push((&tensor.encoding, tensor.bits, 1, tensor.bytes)),
        }
    }
    found.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(b.0)));
    let mut texts: Vec<(&str, String)> = found
        .into_iter()
        .map(|(encoding, bits, tensors, bytes)| {
            (color(bits), format!("{} ({} tensors, {})", drawable(encoding), count(tensors as u64), size(bytes)))
        })
        .collect();
    if grid.cells.iter().any(|cell| cell.mixed) {
        texts.push((colors::GREY, MIXED.to_owned()));
    }
    let (mut x, mut row) = (MARGIN, 0);
    let mut entries = Vec::new();
    for (color, text) in texts {
        let text = fit(&text, 8.0, false, page - 2.0 * MARGIN - 16.0);
        let next = 16.0 + width(&text, 8.0, false) + 14.0;
        if x + next - 14.0 > page - MARGIN && x > MARGIN {
            (x, row) = (MARGIN, row + 1);
        }
        entries.push(Entry { color, text, x, row });
        x += next;
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_their_layer() {
        let of = |name| split(name).map(|(stack, layer, kind)| format!("{stack}|{layer}|{kind}"));
        assert_eq!(of("model.layers.3.self_attn.q_proj.weight").unwrap(), "model.layers|3|self_attn.q_proj");
        assert_eq!(of("layers.0.moe.experts.7.w1.weight").unwrap(), "layers|0|moe.experts.*.w1");
        assert_eq!(of("backbone.layers.12.mixer.conv1d.bias").unwrap(), "backbone.layers|12|mixer.conv1d.bias");
        assert_eq!([of("lm_head.weight"), of("0.weight"), of("a.1"), of("")], [None, None, None, None]);
    }

    #[test]
    fn sizes_are_short() {
        let shown = [0, 999, 1000, 93_184, 540_672, 2_097_152, 999_999, 14_480_000_000].map(size);
        assert_eq!(shown, ["0 B", "999 B", "1.00 kB", "93.2 kB", "541 kB", "2.10 MB", "1.00 MB", "14.5 GB"]);
    }
}
