//! One file of NumPy arrays: codes and scales, or dequantized weights. `numpy.load` reads it without pickle.

use std::{
    collections::HashSet,
    io::{Seek, Write},
    path::Path,
};

use bkpack_kernels::{Cpu, Data, FloatType, Grid, bits};
use rayon::prelude::*;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{
    ExportedTensor, Fidelity, Options, Plan, Refusal, Target,
    folder::exported_tensors,
    modules::is_activation_scale,
    plain::{plain_bytes, plain_fidelity},
};
use crate::{
    encoding::Encoding,
    error::{Error, Result, short},
    format::{PackedFile, PackedTensor, persist, temporary_beside},
    progress::{Observer, Unit},
    tensor::{ComplexPart, TensorSource, matrix_shape},
};

/// What a zip archive takes for a name, with room for `.npy`.
const MAX_NAME: usize = 60_000;

/// From here on an archive's sizes and places take 64 bits.
const ZIP64: u64 = u32::MAX as u64;

/// What NumPy takes for a shape.
const MAX_DIMENSIONS: usize = 64;

/// An array of the file: its name, NumPy's name of its type, and its shape.
#[derive(Clone, Debug)]
struct Array {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

impl Array {
    fn new(tensor: &str, suffix: &str, dtype: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: format!("{tensor}{suffix}"), dtype: dtype.into(), shape: shape.to_vec() }
    }

    /// The file up to its values, by NumPy's rules: version 1.0, a dictionary, spaces up to a multiple of 64 bytes.
    fn header(&self) -> Vec<u8> {
        let sizes: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let shape = match sizes.as_slice() {
            [one] => format!("({one},)"),
            _ => format!("({})", sizes.join(", ")),
        };
        let fields = format!("{{'descr': '{}', 'fortran_order': False, 'shape': {shape}, }}", self.dtype);
        let length = (10 + fields.len() + 1).next_multiple_of(64) - 10;
        let mut header = b"\x93NUMPY\x01\x00".to_vec();
        // NumPy's dimensions are few enough to stay far below 64 KiB.
        header.extend((length as u16).to_le_bytes());
        header.extend(fields.as_bytes());
        header.resize(10 + length - 1, b' ');
        header.push(b'\n');
        header
    }

    fn data_bytes(&self) -> u64 {
        let digits = self.dtype.trim_start_matches(|c: char| !c.is_ascii_digit());
        let size: u64 = digits.parse().expect("a type ends in its size");
        // A character of NumPy's strings takes four bytes.
        let size = if self.dtype.starts_with("<U") { 4 * size } else { size };
        self.shape.iter().product::<usize>() as u64 * size
    }

    fn bytes(&self) -> u64 {
        self.header().len() as u64 + self.data_bytes()
    }
}

/// NumPy's name of a float type, which has to be one that it has.
fn float_dtype(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::F16 => "<f2",
        FloatType::F32 | FloatType::BF16 => "<f4",
    }
}

/// How a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Plain(FloatType),
    /// Both halves of a complex tensor.
    Complex,
    Codes,
}

/// A file that is planned to the byte.
pub(super) struct NpzExport<'a> {
    pub plan: Plan,
    packed: &'a PackedFile,
    jobs: Vec<(&'a PackedTensor, Form)>,
}

