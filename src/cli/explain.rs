//! `bkpack explain`: why a tensor of a packed file has its encoding.

use std::path::PathBuf;

use bkpack::{
    Error, Result,
    error::short,
    format::{PackedFile, PackedTensor},
    policy::{
        explain::{Explainer, Explanation, Subject},
        reason::Reason,
    },
    report::table::{count, facts, table},
    tensor::TensorSource,
};
use clap::Args;
use serde::Serialize;

use super::print;

const EXAMPLES: &str = "\
Examples:
  bkpack explain model.bkpack
      Every tensor with what decided about it
  bkpack explain model.bkpack model.layers.0.self_attn.v_proj.weight
      One tensor: what was asked, by which rule, rank, line or cost, and what stood against it
  bkpack explain model.bkpack --json
      The same for machines, with what the file records";

/// Names that are offered in place of one that is not there.
const NEAR: usize = 3;

/// Longer names are not compared: nobody types them.
const LONGEST_NAME: usize = 512;

/// Say why the tensors of a packed file have their encodings
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ExplainArgs {
    /// Packed file
    packed: PathBuf,

    /// Name of a tensor [default: a table of all]
    tensor: Option<String>,

    /// Print JSON for machines: one object, or an array of them for all tensors
    #[arg(long)]
    json: bool,
}

/// What is known of one tensor.
#[derive(Debug, Serialize)]
struct Explained<'a> {
    name: &'a str,
    component: &'a str,
    shape: &'a [usize],
    encoding: String,
    bytes: u64,
    bits_per_weight: f64,
    policy: Option<&'a str>,
    /// What was asked for; absent where the file does not say it.
    asked: Option<String>,
    #[serde(skip)]
    phrase: String,
    why: String,
    /// What the file records of the tensor beside its policy.
    recorded: Option<Reason>,
}

/// Runs the subcommand.
pub fn run(args: &ExplainArgs) -> Result<()> {
    let packed = PackedFile::open(&args.packed)?;
    let explainer = Explainer::new(&packed.manifest().policy, packed.activations());
    match &args.tensor {
        Some(name) => {
            let Some(tensor) = packed.entry(name) else {
                let near = nearest(name, packed.names());
                return Err(Error::NoSuchTensor { path: args.packed.clone(), tensor: name.clone(), near });
            };
            let explained = explain(&explainer, tensor);
            print(&if args.json { machine(&explained) } else { one(&explained) })
        }
        None => {
            let all: Vec<Explained> = packed.tensors().iter().map(|tensor| explain(&explainer, tensor)).collect();
            print(&if args.json { machine(&all) } else { overview(&all) })
        }
    }
}

fn explain<'a>(explainer: &Explainer<'a>, tensor: &'a PackedTensor) -> Explained<'a> {
    let PackedTensor { name, shape, component, encoding, reason, .. } = tensor;
    let bytes = tensor.bytes() as u64;
    let subject = Subject { name, component, encoding: *encoding, bytes, reason: reason.as_ref() };
    let Explanation { phrase, sentence, asked, recorded } = explainer.explain(&subject);
    Explained {
        name,
        component,
        shape,
        encoding: encoding.to_string(),
        bytes,
        bits_per_weight: 8.0 * bytes as f64 / tensor.elements() as f64,
        policy: explainer.policy_name(),
        asked,
        phrase,
        why: sentence,
        recorded,
    }
}

fn machine(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("plain data is JSON")
}

fn one(explained: &Explained) -> String {
    let asked = explained.asked.as_ref().map(|text| ("asked for", short(text).to_string()));
    let rows = [
        ("tensor", short(explained.name).to_string()),
        ("component", short(explained.component).to_string()),
        ("shape", format!("{:?}", explained.shape)),
        ("encoding", explained.encoding.clone()),
        ("bytes", count(explained.bytes)),
        ("bits per weight", format!("{:.3}", explained.bits_per_weight)),
        ("policy", explained.policy.map_or_else(|| "not recorded".into(), |name| short(name).to_string())),
    ];
    format!("{}\n\n{}", facts(rows.into_iter().chain(asked)).trim_fmt(), explained.why)
}

fn overview(all: &[Explained]) -> String {
    let mut lines = table(&["tensor", "component", "encoding", "bytes", "bits/weight", "why"], 3);
    for explained in all {
        lines.add_row([
            short(explained.name).to_string(),
            short(explained.component).to_string(),
            explained.encoding.clone(),
            count(explained.bytes),
            format!("{:.3}", explained.bits_per_weight),
            explained.phrase.clone(),
        ]);
    }
    if let Some(column) = lines.column_mut(5) {
        column.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    lines.trim_fmt()
}

/// The names most like one that is not there: those that contain it first.
fn nearest(wanted: &str, names: &[String]) -> Vec<String> {
    let comparable = |name: &str| name.len() <= LONGEST_NAME;
    if !comparable(wanted) {
        return Vec::new();
    }
    let likeness = |name: &str| {
        let contained = if name.contains(wanted) { 1.0 } else { 0.0 };
        contained + strsim::normalized_damerau_levenshtein(wanted, name)
    };
    let mut ranked: Vec<(f64, &String)> =
        names.iter().filter(|name| comparable(name)).map(|name| (likeness(name), name)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().take(NEAR).filter(|(likeness, _)| *likeness > 0.3).map(|(_, name)| name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn near_names_are_found() {
        let names = ["model.embed_tokens.weight", "model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"];
        let names = names.map(String::from);
        assert_eq!(nearest("embed", &names)[0], names[0]);
        assert_eq!(nearest("model.layers.1.q_prj.weight", &names)[..2], [names[2].clone(), names[1].clone()]);
        assert!(nearest("zzz", &names).is_empty() && nearest(&"m".repeat(1000), &names).is_empty());
    }
}
