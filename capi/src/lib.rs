//! libbkpack: the C interface of bkpack. `include/bkpack.h` is made of this file's functions and of `types`.
//!
//! Every function runs its body in [`failure::call`], so that errors become a status and no panic crosses into C. What
//! callers must keep to is the same for all, and stands at the top of the header.

#![expect(clippy::missing_safety_doc, reason = "one contract for all functions: the top of the header")]

mod boundary;
mod failure;
#[cfg(test)]
mod tests;
mod threads;
mod types;

use std::{
    ffi::{c_char, c_void},
    ptr,
};

use bkpack::{
    progress::Silent,
    tensor::{TensorSource, matrix_shape},
};

use crate::{
    boundary::{Out, OutStruct, check_apart, input, output, path, text},
    failure::{Failure, call, last_error},
    types::{Encoding, Model, Part, Status},
};

/// The version of the library, e.g. "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn bkpack_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// What was wrong with the last call on this thread that failed: one sentence in UTF-8, empty if none has failed. It is
/// valid until the next call that fails on this thread, or until the thread ends; calls that succeed leave it alone.
#[unsafe(no_mangle)]
pub extern "C" fn bkpack_last_error() -> *const c_char {
    last_error()
}

/// Opens a packed file, or a sharded model by its index, and maps it into memory. Headers are read and checked, weights
/// are not: bkpack_verify() does that. On failure *model becomes NULL.
///
/// The file may be deleted or replaced by renaming while it is open, but must not be written to or cut short.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_open(file: *const c_char, model: *mut *mut Model) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a pointer.
        let place = || unsafe { Out::new("model", model) };
        place()?.put(ptr::null_mut());
        // SAFETY: the caller's promise: NULL or a string.
        let file = unsafe { path("file", file) }?;
        let opened = Box::new(Model::open(&file)?);
        place()?.put(Box::into_raw(opened));
        Ok(())
    })
}

/// Closes a model and unmaps it. Nothing it handed out may be used any more, and no other call with it may be running.
/// NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_close(model: Option<Box<Model>>) -> Status {
    call(|| {
        drop(model);
        Ok(())
    })
}

/// Reads every byte and checks it against the hashes in the file, on all processors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_verify(model: Option<&Model>) -> Status {
    call(|| Ok(given(model)?.packed.check_contents(&Silent)?))
}

/// The model's config.json, as JSON on one line. BKPACK_STATUS_NOT_FOUND if it carries none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_config(model: Option<&Model>, json: *mut *const c_char) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a pointer.
        let place = unsafe { Out::new("json", json) }?;
        place.put(given(model)?.config()?.as_ptr());
        Ok(())
    })
}

/// What the file says of itself, as JSON on one line: version, producer, source, policy, config, activations. Tensors and
/// files, which the manifest names too, are told by the calls below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_manifest(model: Option<&Model>, json: *mut *const c_char) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a pointer.
        let place = unsafe { Out::new("json", json) }?;
        place.put(given(model)?.manifest().as_ptr());
        Ok(())
    })
}

/// The number of files that travel in the model, such as tokenizer.json.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_file_count(model: Option<&Model>, count: *mut usize) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a number.
        let place = unsafe { Out::new("count", count) }?;
        place.put(given(model)?.files.len());
        Ok(())
    })
}

/// The index of the travelling file of this name. BKPACK_STATUS_NOT_FOUND if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_file_find(model: Option<&Model>, name: *const c_char, index: *mut usize) -> Status {
    call(|| {
        let model = given(model)?;
        // SAFETY: the caller's promise: NULL or a string, NULL or a place for a number.
        let (name, place) = unsafe { (text("name", name)?, Out::new("index", index)?) };
        let found = model.files.iter().position(|file| file.as_bytes() == name.as_bytes());
        let missing = || Failure::NoSuchFile { path: model.packed.path().to_owned(), name: name.to_owned() };
        place.put(found.ok_or_else(missing)?);
        Ok(())
    })
}

