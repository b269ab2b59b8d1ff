//! The calls against the library that they stand for, and what C cannot provoke.

use std::{
    ffi::{CStr, CString},
    fs,
    path::{Path, PathBuf},
    ptr,
};

use bkpack::{
    checkpoint,
    format::PackedFile,
    pack::{PackOptions, Packing},
    policy::Policy,
};
use bkpack_kernels::Cpu;

use super::{boundary::Growing, types::Dtype, *};

fn last() -> String {
    // SAFETY: the pointer is to a string of this thread, which makes no other call meanwhile.
    unsafe { CStr::from_ptr(bkpack_last_error()) }.to_str().unwrap().to_owned()
}

/// A model that is closed at the end.
struct Open(*mut Model);

impl Open {
    fn new(path: &Path) -> Self {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        let mut model = ptr::null_mut();
        // SAFETY: a string and a place for a pointer.
        let status = unsafe { bkpack_open(path.as_ptr(), &mut model) };
        assert_eq!(status, Status::Ok, "{}", last());
        Self(model)
    }

    fn get(&self) -> Option<&Model> {
        // SAFETY: it is open until it is dropped.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // SAFETY: the pointer came from such a box, and is not used again.
        let model = unsafe { Box::from_raw(self.0) };
        // SAFETY: nothing that it handed out is in use.
        assert_eq!(unsafe { bkpack_close(Some(model)) }, Status::Ok);
    }
}

fn vectors() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spec/vectors/valid");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> =
        paths.filter(|path| path.is_file() && path.extension() == Some("bkpack".as_ref())).collect();
    paths.sort();
    paths
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Every tensor of every vector, through C and through the library.
#[test]
fn calls_give_what_the_library_gives() {
    let (cpu, mut tensors, mut quantized) = (Cpu::detect(), 0, 0);
    for path in vectors() {
        let (packed, open) = (PackedFile::open(&path).unwrap(), Open::new(&path));
        for (index, name) in packed.names().iter().enumerate() {
            let context = format!("{} {name:?}", path.display());
            let (entry, tensor) = (packed.entry(name).unwrap(), packed.tensor(name).unwrap());
            let matrix = tensor.matrix();
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let weights = entry.elements();
            let mut found = (usize::MAX, Vec::new(), Vec::new(), vec![f32::NAN; weights], vec![f32::NAN; rows]);
            let x: Vec<f32> = (0..cols).map(|i| (i as f32).cos()).collect();
            let text = CString::new(name.as_str()).unwrap();
            // SAFETY: a model that is open, and places for everything that is asked for.
            unsafe {
                assert_eq!(bkpack_tensor_find(open.get(), text.as_ptr(), &mut found.0), Status::Ok, "{context}");
                let mut encoding = ptr::null();
                assert_eq!(bkpack_tensor_encoding_text(open.get(), index, &mut encoding), Status::Ok, "{context}");
                assert_eq!(CStr::from_ptr(encoding).to_str(), Ok(entry.encoding.to_string().as_str()), "{context}");
                let (mut dims, mut count) = (ptr::null(), 0);
                assert_eq!(bkpack_tensor_shape(open.get(), index, &mut dims, &mut count), Status::Ok, "{context}");
                found.1 = (0..count).map(|i| *dims.add(i)).collect();
                assert_eq!(bkpack_tensor_part_count(open.get(), index, &mut count), Status::Ok, "{context}");
                for part in 0..count {
                    let mut place = std::mem::MaybeUninit::<Part>::uninit();
                    let status = bkpack_tensor_part(open.get(), index, part, place.as_mut_ptr(), size_of::<Part>());
                    assert_eq!(status, Status::Ok, "{context}");
                    let part = place.assume_init();
                    let width = match part.dtype {
                        Dtype::U8 => 1,
                        Dtype::F16 | Dtype::BF16 => 2,
                        Dtype::F32 | Dtype::U32 => 4,
                    };
                    assert!(part.data.addr().is_multiple_of(width), "{context}");
                    let bytes = std::slice::from_raw_parts(part.data.cast::<u8>(), part.length);
                    found.2.push((CStr::from_ptr(part.name).to_str().unwrap().to_owned(), bytes.to_vec()));
                }
                let values = found.3.as_mut_ptr();
                assert_eq!(bkpack_dequantize(open.get(), index, 0, rows, values, weights), Status::Ok, "{context}");
                let y = found.4.as_mut_ptr();
                let status = bkpack_matvec(open.get(), index, x.as_ptr(), cols, y, rows, index % 3);
                assert_eq!(status, Status::Ok, "{context}");
            }
            let parts = entry.parts.iter().map(|part| (part.name.clone(), packed.part_bytes(part).to_vec()));
            let (mut values, mut y) = (vec![0.0; weights], vec![0.0; rows]);
            cpu.dequantize(&matrix, 0, &mut values);
            cpu.matmul(&x, &matrix, &mut y);
            assert_eq!((found.0, found.1, found.2), (index, entry.shape.clone(), parts.collect()), "{context}");
            assert_eq!((bits(&found.3), bits(&found.4)), (bits(&values), bits(&y)), "{context}");
            tensors += 1;
            quantized += usize::from(entry.encoding.layout().is_some());
        }
    }
    assert!(tensors > 100 && quantized > 80, "{tensors} tensors, {quantized} of them quantized");
}

