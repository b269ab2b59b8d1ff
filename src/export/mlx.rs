//! The layout of MLX (mlx_lm): weight `scale * u + bias` a group.

use std::borrow::Cow;

use bkpack_kernels::{Data, FloatType, Matrix};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Fidelity, Options, Refusal, Target,
    folder::{Conversion, FolderExport, Job, config, config_file, exported_tensors},
    integers::Integers,
    modules::{Modules, Role, is_tied},
    plain::{Rounding, float_bytes, rounding},
    schemes::Schemes,
};
use crate::{
    encoding::FloatName,
    error::Result,
    folder::StoredTensor,
    format::PackedFile,
    model::{Architecture, config::LlamaConfig},
    progress::Observer,
    tensor::TensorSource,
};

const WIDTHS: [u32; 6] = [2, 3, 4, 5, 6, 8];
const GROUPS: [usize; 3] = [128, 64, 32];

/// The tensors of a layer; `name` ends in `.weight`.
pub(super) fn stored(name: &str, shape: &[usize], integers: &Integers, dtype: FloatType) -> Vec<StoredTensor> {
    let [rows, cols] = *shape else { unreachable!("layers are matrices") };
    let module = name.strip_suffix("weight").expect("the name of a weight");
    let part = |suffix: &str, dtype, columns| StoredTensor {
        name: format!("{module}{suffix}"),
        dtype,
        shape: vec![rows, columns],
    };
    let float = FloatName::from(dtype).safetensors();
    let groups = integers.groups(cols);
    vec![part("weight", Dtype::U32, integers.words(cols)), part("scales", float, groups), part("biases", float, groups)]
}

/// The bytes of [`stored`].
pub(super) fn bytes<'a>(matrix: &Matrix<'a>, integers: &Integers, dtype: FloatType) -> Vec<Cow<'a, [u8]>> {
    let scales = integers.scales(matrix);
    let biases = biases(matrix, integers, &scales);
    vec![integers.codes(matrix), float_bytes(&scales, dtype).into(), float_bytes(&biases, dtype).into()]
}

/// `-scale * zero point` of every group: exact where the grid is symmetric, since its zero point is a power of two.
fn biases(matrix: &Matrix, integers: &Integers, scales: &[f32]) -> Vec<f32> {
    scales.iter().zip(integers.zeros(matrix)).map(|(scale, zero)| -scale * f32::from(zero)).collect()
}

/// Whether `scale * u + bias` is the packed weight.
pub(super) fn fidelity(matrix: &Matrix, integers: &Integers, dtype: FloatType) -> Result<Fidelity, String> {
    let scales = integers.scales(matrix);
    let of_biases = rounding(&biases(matrix, integers, &scales), dtype).fidelity("biases", "a bias of ", dtype)?;
    let fidelity = match integers.scale_fidelity(matrix, dtype)? {
        Fidelity::Lossless => of_biases,
        rounded => rounded,
    };
    // The products of an F32 scale are rounded before they are added, those of an F16 scale fit into F32.
    match (matrix.data(), fidelity) {
        (Data::Quantized { scale_type: FloatType::F32, .. }, Fidelity::Lossless)
            if rounding(&scales, FloatType::F16) != Rounding::Exact =>
        {
            Ok(Fidelity::Rounded { why: "sums in the last bit (F32 scales)".into() })
        }
        (_, fidelity) => Ok(fidelity),
    }
}

/// Plans the folder.
pub(super) fn prepare<'a>(
    packed: &'a PackedFile,
    options: &Options,
    observer: &dyn Observer,
) -> Result<FolderExport<'a>> {
    let target = Target::Mlx;
    let dtype = options.dtype.unwrap_or(FloatType::F16);
    let modules = Modules::of(packed);
    let (mut jobs, mut schemes, mut tied_head) = (Vec::new(), Schemes::default(), false);
    for tensor in exported_tensors(packed) {
        observer.check()?;
        // mlx_lm drops the weight of a tied head, but not its scales.
        if is_tied(packed) && tensor.name == "lm_head.weight" {
            tied_head = true;
            continue;
        }
        let mut conversion = Conversion::Plain(dtype);
        if let Role::Linear(module) | Role::Embedding(module) | Role::Router(module) = modules.role(tensor) {
            let matrix = packed.tensor(&tensor.name)?;
            match Integers::holding(&matrix.matrix(), &WIDTHS).and_then(|integers| integers.in_groups_of(&GROUPS)) {
                Ok(integers) => {
                    conversion = Conversion::Mlx(integers, dtype);
                    schemes.add(module, integers, tensor);
                }
                Err(why) => schemes.leave_plain(tensor, why),
            }
        }
        jobs.push(Job { tensor, conversion });
    }
    let mut refusals = modules.refusals(packed, target.name());
    refusals.extend(schemes.refusal(target.name()));
    refusals.extend(expert_refusals(packed, &schemes));
    let configs = config(packed, dtype).map(|mut config| {
        let quantization = quantization(&schemes);
        config.insert("quantization".into(), quantization.clone());
        config.insert("quantization_config".into(), quantization);
        config_file(config)
    });
    let mut export = FolderExport::new(packed, target, jobs, configs.into_iter().collect(), refusals, observer)?;
    export.plan.warnings = warnings(packed, &modules);
    export.plan.notices.extend(schemes.notices());
    if tied_head {
        export.plan.notices.push("lm_head.weight is left out: config.json ties it to the embedding".into());
    }
    Ok(export)
}

