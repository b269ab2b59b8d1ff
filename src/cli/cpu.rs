//! `bkpack inspect --cpu`: what this CPU is, and what the kernels run on.

use bkpack::{Result, report::table::facts};
use bkpack_kernels::{
    Cpu, Isa,
    cpu::describe::{Description, name},
};
use serde_json::json;

/// What is to be printed.
///
/// # Errors
/// As [`Cpu::from_environment`].
pub fn describe(machine: bool) -> Result<String> {
    let chosen = Cpu::from_environment()?.isa();
    let found: Vec<Isa> = Cpu::available().into_iter().map(Cpu::isa).collect();
    let Description { f32_products, int8_products, unpacking } = chosen.describe();
    let threads = rayon::current_num_threads();
    if machine {
        let sets = Isa::ALL.map(|isa| json!({ "name": isa.name(), "found": found.contains(&isa) }));
        let object = json!({
            "cpu": name(),
            "instruction_sets": sets,
            "isa": chosen.name(),
            "f32_products": f32_products,
            "int8_products": int8_products,
            "unpacking": unpacking,
            "threads": threads,
        });
        return Ok(serde_json::to_string_pretty(&object).expect("plain data is JSON"));
    }
    let names = |sets: &mut dyn Iterator<Item = Isa>| sets.map(Isa::name).collect::<Vec<_>>().join(", ");
    let missing = names(&mut Isa::ALL.into_iter().filter(|isa| !found.contains(isa)));
    let why = match std::env::var_os(Cpu::ENVIRONMENT) {
        Some(_) => format!("{chosen} (as {} says)", Cpu::ENVIRONMENT),
        None => format!("{chosen} (the fastest; {} chooses another)", Cpu::ENVIRONMENT),
    };
    let rows = [
        ("CPU", name()),
        ("instruction sets found", names(&mut found.iter().copied())),
        ("not found", if missing.is_empty() { "none".into() } else { missing }),
        ("in use", why),
        ("products in f32", f32_products.to_owned()),
        ("products in INT8", int8_products.to_owned()),
        ("unpacking of codes", unpacking.to_owned()),
        ("threads", threads.to_string()),
    ];
    Ok(facts(rows).trim_fmt())
}