impl<'a> NpzExport<'a> {
    /// Plans the file.
    pub fn new(packed: &'a PackedFile, options: &Options, observer: &dyn Observer) -> Result<Self> {
        if options.dtype == Some(FloatType::BF16) {
            return Err(Error::Option { option: "--dtype", why: "NumPy has no BF16; fp16 or fp32".into() });
        }
        let jobs = jobs(packed, options);
        let cpu = Cpu::detect();
        let mut refusals = Vec::new();
        let roundings: Vec<Result<Result<Fidelity, String>>> = jobs
            .par_iter()
            .map(|(tensor, form)| observer.check().and_then(|()| fidelity(cpu, packed, tensor, *form)))
            .collect();
        let mut refuse = |why: String| refusals.push(Refusal { runtime: Target::Npz.name().into(), why });
        let (mut tensors, mut names) = (Vec::with_capacity(jobs.len()), HashSet::new());
        for ((tensor, form), fidelity) in jobs.iter().zip(roundings) {
            let arrays = arrays(tensor, *form);
            for array in &arrays {
                if !names.insert(array.name.clone()) {
                    refuse(format!("two arrays would be named {}; rename a tensor", array.name));
                }
                if array.name.starts_with(['/', '\\']) || array.name.split(['/', '\\']).any(|part| part == "..") {
                    refuse(format!("the name {} leads out of an archive; rename the tensor", short(&array.name)));
                }
                if array.name.len() > MAX_NAME {
                    refuse(format!(
                        "the name {} has more than {MAX_NAME} bytes; rename the tensor",
                        short(&array.name)
                    ));
                }
            }
            if tensor.shape.len() > MAX_DIMENSIONS {
                let (name, count) = (&tensor.name, tensor.shape.len());
                refuse(format!("tensor {name} has {count} dimensions, and NumPy's arrays at most {MAX_DIMENSIONS}"));
            }
            let fidelity = fidelity?.unwrap_or_else(|why| {
                let why = format!("tensor {} {why}", tensor.name);
                refuse(why.clone());
                Fidelity::Rounded { why }
            });
            tensors.push(ExportedTensor {
                name: tensor.name.clone(),
                names: arrays.iter().map(|array| array.name.clone()).collect(),
                shape: tensor.shape.clone(),
                encoding: tensor.encoding,
                target: match form {
                    Form::Codes => format!("codes {}", arrays[0].dtype),
                    _ => arrays[0].dtype.clone(),
                },
                bytes: arrays.iter().map(Array::data_bytes).sum(),
                fidelity,
            });
        }
        let mut notices = Vec::new();
        if packed.config().is_some() {
            notices.push("config.json and the tokenizer are not in the file, which holds arrays alone".into());
        }
        if !packed.activations().is_empty() {
            notices.push("scales of quantized activations are left out: only bkpack runs them".into());
        }
        let planned: Vec<Array> = jobs.iter().flat_map(|(tensor, form)| arrays(tensor, *form)).collect();
        let file_bytes = if refusals.is_empty() { planned_bytes(planned.iter()) } else { 0 };
        let plan = Plan { tensors, file_bytes, refusals, warnings: Vec::new(), notices };
        Ok(Self { plan, packed, jobs })
    }

    /// Writes it; it appears as a whole, or not at all.
    pub fn write(&self, output: &Path, force: bool, observer: &dyn Observer) -> Result<()> {
        let cpu = Cpu::detect();
        let mut temporary = temporary_beside(output)?;
        let failed = |error: zip::result::ZipError| Error::io(output)(error.into());
        let mut zip = ZipWriter::new(temporary.as_file_mut());
        observer.begin("Writing", self.plan.file_bytes, Unit::Bytes);
        for (tensor, form) in &self.jobs {
            observer.check()?;
            for (array, data) in arrays(tensor, *form).iter().zip(contents(cpu, self.packed, tensor, *form)?) {
                start(&mut zip, array).map_err(failed)?;
                zip.write_all(&array.header()).and_then(|()| zip.write_all(&data)).map_err(Error::io(output))?;
                observer.advance(array.bytes());
            }
        }
        zip.finish().map_err(failed)?;
        observer.end();
        temporary.as_file().sync_data().map_err(Error::io(output))?;
        persist(temporary, output, force)
    }
}

