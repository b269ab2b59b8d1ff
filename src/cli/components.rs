//! The table of what each component costs, which `eval` and `convert` share.

use bkpack::{
    error::short,
    eval::components::ComponentCosts,
    report::table::{count, table},
};

/// The table for people, with a line below it that says what was measured.
pub fn render(costs: &ComponentCosts) -> String {
    let mark = if costs.looks_ahead { " (LOOKS AHEAD)" } else { "" };
    let kld = format!("KLD alone{mark}");
    let mut lines = table(&["component", "encoding", "tensors", "bytes", "share", &kld, "KLD per MB saved"], 2);
    let percent = |bytes: u64| format!("{:.2} %", 100.0 * bytes as f64 / costs.file_bytes as f64);
    for line in &costs.components {
        lines.add_row([
            short(&line.component).to_string(),
            line.encoding.clone(),
            line.tensors.to_string(),
            count(line.bytes),
            percent(line.bytes),
            format!("{:.6}", line.kld),
            line.kld_per_mb_saved.map_or_else(String::new, |kld| format!("{kld:.6}")),
        ]);
    }
    let row = |name: &str, bytes: u64, kld: String| {
        [name.into(), String::new(), String::new(), count(bytes), percent(bytes), kld, String::new()]
    };
    lines.add_row(row("header, tokenizer", costs.rest_bytes, String::new()));
    lines.add_row(row("all together", costs.file_bytes, format!("{:.6}", costs.kld)));
    let (windows, ctx) = (costs.windows, costs.ctx);
    format!(
        "{}\n\nKLD alone: mean KL divergence from the baseline when this component alone is packed; {windows} windows of {ctx}, \
         spread over the text",
        lines.trim_fmt()
    )
}
