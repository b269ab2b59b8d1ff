//! The kernels of kernels/cuda that are launched, compiled to PTX by kernels/cuda/compile.py.

macro_rules! modules {
    ($($name:literal),* $(,)?) => {
        /// The name and the text of each module.
        pub(super) const MODULES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../cuda/ptx/", $name, ".ptx")))),*];
    };
}

modules!(
    "f32",
    "f16",
    "bf16",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "ternary",
    "binary",
    "elementwise",
    "norm",
    "rope",
    "attention",
    "conv",
    "scan",
    "resolvent",
    "route",
);
