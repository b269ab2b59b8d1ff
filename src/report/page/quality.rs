//! The section about what packing cost, from the output of `bkpack eval --json`.

use maud::{Markup, html};

use super::markup::{chip, facts, finite, fixed, numbers, percent, plain_table, protocol, words};
use crate::{
    error::short,
    report::{
        evaluation::{ComponentCosts, Evaluation},
        table::count,
    },
};

/// All evaluations, one below the other.
pub(super) fn section(evaluations: &[Evaluation]) -> Markup {
    html! { @for evaluation in evaluations { (one(evaluation)) } }
}

fn one(evaluation: &Evaluation) -> Markup {
    let ahead = evaluation.looks_ahead;
    let number = |shown: String| html! { (shown) @if ahead { " " (chip("LOOKS AHEAD")) } };
    let mut rows = vec![("perplexity", number(finite(evaluation.perplexity, |value| format!("{value:.4}"))))];
    if let Some(baseline) = &evaluation.baseline {
        rows.extend([
            ("baseline perplexity", number(finite(baseline.baseline_ppl, |value| format!("{value:.4}")))),
            ("increase", number(finite(baseline.ppl_increase_percent, |value| percent(value, 3)))),
            ("KL divergence, mean", number(format!("{:.6}", baseline.kld_mean))),
            ("KL divergence, median", number(format!("{:.6}", baseline.kld_median))),
            ("KL divergence, 99.9 %", number(format!("{:.6}", baseline.kld_p999))),
            ("same top token", number(format!("{:.2} %", 100.0 * baseline.top1_agreement))),
        ]);
    }
    if let Some(error) = &evaluation.core_error {
        let values = [error.v, error.re_g, error.im_g].map(|error| format!("{:.3} %", 100.0 * error)).join(", ");
        rows.push(("error of v, Re G, Im G", html! { (values) " at INT" (error.bits) }));
    }
    rows.push((
        "speed",
        html! {
            (format!("{:.1}", evaluation.tokens_per_second)) " tokens/s on "
            @match &evaluation.conditions.card {
                Some(card) => (short(card)),
                None => { (count(evaluation.threads)) " threads, " (short(&evaluation.isa)) },
            }
        },
    ));
    html! {
        (facts(&rows))
        p.protocol { (protocol(&evaluation.conditions)) "." }
        @if evaluation.seals.is_empty() {
            p.protocol {
                "The file of this evaluation does not name what was measured: only bytes and parameters were compared with "
                "those of the packed model."
            }
        }
        @if let Some(costs) = &evaluation.by_component { (by_component(costs, ahead)) }
    }
}

fn by_component(costs: &ComponentCosts, ahead: bool) -> Markup {
    let share = |bytes: u64| html! { (format!("{:.2} %", 100.0 * bytes as f64 / costs.file_bytes as f64)) };
    let mut rows: Vec<Vec<Markup>> = costs
        .components
        .iter()
        .map(|line| {
            vec![
                fixed(&line.component),
                fixed(&line.encoding),
                html! { (count(line.tensors)) },
                html! { (count(line.bytes)) },
                share(line.bytes),
                html! { (format!("{:.6}", line.kld)) },
                html! { @if let Some(kld) = line.kld_per_mb_saved { (format!("{kld:.6}")) } },
            ]
        })
        .collect();
    let empty = || html! {};
    let sum = |name: &str, bytes: u64, kld: Markup| {
        vec![fixed(name), empty(), empty(), html! { (count(bytes)) }, share(bytes), kld, empty()]
    };
    rows.push(sum("header, tokenizer", costs.rest_bytes, empty()));
    rows.push(sum("all together", costs.file_bytes, html! { (format!("{:.6}", costs.kld)) }));
    let columns = [
        words("component"),
        words("encoding"),
        numbers("tensors"),
        numbers("bytes"),
        numbers("share"),
        numbers("KLD alone"),
        numbers("KLD per MB saved"),
    ];
    let mark = if ahead { " (LOOKS AHEAD)" } else { "" };
    let caption = format!(
        "What each component costs{mark}: mean KL divergence from the baseline when it alone is packed, on {} windows of {}",
        count(costs.windows),
        count(costs.ctx)
    );
    plain_table(&caption, &columns, &rows)
}
