//! The kernels of kernels/cuda, compiled to PTX by kernels/cuda/compile.py.

macro_rules! modules {
    ($($name:literal),* $(,)?) => {
        /// The name and the text of each module.
        pub(super) const MODULES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../cuda/ptx/", $name, ".ptx")))),*];
    };
}

modules!(
    "gemv_float",
    "gemv_int",
    "gemv_small",
    "gemm_float",
    "gemm_int",
    "gemm_small",
    "plain",
    "embed",
    "elementwise",
    "norm",
    "rope",
    "attention",
    "conv",
    "scan",
    "resolvent",
    "route",
    "loss",
);
