//! One self-contained HTML page about a packed model and about results: it loads nothing, and works without its script,
//! which only sorts and filters tables.

mod markup;
mod model;
mod quality;
mod results;

use base64::{Engine, prelude::BASE64_STANDARD};
use maud::{DOCTYPE, Markup, PreEscaped, html};

pub use self::{
    model::{Activations, HashedFile, Model, Tensor},
    results::Measurements,
};
use super::{evaluation::Evaluation, figure::font_faces};
use crate::error::long;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// What a page shows.
#[derive(Debug)]
pub struct Page<'a> {
    pub title: &'a str,
    pub model: Option<Model>,
    /// Of the model.
    pub evaluations: &'a [Evaluation],
    pub measurements: Option<Measurements>,
}

/// A part of the page with its entry in the table of contents.
struct Section {
    id: &'static str,
    heading: &'static str,
    content: Markup,
}

impl Page<'_> {
    /// The page; the same for the same content.
    pub fn render(&self) -> String {
        let mut sections = Vec::new();
        if let Some(model) = &self.model {
            sections.extend(model.overview());
            if !self.evaluations.is_empty() {
                let content = quality::section(self.evaluations);
                sections.push(Section { id: "quality", heading: "Quality", content });
            }
            sections.extend(model.tensors_and_provenance());
        }
        sections.extend(self.measurements.iter().flat_map(Measurements::sections));
        let body = self.body(&sections).into_string();
        // Whoever wrote the names that stand in the page cannot know its hash, so no script but ours can run.
        let nonce = BASE64_STANDARD.encode(&blake3::hash(body.as_bytes()).as_bytes()[..18]);
        let policy = format!(
            "default-src 'none'; style-src 'unsafe-inline'; font-src data:; img-src data:; script-src 'nonce-{nonce}'; \
             base-uri 'none'; form-action 'none'"
        );
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(policy);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    meta name="generator" content=(PRODUCER);
                    title { (long(self.title)) }
                    // A browser asks the server for an icon where the page names none.
                    link rel="icon" href="data:,";
                    style { (PreEscaped(font_faces())) (PreEscaped(STYLE)) }
                }
                body {
                    (PreEscaped(body))
                    script nonce=(nonce) { (PreEscaped(SCRIPT)) }
                }
            }
        };
        page.into_string()
    }

    fn body(&self, sections: &[Section]) -> Markup {
        let lede = match (&self.model, &self.measurements) {
            (Some(model), _) => model.lede(),
            (None, Some(measurements)) => measurements.lede(),
            (None, None) => String::new(),
        };
        let marks = self.marks();
        html! {
            header.masthead {
                p.kicker { "bkpack report" }
                h1 { (long(self.title)) }
                p.lede { (lede) }
                @for mark in &marks { p.banner role="note" { (mark) } }
                @if let Some(model) = &self.model { (model.tiles(self.evaluations)) }
                @else if let Some(measurements) = &self.measurements { (measurements.tiles()) }
                nav aria-label="Contents" {
                    ul { @for section in sections { li { a href={ "#" (section.id) } { (section.heading) } } } }
                }
            }
            main {
                @for Section { id, heading, content } in sections {
                    section id=(id) aria-labelledby={ (id) "-heading" } {
                        h2 id={ (id) "-heading" } { (heading) }
                        (content)
                    }
                }
            }
            footer { p { "Made by " (PRODUCER) " from the files named above. This page loads nothing from the network." } }
        }
    }

    /// What no figure of the page may be quoted without.
    fn marks(&self) -> Vec<Markup> {
        let mut marks = Vec::new();
        if self.model.as_ref().is_some_and(|model| model.random_weights) {
            marks.push(html! { strong { "RANDOM WEIGHTS." } " Sizes are real; the model has learned nothing." });
        }
        if self.measurements.as_ref().is_some_and(Measurements::simulated) {
            marks.push(html! { strong { "SIMULATED." } " Some results come from no measurement; they are marked." });
        }
        let ahead = self.evaluations.iter().any(|evaluation| evaluation.looks_ahead);
        if ahead || self.measurements.as_ref().is_some_and(Measurements::looks_ahead) {
            marks.push(html! {
                strong { "LOOKS AHEAD." }
                " Some positions see later tokens: figures with this mark are not those of a language model."
            });
        }
        marks
    }
}

/// The program and its version.
const PRODUCER: &str = concat!("bkpack ", env!("CARGO_PKG_VERSION"));