/// The base scheme and, by the path that a module has in mlx_lm, what differs from it.
fn quantization(schemes: &Schemes) -> Value {
    let parameters =
        |integers: &Integers| json!({ "group_size": integers.group, "bits": integers.bits, "mode": "affine" });
    let groups = schemes.sorted();
    let mut config: Map<String, Value> =
        groups.first().map_or(Value::Null, |(base, _)| parameters(base)).as_object().cloned().unwrap_or_default();
    for (integers, modules) in groups.iter().skip(1) {
        for module in modules {
            config.insert(stacked(module).unwrap_or_else(|| (*module).to_owned()), parameters(integers));
        }
    }
    config.into()
}

/// The layer that mlx_lm stacks an expert's layer into: `block_sparse_moe.experts.3.w1` is in `switch_mlp.gate_proj`.
fn stacked(module: &str) -> Option<String> {
    let (experts, name) = module.rsplit_once('.')?;
    let (block, _) = experts.rsplit_once('.')?;
    let block = block.strip_suffix(".block_sparse_moe.experts")?;
    let name = ["gate_proj", "down_proj", "up_proj"][["w1", "w2", "w3"].iter().position(|known| *known == name)?];
    Some(format!("{block}.block_sparse_moe.switch_mlp.{name}"))
}

/// mlx_lm reads the experts of Mixtral one by one and stacks them, so those of a block must be alike.
fn expert_refusals(packed: &PackedFile, schemes: &Schemes) -> Option<Refusal> {
    if packed.config().and_then(Architecture::from_config) != Some(Architecture::Mixtral) {
        return None;
    }
    let refuse = |why| Some(Refusal { runtime: "MLX".into(), why });
    if let Some(tensor) = packed.tensors().iter().find(|tensor| tensor.shape.len() == 3) {
        return refuse(format!(
            "tensor {} holds all experts of a block, and mlx_lm reads Mixtral's one by one \
             (block_sparse_moe.experts.0.w1); \
             pack a checkpoint in that layout",
            tensor.name
        ));
    }
    let experts = packed.tensors().iter().filter_map(|tensor| tensor.name.strip_suffix(".weight"));
    let mut first: std::collections::HashMap<String, (&str, Option<&Integers>)> = std::collections::HashMap::new();
    for module in experts {
        let Some(layer) = stacked(module) else { continue };
        let (other, integers) = *first.entry(layer).or_insert((module, schemes.get(module)));
        if integers != schemes.get(module) {
            return refuse(format!(
                "mlx_lm stacks {other} and {module}, which are packed in different ways; give the experts of a \
                 block one encoding"
            ));
        }
    }
    None
}

fn warnings(packed: &PackedFile, modules: &Modules) -> Vec<Refusal> {
    let mut warnings = Vec::new();
    let mut warn = |why: String| warnings.push(Refusal { runtime: "MLX".into(), why });
    match packed.config().and_then(Architecture::from_config) {
        None if packed.config().is_some() => {
            let name = modules.architecture().unwrap_or("(none)");
            warn(format!("architecture {name} is not known here: mlx_lm may want other names"));
        }
        Some(
            architecture @ (Architecture::Mistral | Architecture::Mixtral | Architecture::Qwen2 | Architecture::Qwen3),
        ) => {
            let config = packed.config().map(|config| LlamaConfig::parse(packed.path(), architecture, config));
            if let Some(window) = config.and_then(|config| config.ok()?.narrowest_window()) {
                let name = modules.architecture().unwrap_or("(none)");
                warn(format!("mlx_lm runs {name} without its window of {window} tokens; longer texts differ"));
            }
        }
        _ => {}
    }
    warnings
}
