//! Layers that a runtime fuses into one must be quantized alike.

use std::collections::BTreeMap;

use super::{
    integers::Integers,
    schemes::{Schemes, scheme_of},
};

/// Layers of a block that vLLM makes one, and the name of that one.
pub(super) const FUSED: [(&str, &[&str]); 2] =
    [("qkv_proj", &["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", &["gate_proj", "up_proj"])];

/// The fused layer that a module is part of: its name in vLLM.
pub(super) fn fused_name(module: &str) -> Option<String> {
    let (parent, name) = module.rsplit_once('.')?;
    if let Some((experts, _)) = parent.rsplit_once('.').filter(|(experts, _)| experts.ends_with(".experts")) {
        // All experts of a block are one, whatever their parts are named.
        return Some(experts.to_owned());
    }
    let (fused, _) = FUSED.iter().find(|(_, parts)| parts.contains(&name))?;
    Some(format!("{parent}.{fused}"))
}

/// The first fused layer whose parts differ, as a sentence.
pub(super) fn mismatch(schemes: &Schemes, plain: &[String]) -> Option<String> {
    let mut fused: BTreeMap<String, Vec<(&str, Option<Integers>)>> = BTreeMap::new();
    let quantized = schemes.iter().map(|scheme| (scheme.module.as_str(), Some(scheme_of(&scheme.integers))));
    for (module, integers) in quantized.chain(plain.iter().map(|module| (module.as_str(), None))) {
        if let Some(name) = fused_name(module) {
            fused.entry(name).or_default().push((module, integers));
        }
    }
    let differs = |parts: &&Vec<(&str, Option<Integers>)>| parts.iter().any(|(_, integers)| *integers != parts[0].1);
    let found: Vec<_> = fused.values().filter(differs).collect();
    let first = found.first()?;
    let (a, b) = (first[0], first.iter().find(|(_, integers)| *integers != first[0].1)?);
    let describe = |(module, integers): (&str, Option<Integers>)| match integers {
        Some(integers) => format!("{module} is {integers}"),
        None => format!("{module} is not quantized"),
    };
    Some(format!(
        "makes one layer of q, k and v, of gate and up, and of all experts of a block, which must be quantized alike: \
         {}, {} ({} of \
         {} such layers); give them one encoding",
        describe(a),
        describe(*b),
        found.len(),
        fused.len()
    ))
}
