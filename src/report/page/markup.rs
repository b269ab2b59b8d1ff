//! What the sections of a page are made of: facts, tables that can be sorted, figures, marks.

use maud::{Markup, PreEscaped, Render, html};

use crate::{
    error::{long, short},
    report::{figure::Figure, results::Conditions, table::count},
};

/// A text from a file in typewriter letters, with places to break at.
pub fn code(text: &str) -> Markup {
    let text = long(text).to_string();
    html! {
        code {
            @for (index, part) in text.split_inclusive(['.', '/', '_']).enumerate() {
                @if index > 0 { wbr; }
                (part)
            }
        }
    }
}

/// A few words from a file that stay on one line.
pub fn fixed(text: &str) -> Markup {
    html! { span.fixed { (short(text)) } }
}

/// A sentence that takes several lines rather than a narrow column.
pub fn prose(text: &str) -> Markup {
    html! { span.prose { (long(text)) } }
}

/// A BLAKE3 in full.
pub fn hash(hash: &str) -> Markup {
    html! { code.hash { (short(hash)) } }
}

/// A word that stands out: PASS, FAIL, SIMULATED.
pub fn chip(word: &str) -> Markup {
    let kind = match word {
        "PASS" => "pass",
        "FAIL" => "fail",
        "MISSING" => "missing",
        _ => "mark",
    };
    html! { span.chip.(kind) { (word) } }
}

/// The marks that a figure must not be quoted without.
pub fn marks(looks_ahead: bool, simulated: bool) -> Markup {
    html! {
        @if looks_ahead { " " (chip("LOOKS AHEAD")) }
        @if simulated { " " (chip("SIMULATED")) }
    }
}

/// A number that is `None` where it is NaN or infinite.
pub fn finite(value: Option<f64>, show: impl Fn(f64) -> String) -> String {
    value.map_or_else(|| "not finite".to_owned(), show)
}

/// A change in percent with its sign, which zero has none of.
pub fn percent(value: f64, digits: usize) -> String {
    if value.abs() >= 1e5 {
        return minus(&format!("{value:+.1e} %"));
    }
    let zero = format!("{:.digits$}", 0.0);
    let text = format!("{value:+.digits$}");
    minus(&format!("{} %", if text[1..] == zero { zero } else { text }))
}

/// A number with a real minus sign.
pub fn minus(number: &str) -> String {
    number.replace('-', "−")
}

/// Names and values, one below the other.
pub fn facts(rows: &[(&str, Markup)]) -> Markup {
    html! {
        dl.facts { @for (name, value) in rows { div { dt { (name) } dd { (value) } } } }
    }
}

/// Numbers to see first: a name, the number, and a line about it.
pub fn tiles(tiles: &[(&str, String, String)]) -> Markup {
    html! {
        dl.tiles {
            @for (name, value, remark) in tiles {
                div { dt { (name) } dd.value { (value) } @if !remark.is_empty() { dd.remark { (remark) } } }
            }
        }
    }
}

/// A figure on paper of its own, which is white in dark surroundings, too.
pub fn figure(figure: &Figure, caption: &str) -> Markup {
    let (width, _) = figure.size();
    // Points at the size of the screen's letters; narrower screens scroll.
    let size = format!("width:{:.0}px;min-width:{:.0}px", width * 1.7, width.min(460.0));
    html! {
        figure {
            div.paper tabindex="0" role="group" aria-label=(caption) {
                div style=(size) { (PreEscaped(figure.inline_svg())) }
            }
            figcaption { (caption) }
        }
    }
}

/// The head of a column.
#[derive(Clone, Copy, Debug)]
pub struct Column<'a> {
    pub name: &'a str,
    /// Stands to the right, and is sorted by value, the largest first.
    pub number: bool,
}

/// A column of words.
pub const fn words(name: &str) -> Column<'_> {
    Column { name, number: false }
}

/// A column of numbers.
pub const fn numbers(name: &str) -> Column<'_> {
    Column { name, number: true }
}

/// A cell of a table that can be sorted.
pub struct Cell {
    content: Markup,
    /// What it is sorted by, where that is not its text; empty where there is nothing, which comes last.
    value: Option<String>,
}

impl Cell {
    /// Sorted by its text.
    pub fn new(content: impl Render) -> Self {
        Self { content: content.render(), value: None }
    }

    /// A number as `shown`, or nothing.
    pub fn number(value: Option<f64>, shown: impl FnOnce(f64) -> String) -> Self {
        let content = match value {
            Some(value) => html! { (shown(value)) },
            None => html! { span.none { "–" } },
        };
        Self { content, value: Some(value.map(|value| value.to_string()).unwrap_or_default()) }
    }

