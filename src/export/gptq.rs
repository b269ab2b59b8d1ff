//! The layout of GPTQ checkpoints, version 2: words and scales transposed, zero points as they are.

use std::borrow::Cow;

use bkpack_kernels::{FloatType, Matrix};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Options, Refusal, Target,
    folder::{Conversion, FolderExport, GPTQ_CONFIG, Job, config, config_file, exported_tensors},
    fused,
    integers::{Integers, transpose_words},
    modules::{Modules, Role},
    plain::float_bytes,
    schemes::Schemes,
};
use crate::{
    error::Result,
    folder::{StoredTensor, to_json},
    format::PackedFile,
    model::Architecture,
    progress::Observer,
    tensor::TensorSource,
};

const WIDTHS: [u32; 4] = [2, 3, 4, 8];

/// Rows and columns come in multiples of this: what one word row of 3-bit codes holds.
const MULTIPLE: usize = 32;

/// The tensors of a linear layer; `name` ends in `.weight`.
pub(super) fn stored(name: &str, shape: &[usize], integers: &Integers) -> Vec<StoredTensor> {
    let [rows, cols] = *shape else { unreachable!("linear layers are matrices") };
    let module = name.strip_suffix("weight").expect("the name of a weight");
    let part = |suffix: &str, dtype, shape: &[usize]| StoredTensor {
        name: format!("{module}{suffix}"),
        dtype,
        shape: shape.into(),
    };
    let groups = integers.groups(cols);
    vec![
        part("qweight", Dtype::I32, &[integers.words(cols), rows]),
        part("qzeros", Dtype::I32, &[groups, integers.words(rows)]),
        part("scales", Dtype::F16, &[groups, rows]),
        part("g_idx", Dtype::I32, &[cols]),
    ]
}

/// The bytes of [`stored`].
pub(super) fn bytes<'a>(matrix: &Matrix<'a>, integers: &Integers) -> Vec<Cow<'a, [u8]>> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let groups = integers.groups(cols);
    let scales = integers.scales(matrix);
    let transposed: Vec<f32> = (0..groups * rows).map(|index| scales[index % rows * groups + index / rows]).collect();
    let zeros = integers.pack_columns(&integers.zeros(matrix), groups); // [words, groups]
    let group_of: Vec<u8> = (0..cols).flat_map(|column| ((column / integers.group) as u32).to_le_bytes()).collect();
    vec![
        transpose_words(&integers.codes(matrix), integers.words(cols)).into(),
        transpose_words(&zeros, groups).into(),
        float_bytes(&transposed, FloatType::F16).into(),
        group_of.into(),
    ]
}

/// Plans the folder.
pub(super) fn prepare<'a>(
    packed: &'a PackedFile,
    options: &Options,
    observer: &dyn Observer,
) -> Result<FolderExport<'a>> {
    let target = Target::Gptq;
    let dtype = options.dtype.unwrap_or(FloatType::F16);
    let modules = Modules::of(packed);
    let (mut jobs, mut schemes, mut plain) = (Vec::new(), Schemes::default(), Vec::new());
    for tensor in exported_tensors(packed) {
        observer.check()?;
        let mut conversion = Conversion::Plain(dtype);
        if let Role::Linear(module) = modules.role(tensor) {
            match integers(&packed.tensor(&tensor.name)?.matrix()) {
                Ok(integers) => {
                    conversion = Conversion::Gptq(integers);
                    schemes.add(module, integers, tensor);
                }
                Err(why) => {
                    schemes.leave_plain(tensor, why);
                    plain.push(module.to_owned());
                }
            }
        }
        jobs.push(Job { tensor, conversion });
    }
    let mut refusals = modules.refusals(packed, target.name());
    refusals.extend(schemes.refusal(target.name()));
    let quantization = quantization_config(&schemes, &plain);
    let mut configs = vec![(GPTQ_CONFIG, to_json(&quantization))];
    configs.extend(config(packed, dtype).map(|mut config| {
        config.insert("quantization_config".into(), quantization);
        config_file(config)
    }));
    let mut export = FolderExport::new(packed, target, jobs, configs, refusals, observer)?;
    export.plan.warnings = warnings(packed, &modules, &schemes, &plain);
    export.plan.notices.extend(schemes.notices());
    Ok(export)
}

