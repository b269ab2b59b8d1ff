//! What a call refuses, and how the caller learns of it.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

use bkpack::{Error, error::short};

use crate::types::Status;

/// Why a call failed, in one sentence.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A pointer that must not be.
    #[error("{0} is NULL")]
    Null(&'static str),
    /// A pointer to numbers that does not fit their alignment.
    #[error("{argument} is not aligned to {alignment} bytes")]
    Misaligned { argument: &'static str, alignment: usize },
    /// An index at or past the end.
    #[error("{what} {index} does not exist: there are {count}, counted from 0")]
    Index { what: &'static str, index: usize, count: usize },
    /// A range of rows that ends past the last one.
    #[error("rows {first} to {first} + {rows} run past the tensor, which has {of} rows")]
    Rows { first: usize, rows: usize, of: usize },
    /// A buffer that does not hold what is to be read from it or written into it.
    #[error("{argument} is {found} {unit} long where {needed} are needed")]
    Length { argument: &'static str, unit: &'static str, needed: usize, found: usize },
    /// A buffer that no memory can hold.
    #[error("{argument}: {length} values are more than memory holds")]
    Huge { argument: &'static str, length: usize },
    /// Input and output share memory.
    #[error("{0} and {1} overlap")]
    Overlap(&'static str, &'static str),
    /// More threads than make sense.
    #[error("{asked} threads are more than {most}; 0 takes as many as there are processors")]
    Threads { asked: usize, most: usize },
    /// The operating system starts no more threads.
    #[error("{0} threads cannot be started: {1}")]
    NoThreads(usize, rayon::ThreadPoolBuildError),
    /// A string that is not text.
    #[error("{0} is not UTF-8")]
    Text(&'static str),
    /// A name that C strings cannot hold.
    #[error("{}: the name {name} holds a NUL character, which ends a string in C; rename the tensor", path.display(), name = short(name))]
    NulInName { path: PathBuf, name: String },
    /// No tensor has this name.
    #[error("{}: no tensor is named {name}", path.display(), name = short(name))]
    NoSuchTensor { path: PathBuf, name: String },
    /// No file of this name travels in the model.
    #[error("{}: no file is named {name}", path.display(), name = short(name))]
    NoSuchFile { path: PathBuf, name: String },
    /// The model was packed without a config.json.
    #[error("{}: it carries no config", .0.display())]
    NoConfig(PathBuf),
    /// What the library refuses.
    #[error(transparent)]
    Library(#[from] Error),
    /// A panic, which is always a mistake of this library.
    #[error("a mistake in bkpack: {0}")]
    Panic(String),
}

impl Failure {
    fn status(&self) -> Status {
        match self {
            Failure::Null(_)
            | Failure::Misaligned { .. }
            | Failure::Index { .. }
            | Failure::Rows { .. }
            | Failure::Length { .. }
            | Failure::Huge { .. }
            | Failure::Overlap(..)
            | Failure::Threads { .. }
            | Failure::Text(_)
            | Failure::Library(Error::Isa(_)) => Status::Argument,
            Failure::NoSuchTensor { .. } | Failure::NoSuchFile { .. } | Failure::NoConfig(_) => Status::NotFound,
            Failure::NoThreads(..) | Failure::Library(Error::Io { .. }) => Status::System,
            Failure::NulInName { .. } | Failure::Library(_) => Status::Model,
            Failure::Panic(_) => Status::Internal,
        }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of a call. Whatever goes wrong becomes a status and this thread's last error; no panic leaves it.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Failure>) -> Status {
    // What a body shares with later calls is locked, written once, or never changed, so a panic leaves it whole.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Failure::Panic(message(&*panic))));
    let Err(failure) = outcome else { return Status::Ok };
    let sentence = CString::new(failure.to_string().replace('\0', "\\0")).unwrap_or_default();
    // Fails where the thread is ending; the status stands all the same.
    let _ = LAST.try_with(|last| last.replace(sentence));
    failure.status()
}

/// This thread's last error; it lives until the next one.
pub(crate) fn last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(<&CStr>::default().as_ptr())
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref().cloned()).unwrap_or_else(|| "a panic without a message".into())
}
