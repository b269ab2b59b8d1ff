//! A complex tensor is planned, written and read in halves, each with its own encoding, and given back whole.

use bkpack::{
    Error,
    encoding::{Encoding, FloatName},
    format::{self, PackedFile, PackedWriter, PlannedTensor, Source},
    progress::Silent,
    quant::{Quantized, quantize},
    tensor::{ComplexPart, Tensor, TensorData, TensorSource},
};
use bkpack_kernels::{
    Cpu, FloatType,
    cpu::quantize::{QuantizeOptions, Rounding},
};
use serde_json::Value;
use tempfile::TempDir;

const SHAPE: [usize; 2] = [4, 48];

fn half(part: ComplexPart, encoding: Encoding) -> PlannedTensor {
    let name = format!("core.kernel{}", part.suffix());
    let component = "bk_core".into();
    PlannedTensor { name, shape: SHAPE.to_vec(), component, complex: Some(part), encoding, reason: None }
}

#[test]
fn halves_of_different_encodings_come_back_as_one_complex_tensor() {
    let int8 = Encoding::Int { bits: 8, symmetric: true, group_size: 16, scale: FloatName::F32 };
    let float = Encoding::Float { dtype: FloatName::F32 };
    let tensors = [half(ComplexPart::Imaginary, int8), half(ComplexPart::Real, float)];
    let real: Vec<f32> = (0..192u8).map(|index| f32::from(index) / 7.0).collect();
    let imaginary: Vec<f32> = real.iter().map(|value| 3.0 - value).collect();
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();

    let folder = TempDir::new().unwrap();
    // One file; and two shards, each with one of the halves.
    for shard_bytes in [None, Some(1)] {
        let output = folder.path().join("model.bkpack");
        let source = Source { kind: "npz".into(), files: Vec::new() };
        let plans = format::plan(&output, source, Value::Null, None, &tensors, &[], shard_bytes);
        assert_eq!(plans.len(), if shard_bytes.is_some() { 2 } else { 1 });
        let mut writer = PackedWriter::create(&output, plans, true).unwrap();
        let values = bytes(&imaginary).into();
        let tensor = Tensor::new(SHAPE.to_vec(), TensorData::Float { dtype: FloatType::F32, values }).unwrap();
        let (layout, scale_type) = int8.layout().unwrap();
        let options = QuantizeOptions { layout, scale_type, rounding: Rounding::Nearest, ternary_threshold: 0.5 };
        let mut quantized = Quantized::default();
        quantize(Cpu::detect(), &tensor.matrix(), &options, &mut quantized);
        writer.write_part("core.kernel.imag_packed", &quantized.codes).unwrap();
        writer.write_part("core.kernel.imag_scale", &quantized.scales).unwrap();
        writer.write_part("core.kernel.real", &bytes(&real)).unwrap();
        writer.finish(&[]).unwrap();

        let packed = PackedFile::open(&output).unwrap();
        packed.check_contents(&Silent).unwrap();
        assert_eq!(packed.manifest().source.kind, "npz");
        assert_eq!(packed.names(), ["core.kernel.imag", "core.kernel.real"]);
        assert_eq!(packed.complex_part("core.kernel.real"), Some(ComplexPart::Real));
        assert_eq!(packed.complex_part("core.kernel.imag"), Some(ComplexPart::Imaginary));
        assert_eq!(packed.complex_part("core.kernel"), None);
        assert_eq!(packed.complex_names().collect::<Vec<_>>(), ["core.kernel"]);
        let values = packed.complex_values(Cpu::detect(), "core.kernel").unwrap();
        assert_eq!(values.len(), real.len());
        for (index, [re, im]) in values.into_iter().enumerate() {
            assert_eq!(re, real[index]);
            // Half a step of a group whose magnitudes stay below 25.
            assert!((im - imaginary[index]).abs() <= 25.0 / 127.0 / 2.0, "{index}: {im} for {}", imaginary[index]);
        }
        for name in ["core", "core.kernel.real", "absent"] {
            let error = packed.complex_values(Cpu::detect(), name).unwrap_err();
            assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        }
    }
}