/// A travelling file: its name and its bytes in the memory map. The bytes do not end in NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_file(
    model: Option<&Model>,
    index: usize,
    name: *mut *const c_char,
    data: *mut *const c_void,
    length: *mut usize,
) -> Status {
    call(|| {
        let (file, bytes) = given(model)?.file(index)?;
        // SAFETY: the caller's promise: each NULL or a place for a pointer or a number.
        let (name, data, length) =
            unsafe { (Out::new("name", name)?, Out::new("data", data)?, Out::new("length", length)?) };
        name.put(file.as_ptr());
        data.put(bytes.as_ptr().cast());
        length.put(bytes.len());
        Ok(())
    })
}

/// The number of tensors. A complex tensor X counts as two, X.real and X.imag.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_count(model: Option<&Model>, count: *mut usize) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a number.
        let place = unsafe { Out::new("count", count) }?;
        place.put(given(model)?.tensors.len());
        Ok(())
    })
}

/// The index of the tensor of this name. BKPACK_STATUS_NOT_FOUND if there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_find(model: Option<&Model>, name: *const c_char, tensor: *mut usize) -> Status {
    call(|| {
        let model = given(model)?;
        // SAFETY: the caller's promise: NULL or a string, NULL or a place for a number.
        let (name, place) = unsafe { (text("name", name)?, Out::new("tensor", tensor)?) };
        place.put(model.find(name)?);
        Ok(())
    })
}

/// The name of a tensor. Tensors are counted from 0, in the order of their names, numbers in them by value.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_name(model: Option<&Model>, tensor: usize, name: *mut *const c_char) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a pointer.
        let place = unsafe { Out::new("name", name) }?;
        place.put(given(model)?.names(tensor)?.name.as_ptr());
        Ok(())
    })
}

/// The dimensions of a tensor, outermost first: dims[0] to dims[count - 1]. A scalar has none, and dims is NULL then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_shape(
    model: Option<&Model>,
    tensor: usize,
    dims: *mut *const usize,
    count: *mut usize,
) -> Status {
    call(|| {
        let shape = &given(model)?.entry(tensor)?.shape;
        // SAFETY: the caller's promise: each NULL or a place for a pointer or a number.
        let (dims, count) = unsafe { (Out::new("dims", dims)?, Out::new("count", count)?) };
        dims.put(if shape.is_empty() { ptr::null() } else { shape.as_ptr() });
        count.put(shape.len());
        Ok(())
    })
}

/// A tensor's shape as a matrix, which is how its rows are counted: the last dimension is the columns, all others
/// together are the rows. A vector is one row.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_matrix(
    model: Option<&Model>,
    tensor: usize,
    rows: *mut usize,
    columns: *mut usize,
) -> Status {
    call(|| {
        let shape = matrix_shape(&given(model)?.entry(tensor)?.shape);
        // SAFETY: the caller's promise: each NULL or a place for a number.
        let (rows, columns) = unsafe { (Out::new("rows", rows)?, Out::new("columns", columns)?) };
        rows.put(shape.0);
        columns.put(shape.1);
        Ok(())
    })
}

/// How a tensor is encoded. size is sizeof(*encoding).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_encoding(
    model: Option<&Model>,
    tensor: usize,
    encoding: *mut Encoding,
    size: usize,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place of this size.
        let place = unsafe { OutStruct::new("encoding", encoding, size) }?;
        place.put(given(model)?.entry(tensor)?.encoding.into());
        Ok(())
    })
}

/// How a tensor is encoded, for people: "INT4 g128", "INT3 asym g64", "ternary g128", "BF16".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_encoding_text(
    model: Option<&Model>,
    tensor: usize,
    encoding: *mut *const c_char,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a pointer.
        let place = unsafe { Out::new("encoding", encoding) }?;
        place.put(given(model)?.names(tensor)?.encoding.as_ptr());
        Ok(())
    })
}

