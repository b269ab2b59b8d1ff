//! The native half of the Python package `bkpack`: reading, converting and measuring, by the library's own code. What
//! users see is `bkpack/__init__.py`.

mod convert;
mod errors;
mod evaluate;
mod packed;
mod work;

use pyo3::pymodule;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::{convert::convert, evaluate::evaluate, packed::Packed};
}