fn jobs<'a>(packed: &'a PackedFile, options: &Options) -> Vec<(&'a PackedTensor, Form)> {
    if options.dequantize {
        let dtype = options.dtype.unwrap_or(FloatType::F32);
        let form = |tensor: &PackedTensor| if tensor.complex.is_some() { Form::Complex } else { Form::Plain(dtype) };
        return exported_tensors(packed).map(|tensor| (tensor, form(tensor))).collect();
    }
    let form = |tensor: &PackedTensor| match tensor.encoding {
        Encoding::Float { dtype } => Form::Plain(options.dtype.unwrap_or(match dtype.into() {
            FloatType::F16 => FloatType::F16,
            _ => FloatType::F32,
        })),
        _ => Form::Codes,
    };
    let tensors = packed.tensors().iter().filter(|tensor| !is_activation_scale(packed, &tensor.name));
    tensors.map(|tensor| (tensor, form(tensor))).collect()
}

/// The arrays of a tensor.
fn arrays(tensor: &PackedTensor, form: Form) -> Vec<Array> {
    let PackedTensor { name, shape, encoding, .. } = tensor;
    match (form, encoding.layout()) {
        (Form::Complex, _) => {
            let name = name.strip_suffix(ComplexPart::Real.suffix()).unwrap_or(name);
            vec![Array::new(name, "", "<c8", shape)]
        }
        (Form::Plain(dtype), _) => vec![Array::new(name, "", float_dtype(dtype), shape)],
        (Form::Codes, Some((layout, scale))) => {
            let (rows, cols) = matrix_shape(shape);
            let groups = [rows, layout.groups(cols)];
            let codes = if layout.grid.has_zero_points() { "|u1" } else { "|i1" };
            let mut arrays = vec![
                Array::new(name, ".codes", codes, shape),
                Array::new(name, ".scales", float_dtype(scale), &groups),
                Array::new(name, ".group_size", "<i8", &[]),
                Array::new(name, ".shape", "<i8", &[shape.len()]),
                Array::new(name, ".encoding", format!("<U{}", encoding.to_string().len()), &[]),
            ];
            if layout.grid.has_zero_points() {
                arrays.push(Array::new(name, ".zero_points", "|u1", &groups));
            }
            arrays
        }
        (Form::Codes, None) => unreachable!("plain values have no codes"),
    }
}

/// The values of [`arrays`].
fn contents(cpu: Cpu, packed: &PackedFile, tensor: &PackedTensor, form: Form) -> Result<Vec<Vec<u8>>> {
    if form == Form::Complex {
        let name = tensor.name.strip_suffix(ComplexPart::Real.suffix()).unwrap_or(&tensor.name);
        let values = packed.complex_values(cpu, name)?;
        return Ok(vec![values.iter().flatten().flat_map(|value| value.to_le_bytes()).collect()]);
    }
    let stored = packed.tensor(&tensor.name)?;
    let matrix = stored.matrix();
    if let Form::Plain(dtype) = form {
        return Ok(vec![plain_bytes(cpu, &matrix, dtype).into_owned()]);
    }
    let Data::Quantized { layout, codes, scales, zeros, .. } = matrix.data() else {
        unreachable!("plain values have no codes")
    };
    let cols = matrix.cols();
    let mut levels = vec![0; matrix.rows() * cols];
    levels.par_chunks_mut(cols).zip(codes.par_chunks(layout.code_bytes(cols))).for_each(|(row, codes)| {
        bits::unpack_row(layout.grid, codes, row);
        for code in row {
            // What is below zero wraps to the byte that stands for it in int8.
            *code = match layout.grid {
                Grid::Int { symmetric: false, .. } => *code,
                Grid::Int { bits, .. } => code.wrapping_sub(1 << (bits - 1)),
                Grid::Ternary => code.wrapping_sub(1),
                Grid::Binary => code.wrapping_mul(2).wrapping_sub(1),
            };
        }
    });
    let group = i64::try_from(layout.group).unwrap_or(i64::MAX);
    let text = tensor.encoding.to_string();
    let mut contents = vec![
        levels,
        scales.to_vec(),
        group.to_le_bytes().to_vec(),
        tensor.shape.iter().flat_map(|&size| (size as i64).to_le_bytes()).collect(),
        text.chars().flat_map(|c| (c as u32).to_le_bytes()).collect(),
    ];
    if layout.grid.has_zero_points() {
        let mut points = Vec::new();
        let mut row = vec![0; layout.groups(cols)];
        for stream in zeros.chunks(layout.zero_bytes(cols)) {
            bits::unpack_row(layout.grid, stream, &mut row);
            points.extend_from_slice(&row);
        }
        contents.push(points);
    }
    Ok(contents)
}