/// The number of stored parts of a tensor: 1 where it holds plain values, else 2, or 3 with zero points.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_part_count(model: Option<&Model>, tensor: usize, count: *mut usize) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place for a number.
        let place = unsafe { Out::new("count", count) }?;
        place.put(given(model)?.entry(tensor)?.parts.len());
        Ok(())
    })
}

/// One stored part of a tensor, in the file's memory map: nothing is copied. size is sizeof(*part).
///
/// A part other than plain values is a matrix with the tensor's rows; what its words hold is in spec/bkpack-v1.md.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_tensor_part(
    model: Option<&Model>,
    tensor: usize,
    index: usize,
    part: *mut Part,
    size: usize,
) -> Status {
    call(|| {
        // SAFETY: the caller's promise: NULL or a place of this size.
        let place = unsafe { OutStruct::new("part", part, size) }?;
        place.put(given(model)?.part(tensor, index)?);
        Ok(())
    })
}

/// Dequantizes some rows of a tensor (see bkpack_tensor_matrix()), on the calling thread, bit for bit as the format
/// defines the values: values[i * columns + j] becomes element j of row first_row + i.
///
/// length is the number of floats that values has room for, at least rows * columns. Other threads may dequantize other
/// rows at the same time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_dequantize(
    model: Option<&Model>,
    tensor: usize,
    first_row: usize,
    rows: usize,
    values: *mut f32,
    length: usize,
) -> Status {
    call(|| {
        let model = given(model)?;
        let weight = model.tensor(tensor)?;
        let matrix = weight.matrix();
        if first_row.checked_add(rows).is_none_or(|end| end > matrix.rows()) {
            return Err(Failure::Rows { first: first_row, rows, of: matrix.rows() });
        }
        // Rows and columns of an open tensor multiply without overflow.
        // SAFETY: the caller's promise: NULL or room for `length` floats that nothing else uses meanwhile.
        let values = unsafe { output("values", values, length, rows * matrix.cols()) }?;
        for (row, values) in values.chunks_exact_mut(matrix.cols()).enumerate() {
            model.cpu.dequantize_row(&matrix, first_row + row, values);
        }
        Ok(())
    })
}

/// Multiplies a tensor as a matrix W (see bkpack_tensor_matrix()) with a vector: y = W x, in f32, x taken as it is. The
/// result has the same bits for any number of threads and on every instruction set.
///
/// x_length must be the number of columns, and y has room for y_length floats, at least the number of rows; x and y must
/// not overlap. threads is 1 to compute on the calling thread alone, so that several threads that multiply at once are not
/// in one another's way; 0 for as many threads as there are processors; otherwise their number, up to 1024. Calls with the
/// same number share their threads, which are started on first use and kept.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bkpack_matvec(
    model: Option<&Model>,
    tensor: usize,
    x: *const f32,
    x_length: usize,
    y: *mut f32,
    y_length: usize,
    threads: usize,
) -> Status {
    call(|| {
        let model = given(model)?;
        let weight = model.tensor(tensor)?;
        let matrix = weight.matrix();
        let (rows, columns) = (matrix.rows(), matrix.cols());
        if x_length > columns {
            return Err(Failure::Length { argument: "x", unit: "values", needed: columns, found: x_length });
        }
        check_apart(("x", x, columns), ("y", y, rows))?;
        let pool = threads::pool(threads)?;
        // SAFETY: the caller's promise: NULL or `x_length` floats that stay the same meanwhile.
        let x = unsafe { input("x", x, x_length, columns) }?;
        // SAFETY: the caller's promise: NULL or room for `y_length` floats that nothing else uses meanwhile; those that are
        // borrowed do not overlap `x`, as was just checked.
        let y = unsafe { output("y", y, y_length, rows) }?;
        match pool {
            None => model.cpu.matvec(x, &matrix, y),
            Some(pool) => pool.install(|| model.cpu.matmul(x, &matrix, y)),
        }
        Ok(())
    })
}

fn given(model: Option<&Model>) -> Result<&Model, Failure> {
    model.ok_or(Failure::Null("model"))
}
