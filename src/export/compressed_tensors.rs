//! The layout `pack-quantized` of compressed-tensors, which transformers and vLLM load.

use std::borrow::Cow;

use bkpack_kernels::{FloatType, Matrix};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::{
    Options, Refusal, Target,
    folder::{Conversion, FolderExport, Job, config, config_file, exported_tensors},
    fused,
    integers::Integers,
    modules::{Modules, Role},
    plain::float_bytes,
    schemes::Schemes,
};
use crate::{
    encoding::FloatName, error::Result, folder::StoredTensor, format::PackedFile, model::Architecture,
    progress::Observer, tensor::TensorSource,
};

/// Widths that both runtimes take.
const WIDTHS: [u32; 2] = [4, 8];

/// Group sizes of vLLM's Marlin kernels; they take one group a row, too.
const MARLIN_GROUPS: [usize; 3] = [32, 64, 128];

/// The tensors of a linear layer; `name` ends in `weight`.
pub(super) fn stored(name: &str, shape: &[usize], integers: &Integers, dtype: FloatType) -> Vec<StoredTensor> {
    let [rows, cols] = *shape else { unreachable!("linear layers are matrices") };
    let part = |suffix: &str, dtype, shape: &[usize]| StoredTensor {
        name: format!("{name}_{suffix}"),
        dtype,
        shape: shape.into(),
    };
    let groups = integers.groups(cols);
    let mut parts = vec![
        part("packed", Dtype::I32, &[rows, integers.words(cols)]),
        part("scale", FloatName::from(dtype).safetensors(), &[rows, groups]),
        part("shape", Dtype::I64, &[2]),
    ];
    if !integers.symmetric {
        parts.push(part("zero_point", Dtype::I32, &[integers.words(rows), groups]));
    }
    parts
}

/// The bytes of [`stored`].
pub(super) fn bytes<'a>(matrix: &Matrix<'a>, integers: &Integers, dtype: FloatType) -> Vec<Cow<'a, [u8]>> {
    let shape = [matrix.rows() as i64, matrix.cols() as i64];
    let mut parts = vec![
        integers.codes(matrix),
        float_bytes(&integers.scales(matrix), dtype).into(),
        shape.iter().flat_map(|size| size.to_le_bytes()).collect::<Vec<u8>>().into(),
    ];
    if !integers.symmetric {
        let groups = integers.groups(matrix.cols());
        parts.push(integers.pack_columns(&integers.zeros(matrix), groups).into());
    }
    parts
}

/// Plans the folder.
pub(super) fn prepare<'a>(
    packed: &'a PackedFile,
    options: &Options,
    observer: &dyn Observer,
) -> Result<FolderExport<'a>> {
    let target = Target::CompressedTensors;
    let dtype = options.dtype.unwrap_or(FloatType::F16);
    let modules = Modules::of(packed);
    let (mut jobs, mut layers, mut ignore) = (Vec::new(), Vec::new(), Vec::new());
    let mut schemes = Schemes::default();
    let mamba = packed.config().and_then(Architecture::from_config) == Some(Architecture::Mamba);
    for tensor in exported_tensors(packed) {
        observer.check()?;
        match modules.role(tensor) {
            // transformers multiplies with this matrix itself, past the layer that would unpack it.
            Role::Linear(module) if mamba && module.ends_with(".dt_proj") => ignore.push(module.to_owned()),
            Role::Linear(module) => match Integers::holding(&packed.tensor(&tensor.name)?.matrix(), &WIDTHS) {
                Ok(integers) => layers.push((jobs.len(), module, integers)),
                Err(why) => {
                    schemes.leave_plain(tensor, why);
                    ignore.push(module.to_owned());
                }
            },
            Role::Router(module) => ignore.push(module.to_owned()),
            Role::Embedding(_) | Role::Other => {}
        }
        jobs.push(Job { tensor, conversion: Conversion::Plain(dtype) });
    }
    // Some ways to load a folder in transformers and vLLM know but one scheme for all layers.
    Integers::unify(&mut layers.iter_mut().map(|(_, _, integers)| integers).collect::<Vec<_>>());
    for (job, module, integers) in layers {
        schemes.add(module, integers, jobs[job].tensor);
        jobs[job].conversion = Conversion::CompressedTensors(integers, dtype);
    }
    // A tied head is a linear layer without a tensor of its own.
    if packed.entry("lm_head.weight").is_none() {
        ignore.push("lm_head".into());
    }
    let mut refusals = modules.refusals(packed, target.name());
    refusals.extend(schemes.refusal(target.name()));
    let configs = config(packed, dtype).map(|mut config| {
        config.insert("quantization_config".into(), quantization_config(&schemes, &ignore));
        config_file(config)
    });
    let mut export = FolderExport::new(packed, target, jobs, configs.into_iter().collect(), refusals, observer)?;
    export.plan.warnings = warnings(packed, &modules, &schemes, &ignore, dtype);
    export.plan.notices.extend(schemes.notices());
    Ok(export)
}

