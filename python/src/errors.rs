//! The library's errors as Python exceptions with the same sentence.

use std::io::ErrorKind;

use bkpack::{Error, Result};
use pyo3::{exceptions::PyKeyboardInterrupt, prelude::*};

/// The exception of an error. Where the operating system refused something it has the `errno`.
pub fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let (class, errno) = match error {
        Error::Cancelled => return PyKeyboardInterrupt::new_err(()),
        Error::Exists { .. } => ("OutputExistsError", None),
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => ("MissingFileError", source.raw_os_error()),
        Error::Io { source, .. } => ("FileError", source.raw_os_error()),
        _ => ("BkpackError", None),
    };
    let made = || {
        let exception = py.import("bkpack._errors")?.getattr(class)?.call1((error.to_string(),))?;
        if let Some(errno) = errno {
            exception.setattr("errno", errno)?;
        }
        Ok(exception)
    };
    made().map_or_else(|failed| failed, PyErr::from_value)
}

/// A whole number that its type holds and that is at least `least`, by the name of the command's option.
pub fn whole<T: TryFrom<i64>>(name: &'static str, number: i64, least: i64) -> Result<T> {
    if number < least {
        return Err(option(name, format!("{number} is not at least {least}")));
    }
    T::try_from(number).map_err(|_| option(name, format!("{number} is too large")))
}

/// Refuses an argument, by the name of the command's option.
pub fn option(option: &'static str, why: impl Into<String>) -> Error {
    Error::Option { option, why: why.into() }
}