fn fidelity(cpu: Cpu, packed: &PackedFile, tensor: &PackedTensor, form: Form) -> Result<Result<Fidelity, String>> {
    let Form::Plain(dtype) = form else { return Ok(Ok(Fidelity::Lossless)) };
    let stored = packed.tensor(&tensor.name)?;
    Ok(plain_fidelity(cpu, tensor, &stored.matrix(), dtype))
}

/// Begins an array; the times in the archive are those of no clock, so that the same input gives the same bytes.
fn start<W: Write + Seek>(zip: &mut ZipWriter<W>, array: &Array) -> zip::result::ZipResult<()> {
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default())
        .large_file(array.bytes() >= ZIP64);
    zip.start_file(format!("{}.npy", array.name), options)
}

/// Bytes of the archive, by the rules of zip: a header before each entry and one in the directory, which ends the file;
/// fields of 32 bits move into an extra one of 64 where they overflow.
fn planned_bytes<'a>(arrays: impl Iterator<Item = &'a Array>) -> u64 {
    let (mut entries, mut position, mut directory) = (0, 0, 0);
    for array in arrays {
        let (bytes, name) = (array.bytes(), (array.name.len() + ".npy".len()) as u64);
        let sizes = if bytes >= ZIP64 { 16 } else { 0 };
        let start = if position >= ZIP64 { 8 } else { 0 };
        let extra = |fields: u64| if fields > 0 { 4 + fields } else { 0 };
        directory += 46 + name + extra(sizes + start);
        position += 30 + name + extra(sizes) + bytes;
        entries += 1;
    }
    let wide = entries > u64::from(u16::MAX) || directory.max(position) > ZIP64;
    position + directory + if wide { 56 + 20 } else { 0 } + 22
}

#[cfg(test)]
mod tests {
    use std::io::SeekFrom;

    use super::*;

    #[test]
    fn archives_are_planned_to_the_byte_beyond_four_gigabytes() {
        let array = |name: &str, bytes: usize| Array::new(name, "", "|u1", &[bytes]);
        let small = [array("a", 0), array("\u{e4}.codes", 1000)];
        let many: Vec<Array> = (0..70_000).map(|index| array(&index.to_string(), 1)).collect();
        let far = [array("a", 3 << 30), array("b", 2 << 30), array("c", 1)];
        let large = [array("a", 5 << 30), array("b", 7)];
        for arrays in [&small[..], &many, &far, &large] {
            assert_eq!(planned_bytes(arrays.iter()), written_bytes(arrays));
        }
    }

    /// Bytes of the archive as the library writes it, with zeros for values.
    fn written_bytes(arrays: &[Array]) -> u64 {
        let zeros = vec![0; 1 << 20];
        let mut zip = ZipWriter::new(Nowhere::default());
        for array in arrays {
            start(&mut zip, array).unwrap();
            let mut left = array.bytes();
            while left > 0 {
                let step = left.min(zeros.len() as u64);
                zip.write_all(&zeros[..step as usize]).unwrap();
                left -= step;
            }
        }
        zip.finish().unwrap().end
    }

    /// Counts bytes.
    #[derive(Debug, Default)]
    struct Nowhere {
        position: u64,
        end: u64,
    }

    impl Write for Nowhere {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.position += bytes.len() as u64;
            self.end = self.end.max(self.position);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Nowhere {
        fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
            let place = match to {
                SeekFrom::Start(place) => Some(place),
                SeekFrom::End(by) => self.end.checked_add_signed(by),
                SeekFrom::Current(by) => self.position.checked_add_signed(by),
            };
            self.position = place.ok_or(std::io::ErrorKind::InvalidInput)?;
            Ok(self.position)
        }
    }
}