fn quantization_config(schemes: &Schemes, ignore: &[String]) -> Value {
    let groups = schemes.sorted();
    let alone = groups.len() == 1;
    let config_groups: serde_json::Map<String, Value> = groups
        .into_iter()
        .enumerate()
        .map(|(index, (integers, names))| {
            // vLLM finds the class of a fused layer before it looks for the names that are fused in it, so with several
            // groups each layer is named.
            let targets: Value = if alone { json!(["Linear"]) } else { json!(names) };
            let (strategy, group_size) =
                if integers.whole_row { ("channel", Value::Null) } else { ("group", json!(integers.group)) };
            let weights = json!({
                "num_bits": integers.bits, "type": "int", "symmetric": integers.symmetric, "strategy": strategy,
                "group_size": group_size, "dynamic": false, "actorder": null,
            });
            let group = json!({
                "targets": targets, "weights": weights, "input_activations": null, "output_activations": null,
            });
            (format!("group_{index}"), group)
        })
        .collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": null,
        "ignore": ignore,
        "config_groups": config_groups,
    })
}

fn warnings(
    packed: &PackedFile,
    modules: &Modules,
    schemes: &Schemes,
    ignore: &[String],
    dtype: FloatType,
) -> Vec<Refusal> {
    let mut warnings = Vec::new();
    let mut warn = |runtime: &str, why: String| warnings.push(Refusal { runtime: runtime.into(), why });
    let architecture = packed.config().and_then(Architecture::from_config);
    if architecture.is_none() && packed.config().is_some() {
        let name = modules.architecture().unwrap_or("(none)");
        warn(
            "transformers",
            format!("architecture {name} is not known here: which of its layers are linear is told by their names"),
        );
    }
    let several = schemes.sorted().len() > 1;
    match architecture {
        Some(Architecture::Mamba) => {
            let only =
                "loads Mamba in this layout only with quantization_config=CompressedTensorsConfig(dequantize=True)";
            warn(
                "transformers",
                format!("{only}{}", if several { ", and only where all layers have one scheme" } else { "" }),
            );
        }
        Some(Architecture::Mixtral) if several => {
            warn(
                "transformers",
                "takes one scheme for all experts; give them one encoding whose groups divide their columns".into(),
            );
        }
        _ => {}
    }
    if let Some(scheme) = schemes.iter().find(|scheme| !scheme.integers.symmetric) {
        let how = match several {
            false => "only with quantization_config=CompressedTensorsConfig(dequantize=True)",
            true => "not at all beside layers of another scheme; pack without --asymmetric for it",
        };
        let why = format!("{} is asymmetric, which version 5 with compressed-tensors 0.20 loads {how}", scheme.module);
        warn("transformers", why);
    }
    if let Some(why) = fused::mismatch(schemes, ignore) {
        warn("vLLM", why);
    }
    if dtype == FloatType::F32 {
        warn("vLLM", "computes packed weights in FP16 or BF16, not FP32; pass --dtype fp16 or bf16".into());
    }
    if schemes.get("lm_head").is_some() {
        warn("vLLM", "takes no quantized output head in this layout; pack it with --tensor '^lm_head=fp16'".into());
    }
    let marlin = |integers: &Integers| integers.whole_row || MARLIN_GROUPS.contains(&integers.group);
    let odd: Vec<_> = schemes.iter().filter(|scheme| !marlin(&scheme.integers)).collect();
    if let Some(first) = odd.first() {
        warn(
            "vLLM",
            format!(
                "its Marlin kernels take groups of 32, 64, 128 or a row, and {} has groups of {} ({} of {} layers)",
                first.module,
                first.integers.group,
                odd.len(),
                schemes.len()
            ),
        );
    }
    let odd: Vec<_> = schemes.iter().filter(|scheme| scheme.rows % 64 != 0 || scheme.cols % 128 != 0).collect();
    if let Some(first) = odd.first() {
        warn(
            "vLLM",
            format!(
                "its Marlin kernels take outputs in multiples of 64 and inputs in multiples of 128, and {} is [{}, {}] \
                 ({} of {} layers); other kernels may take it",
                first.module,
                first.rows,
                first.cols,
                odd.len(),
                schemes.len()
            ),
        );
    }
    warnings
}
