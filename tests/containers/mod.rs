//! Writers of NPZ and PyTorch files, so that tests can make any, broken ones included.

#![allow(dead_code)] // each test uses some of them

use std::io::{Cursor, Write};

use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// A .npy file.
pub fn npy(descr: &str, fortran: bool, shape: &[usize], values: &[u8]) -> Vec<u8> {
    let shape: String = shape.iter().map(|size| format!("{size},")).collect();
    let order = if fortran { "True" } else { "False" };
    npy_with_header(&format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': ({shape}), }}"), values)
}

/// A .npy file of version 1 with any text as its header.
pub fn npy_with_header(header: &str, values: &[u8]) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(values);
    file
}

/// A zip archive of these members in this order.
pub fn zip(members: &[(String, Vec<u8>)], deflate: bool) -> Vec<u8> {
    let method = if deflate { CompressionMethod::Deflated } else { CompressionMethod::Stored };
    let options = SimpleFileOptions::default().compression_method(method);
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer.start_file(name.as_str(), options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A tensor as a pickle describes it, in elements.
#[derive(Clone)]
pub struct View {
    pub name: String,
    pub class: &'static str,
    pub key: String,
    /// Values of the storage.
    pub values: usize,
    pub offset: i64,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
}

impl View {
    /// The whole of a storage in row-major order.
    pub fn whole(name: &str, class: &'static str, key: &str, shape: &[usize]) -> Self {
        let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect();
        let values = shape.iter().product::<i64>() as usize;
        Self { name: name.into(), class, key: key.into(), values, offset: 0, shape, strides }
    }
}

pub fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// A LONG1 of eight bytes.
pub fn integer(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

fn tuple(values: &[i64]) -> Vec<u8> {
    [&b"("[..], &values.iter().flat_map(|&value| integer(value)).collect::<Vec<_>>(), b"t"].concat()
}

/// The opcodes that rebuild a tensor.
pub fn tensor(view: &View) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage")[..],
        format!("ctorch\n{}\n", view.class).as_bytes(),
        &text(&view.key),
        &text("cpu"),
        &integer(view.values as i64),
        b"tQ",
        &integer(view.offset),
        &tuple(&view.shape),
        &tuple(&view.strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

/// The pickle of a dict of tensors.
pub fn state_dict(views: &[View]) -> Vec<u8> {
    let entries: Vec<u8> = views.iter().flat_map(|view| [text(&view.name), tensor(view)].concat()).collect();
    pickle(&[&b"}("[..], &entries, b"u"].concat())
}

/// A pickle of protocol 2 with these opcodes.
pub fn pickle(opcodes: &[u8]) -> Vec<u8> {
    [b"\x80\x02", opcodes, b"."].concat()
}

/// A PyTorch zip file.
pub fn torch_zip(pickle: Vec<u8>, storages: &[(String, Vec<u8>)], byteorder: &str, deflate: bool) -> Vec<u8> {
    let mut members = vec![("archive/data.pkl".to_owned(), pickle), ("archive/byteorder".into(), byteorder.into())];
    members.extend(storages.iter().map(|(key, bytes)| (format!("archive/data/{key}"), bytes.clone())));
    members.push(("archive/version".into(), b"3\n".to_vec()));
    zip(&members, deflate)
}

/// A PyTorch file from before the zip format; each storage with the bytes of its values.
pub fn torch_legacy(object: Vec<u8>, storages: &[(String, usize, Vec<u8>)]) -> Vec<u8> {
    let keys: Vec<u8> = storages.iter().flat_map(|(key, ..)| text(key)).collect();
    let mut file = [
        pickle(b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"),
        pickle(b"M\xe9\x03"),
        pickle(&[b"}".to_vec(), text("little_endian"), b"\x88s".to_vec()].concat()),
        object,
        pickle(&[&b"]("[..], &keys, b"e"].concat()),
    ]
    .concat();
    for (_, value_bytes, bytes) in storages {
        file.extend((bytes.len() as u64 / *value_bytes as u64).to_le_bytes());
        file.extend(bytes);
    }
    file
}