    /// A whole number, or nothing.
    pub fn count(value: Option<u64>) -> Self {
        Self::number(value.map(|value| value as f64), |_| count(value.unwrap_or_default()))
    }

    /// The same cell with more behind its content.
    pub fn with(self, more: Markup) -> Self {
        Self { content: html! { (self.content) (more) }, ..self }
    }

    /// A BLAKE3 in full, of which the table shows the beginning.
    pub fn hash(hash: Option<&str>) -> Self {
        Self::new(match hash {
            Some(hash) => html! { code.hash.cut { (short(hash)) } },
            None => html! { span.none { "–" } },
        })
    }
}

/// A table that the script makes sortable.
pub struct Table<'a> {
    pub id: &'static str,
    pub caption: &'a str,
    pub columns: &'a [Column<'a>],
    pub rows: Vec<Vec<Cell>>,
    /// Whether the rows are in the order of their first column.
    pub sorted: bool,
    /// What the rows are, where there is a field to filter them with.
    pub filter: Option<&'static str>,
}

impl Render for Table<'_> {
    fn render(&self) -> Markup {
        html! {
            @if let Some(rows) = self.filter {
                div.filter hidden data-table=(self.id) data-rows=(rows) {
                    label for={ (self.id) "-filter" } { "Filter " (rows) }
                    input id={ (self.id) "-filter" } type="search" autocomplete="off" spellcheck="false"
                        placeholder="words that a row must hold" aria-controls=(self.id);
                    output for={ (self.id) "-filter" } { (count(self.rows.len() as u64)) " " (rows) }
                }
            }
            div.scroll tabindex="0" role="group" aria-label=(self.caption) {
                table.sortable id=(self.id) {
                    caption { span { (self.caption) } }
                    thead {
                        tr {
                            @for (index, column) in self.columns.iter().enumerate() {
                                th scope="col" .number[column.number] aria-sort=[(self.sorted && index == 0).then_some("ascending")] {
                                    (column.name)
                                }
                            }
                        }
                    }
                    tbody {
                        @for row in &self.rows {
                            tr {
                                @for (cell, column) in row.iter().zip(self.columns) {
                                    td .number[column.number] data-value=[cell.value.as_deref()] { (cell.content) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A table of few rows that stay in their order; the first cell of a row is its head.
pub fn plain_table(caption: &str, columns: &[Column], rows: &[Vec<Markup>]) -> Markup {
    html! {
        div.scroll tabindex="0" role="group" aria-label=(caption) {
            table {
                caption { span { (caption) } }
                thead { tr { @for column in columns { th scope="col" .number[column.number] { (column.name) } } } }
                tbody {
                    @for row in rows {
                        tr {
                            @for (index, (cell, column)) in row.iter().zip(columns).enumerate() {
                                @if index == 0 { th scope="row" .number[column.number] { (cell) } }
                                @else { td .number[column.number] { (cell) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// How something was measured, in a sentence without its end.
pub fn protocol(conditions: &Conditions) -> Markup {
    let number = |value: Option<u64>| value.map_or("?".to_owned(), count);
    let Conditions { text, ctx, skip, windows, scored, activations, card } = conditions;
    html! {
        (number(*scored)) " positions scored in " (number(*windows)) " windows of " (number(*ctx)) " tokens, of each all but the first "
        (number(*skip)) "; text "
        @match text {
            Some((name, blake3)) => { (code(name)) " (BLAKE3 " (hash(blake3)) ")" },
            None => "not recorded",
        }
        "; activations " (long(activations.as_deref().unwrap_or("not recorded")))
        @if let Some(card) = card { "; on the GPU " (long(card)) }
    }
}

/// Lines of JSON that are shown at most.
const MOST_LINES: usize = 2000;

/// JSON that is folded away until it is wanted.
pub fn json(summary: &str, value: &serde_json::Value) -> Markup {
    let text = serde_json::to_string_pretty(value).expect("plain data is JSON");
    let lines: Vec<&str> = text.lines().collect();
    let left_out = lines.len().saturating_sub(MOST_LINES);
    html! {
        details {
            summary { (summary) }
            pre tabindex="0" {
                @for line in lines.iter().take(MOST_LINES) { (long(line)) "\n" }
                @if left_out > 0 { "… " (count(left_out as u64)) " more lines" }
            }
        }
    }
}
