//! Pointers from C: the only place that turns them into references. Each is checked as far as a pointer can be.

use std::{
    ffi::{CStr, OsStr, c_char},
    path::PathBuf,
    ptr::NonNull,
    slice,
};

use crate::{
    failure::Failure,
    types::{Encoding, Part},
};

/// Where a caller wants a value.
pub(crate) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    /// `place` is NULL or valid for writing a `T` until the result is gone.
    pub unsafe fn new(argument: &'static str, place: *mut T) -> Result<Self, Failure> {
        let place = NonNull::new(place).ok_or(Failure::Null(argument))?;
        check_alignment(argument, place.as_ptr())?;
        Ok(Self(place))
    }

    /// Hands the value over.
    pub fn put(self, value: T) {
        // SAFETY: `new` was promised a place for a `T`, and has seen that it is neither NULL nor misaligned.
        unsafe { self.0.write(value) }
    }
}

/// A structure that callers know at a size of their own.
pub(crate) trait Growing: Copy {
    /// Its size in version 1, which every caller knows at least.
    const FIRST_SIZE: usize;
}

impl Growing for Encoding {
    const FIRST_SIZE: usize = 24;
}

impl Growing for Part {
    // Two enumerations, then three words.
    const FIRST_SIZE: usize = 8 + 3 * size_of::<usize>();
}

/// Where a caller wants a structure that may be larger or smaller than this library's.
pub(crate) struct OutStruct<T> {
    place: NonNull<T>,
    size: usize,
}

impl<T: Growing> OutStruct<T> {
    /// # Safety
    /// `place` is NULL or valid for writing `size` bytes until the result is gone.
    pub unsafe fn new(argument: &'static str, place: *mut T, size: usize) -> Result<Self, Failure> {
        let place = NonNull::new(place).ok_or(Failure::Null(argument))?;
        check_alignment(argument, place.as_ptr())?;
        let needed = T::FIRST_SIZE;
        if size < needed {
            return Err(Failure::Length { argument, unit: "bytes", needed, found: size });
        }
        Ok(Self { place, size })
    }

    /// Hands over the members that both sides know, and zeros for those that this library does not know.
    pub fn put(self, value: T) {
        let (place, known) = (self.place.as_ptr().cast::<u8>(), self.size.min(size_of::<T>()));
        // SAFETY: `new` was promised a place of `size` bytes, of which `known` are copied from the value, apart from it,
        // and the rest is set.
        unsafe {
            (&raw const value).cast::<u8>().copy_to_nonoverlapping(place, known);
            place.add(known).write_bytes(0, self.size - known);
        }
    }
}

/// Numbers to read: the first `length` of the caller's `found`.
///
/// # Safety
/// `x` is NULL or valid for reading `found` values, which nothing changes while the result lives.
pub(crate) unsafe fn input<'a>(
    argument: &'static str,
    x: *const f32,
    found: usize,
    length: usize,
) -> Result<&'a [f32], Failure> {
    check_numbers(argument, x, found, length)?;
    // SAFETY: `x` is not NULL, aligned, and the caller promises at least `length` values, which fit into memory.
    Ok(unsafe { slice::from_raw_parts(x, length) })
}

/// Numbers to write: the first `length` of the caller's `found`, set to zero.
///
/// # Safety
/// `y` is NULL or valid for writing `found` values, which nothing else uses while the result lives.
pub(crate) unsafe fn output<'a>(
    argument: &'static str,
    y: *mut f32,
    found: usize,
    length: usize,
) -> Result<&'a mut [f32], Failure> {
    check_numbers(argument, y, found, length)?;
    // SAFETY: `y` is not NULL, aligned, and the caller promises room for at least `length` values, which fit into memory
    // and have been written once before they are borrowed: C may hand over memory that never was.
    unsafe {
        y.write_bytes(0, length);
        Ok(slice::from_raw_parts_mut(y, length))
    }
}

/// A string in UTF-8.
///
/// # Safety
/// `text` is NULL or ends in NUL, and does not change while the result lives.
pub(crate) unsafe fn text<'a>(argument: &'static str, text: *const c_char) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise.
    unsafe { string(argument, text) }?.to_str().map_err(|_| Failure::Text(argument))
}

/// A path: any bytes on Unix, UTF-8 elsewhere.
///
/// # Safety
/// `path` is NULL or ends in NUL.
pub(crate) unsafe fn path(argument: &'static str, path: *const c_char) -> Result<PathBuf, Failure> {
    // SAFETY: the caller's promise.
    let path = unsafe { string(argument, path) }?;
    #[cfg(unix)]
    let path = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(path.to_bytes());
    #[cfg(not(unix))]
    let path = OsStr::new(path.to_str().map_err(|_| Failure::Text(argument))?);
    Ok(path.into())
}

/// An array of numbers before it is borrowed: the argument's name, its address and its length.
pub(crate) type Numbers = (&'static str, *const f32, usize);

/// Refuses two arrays that share memory.
pub(crate) fn check_apart(a: Numbers, b: Numbers) -> Result<(), Failure> {
    let end = |(_, start, length): Numbers| start.addr().saturating_add(length.saturating_mul(size_of::<f32>()));
    let apart = end(a) <= b.1.addr() || end(b) <= a.1.addr();
    if apart { Ok(()) } else { Err(Failure::Overlap(a.0, b.0)) }
}

/// # Safety
/// `text` is NULL or ends in NUL, and does not change while the result lives.
unsafe fn string<'a>(argument: &'static str, text: *const c_char) -> Result<&'a CStr, Failure> {
    if text.is_null() {
        return Err(Failure::Null(argument));
    }
    // SAFETY: it is not NULL, and by the caller's promise ends in NUL.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// The rules for an array of `found` numbers of which `length` are to be used.
fn check_numbers(argument: &'static str, numbers: *const f32, found: usize, length: usize) -> Result<(), Failure> {
    if numbers.is_null() {
        return Err(Failure::Null(argument));
    }
    check_alignment(argument, numbers)?;
    if found < length {
        return Err(Failure::Length { argument, unit: "values", needed: length, found });
    }
    if length > isize::MAX as usize / size_of::<f32>() {
        return Err(Failure::Huge { argument, length });
    }
    Ok(())
}

fn check_alignment<T>(argument: &'static str, pointer: *const T) -> Result<(), Failure> {
    if pointer.is_aligned() { Ok(()) } else { Err(Failure::Misaligned { argument, alignment: align_of::<T>() }) }
}