/// How a matrix stands in this layout; `Err` says why it stays plain.
fn integers(matrix: &Matrix) -> Result<Integers, &'static str> {
    let integers = Integers::holding(matrix, &WIDTHS)?;
    if ![matrix.rows(), matrix.cols()].iter().all(|size| size.is_multiple_of(MULTIPLE)) {
        return Err("its rows or columns are no multiple of 32");
    }
    if !integers.scale_rounding(matrix, FloatType::F16).holds() {
        return Err("a scale is too small or too large for F16, which this layout has for scales");
    }
    Ok(integers)
}

fn quantization_config(schemes: &Schemes, plain: &[String]) -> Value {
    let groups = schemes.sorted();
    let group_size = |integers: &Integers| if integers.whole_row { json!(-1) } else { json!(integers.group) };
    let mut dynamic = Map::new();
    let mut rule = |sign: char, module: &str, value: Value| {
        // vLLM asks by the name of the fused layer, GPTQModel by the names of its parts.
        for name in std::iter::once(module.to_owned()).chain(fused::fused_name(module)) {
            dynamic.insert(format!("{sign}:^{}$", regex::escape(&name)), value.clone());
        }
    };
    for module in plain.iter().filter(|module| *module != "lm_head") {
        rule('-', module, json!({}));
    }
    for (integers, modules) in groups.iter().skip(1) {
        for module in modules {
            let value = json!({ "bits": integers.bits, "group_size": group_size(integers), "sym": integers.symmetric });
            rule('+', module, value);
        }
    }
    let base = groups.first().map(|(integers, _)| *integers);
    json!({
        "bits": base.map(|base| base.bits),
        "group_size": base.map(|base| group_size(&base)),
        "desc_act": false,
        "sym": base.map(|base| base.symmetric),
        "lm_head": schemes.get("lm_head").is_some(),
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": { "quantizer": [concat!("bkpack:", env!("CARGO_PKG_VERSION"))] },
    })
}

fn warnings(packed: &PackedFile, modules: &Modules, schemes: &Schemes, plain: &[String]) -> Vec<Refusal> {
    let mut warnings = Vec::new();
    let mut warn = |runtime: &str, why: String| warnings.push(Refusal { runtime: runtime.into(), why });
    match packed.config().and_then(Architecture::from_config) {
        None if packed.config().is_some() => {
            let name = modules.architecture().unwrap_or("(none)");
            warn(
                "GPTQModel",
                format!("architecture {name} is not known here: which of its layers are linear is told by their names"),
            );
        }
        Some(Architecture::Mamba) => {
            warn("GPTQModel", "has no definition of Mamba, so it will not load this folder".into())
        }
        _ => {}
    }
    if let Some(why) = fused::mismatch(schemes, plain) {
        warn("vLLM", why);
    }
    let first = |wanted: &dyn Fn(&Integers) -> bool| schemes.iter().find(|scheme| wanted(&scheme.integers));
    if let Some(scheme) = first(&|integers| !integers.symmetric) {
        warn(
            "vLLM",
            format!(
                "{} is asymmetric, which its Marlin kernels do not take for GPTQ; they do in compressed-tensors",
                scheme.module
            ),
        );
    }
    if let Some(scheme) = first(&|integers| ![4, 8].contains(&integers.bits)) {
        warn(
            "vLLM",
            format!(
                "{} has {} bits, which its Marlin kernels do not take; they take 4 and 8",
                scheme.module, scheme.integers.bits
            ),
        );
    }
    let odd = |integers: &Integers| !integers.whole_row && ![32, 64, 128].contains(&integers.group);
    if let Some(scheme) = first(&odd) {
        let why = format!(
            "kernels take groups of 32, 64, 128 or a row, and {} has groups of {}",
            scheme.module, scheme.integers.group
        );
        warn("GPTQModel", why);
    }
    warnings
}