#[test]
fn a_panic_becomes_a_status() {
    assert_eq!(failure::call(|| panic!("a \0 and {}", 7)), Status::Internal);
    assert_eq!(last(), "a mistake in bkpack: a \\0 and 7");
    assert_eq!(failure::call(|| std::panic::panic_any(7)), Status::Internal);
    assert_eq!(failure::call(|| Ok(())), Status::Ok);
    assert_eq!(last(), "a mistake in bkpack: a panic without a message");
}

#[test]
fn a_name_that_c_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("w.safetensors"), folder.path().join("w.bkpack"));
    let header = r#"{"a\u0000b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes().chain(1f32.to_le_bytes()));
    fs::write(&source, bytes).unwrap();
    let checkpoint = checkpoint::open(&source).unwrap();
    let options = PackOptions::new(Policy::uniform("int4".parse().unwrap(), &[], &[]).unwrap());
    let packing = Packing::plan(&checkpoint, &options, &output, Cpu::detect(), &Silent).unwrap();
    packing.write(Cpu::detect(), false, &Silent).unwrap();
    let path = CString::new(output.to_str().unwrap()).unwrap();
    let mut model = ptr::null_mut();
    // SAFETY: a string and a place for a pointer.
    assert_eq!(unsafe { bkpack_open(path.as_ptr(), &mut model) }, Status::Model);
    assert!(
        model.is_null()
            && last().ends_with(r"the name a\u{0}b holds a NUL character, which ends a string in C; rename the tensor")
    );
}

/// A structure of a later library, filled for a program that knows the first two members alone, and for one that knows
/// more than there is.
#[test]
fn structures_are_filled_as_far_as_both_sides_know_them() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Later(u32, u32, u64);
    impl Growing for Later {
        const FIRST_SIZE: usize = 8;
    }
    for (size, expected) in [(8, [1, 2, 9, 9, 9, 9]), (16, [1, 2, 3, 0, 9, 9]), (24, [1, 2, 3, 0, 0, 0])] {
        #[repr(C, align(8))]
        struct Place([u32; 6]);
        let mut place = Place([9; 6]);
        // SAFETY: a place of 24 bytes.
        let out = unsafe { OutStruct::<Later>::new("it", (&raw mut place).cast(), size) };
        let Ok(out) = out else { panic!("{size} bytes are refused") };
        out.put(Later(1, 2, 3));
        assert_eq!(place.0, expected, "{size} bytes");
    }
    let mut place = Later(9, 9, 9);
    // SAFETY: a place of more than 7 bytes.
    assert!(unsafe { OutStruct::new("it", &raw mut place, 7) }.is_err());
}

/// Programs that are built already know these sizes: a structure may only grow at its end.
#[test]
#[cfg(target_pointer_width = "64")]
fn structures_keep_their_layout() {
    use std::mem::offset_of;
    assert_eq!((Encoding::FIRST_SIZE, Part::FIRST_SIZE), (24, 32));
    assert_eq!(size_of::<Encoding>(), 24);
    let encoding = [
        offset_of!(Encoding, kind),
        offset_of!(Encoding, bits),
        offset_of!(Encoding, symmetric),
        offset_of!(Encoding, dtype),
        offset_of!(Encoding, group_size),
    ];
    assert_eq!(encoding, [0, 4, 8, 12, 16]);
    assert_eq!(size_of::<Part>(), 32);
    let part = [
        offset_of!(Part, role),
        offset_of!(Part, dtype),
        offset_of!(Part, name),
        offset_of!(Part, data),
        offset_of!(Part, length),
    ];
    assert_eq!(part, [0, 4, 8, 16, 24]);
}
