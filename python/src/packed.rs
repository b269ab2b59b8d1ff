//! An opened packed file: what lies where, checked, and its weights dequantized.

use std::path::PathBuf;

use bkpack::{
    encoding::Encoding,
    format::{PackedFile, PackedPart},
    tensor::{ComplexPart, TensorSource, matrix_shape},
};
use bkpack_kernels::{Cpu, Matrix};
use pyo3::{
    exceptions::PyIndexError,
    prelude::*,
    types::{PyByteArray, PyBytes},
};
use serde::Serialize;

use crate::{errors::exception, work};

/// A packed model whose headers were checked.
#[pyclass(frozen, module = "bkpack._native")]
pub struct Packed {
    pub file: PackedFile,
    cpu: Cpu,
}

/// One tensor, for `json.loads`.
#[derive(Serialize)]
struct TensorRecord<'a> {
    shape: &'a [usize],
    component: &'a str,
    complex: Option<ComplexPart>,
    encoding: Encoding,
    encoding_text: String,
    parts: Vec<PartRecord<'a>>,
}

/// One stored array.
#[derive(Serialize)]
struct PartRecord<'a> {
    role: &'static str,
    name: &'a str,
    dtype: String,
    shape: &'a [usize],
    shard: usize,
    offset: usize,
}

impl<'a> PartRecord<'a> {
    fn new(part: &'a PackedPart) -> Self {
        let PackedPart { name, role, dtype, shape, shard, range, .. } = part;
        Self { role: role.name(), name, dtype: dtype.to_string(), shape, shard: *shard, offset: range.start }
    }
}

#[pymethods]
impl Packed {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let opened = py.detach(|| Ok((PackedFile::open(&path)?, Cpu::from_environment()?)));
        let (file, cpu) = opened.map_err(|error: bkpack::Error| exception(py, &error))?;
        Ok(Self { file, cpu })
    }

    /// The name of every tensor, in natural order.
    fn names(&self) -> Vec<&str> {
        self.file.names().iter().map(String::as_str).collect()
    }

    /// The name of every complex tensor.
    fn complex_names(&self) -> Vec<&str> {
        self.file.complex_names().collect()
    }

    /// The names of the travelling files.
    fn files(&self) -> Vec<&str> {
        self.file.files().map(|(name, _)| name).collect()
    }

    /// Bytes on disk, everything counted.
    fn file_bytes(&self) -> u64 {
        self.file.file_bytes()
    }

    /// The number of weights.
    fn parameters(&self) -> u64 {
        self.file.parameters()
    }

    /// Path and length of each file, and bytes of its header.
    fn shards(&self) -> Vec<(PathBuf, usize, usize)> {
        self.file.shards().map(|shard| (shard.path.to_owned(), shard.bytes, shard.header.len())).collect()
    }

    /// Whether these bytes are the header of a file as it was when it was opened and checked.
    fn is_header(&self, shard: usize, header: &[u8]) -> bool {
        self.file.shards().nth(shard).is_some_and(|shard| shard.header == header)
    }

    /// What a tensor is and where its parts lie, as JSON; `None` if there is none of this name.
    fn tensor(&self, name: &str) -> Option<String> {
        let tensor = self.file.entry(name)?;
        let record = TensorRecord {
            shape: &tensor.shape,
            component: &tensor.component,
            complex: tensor.complex,
            encoding: tensor.encoding,
            encoding_text: tensor.encoding.to_string(),
            parts: tensor.parts.iter().map(PartRecord::new).collect(),
        };
        Some(serde_json::to_string(&record).expect("plain numbers and strings"))
    }

    /// The bytes of a travelling file; `None` if there is none of this name.
    fn read_file<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let bytes = self.file.file(name).map_err(|error| exception(py, &error))?;
        Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// All weights of a tensor as f32.
    fn dequantize<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyByteArray>> {
        let tensor = self.file.tensor(name).map_err(|error| exception(py, &error))?;
        self.floats(py, tensor.elements(), |cpu, out| cpu.dequantize(&tensor.matrix(), 0, out))
    }

    /// The weights at these indices of the first dimension, of at least two, as f32.
    fn dequantize_rows<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        indices: Vec<u32>,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let tensor = self.file.tensor(name).map_err(|error| exception(py, &error))?;
        let (rows, cols) = matrix_shape(tensor.shape());
        let length = tensor.shape().first().map_or(1, |&length| length);
        let step = rows / length;
        if let Some(index) = indices.iter().find(|&&index| index as usize >= length) {
            return Err(PyIndexError::new_err(format!("index {index} is out of bounds for {length} rows")));
        }
        let gather = |cpu: Cpu, matrix: &Matrix, out: &mut [f32]| match indices.first() {
            Some(&first) if indices.iter().zip(first..).all(|(&index, expected)| index == expected) => {
                cpu.dequantize(matrix, first as usize * step, out);
            }
            _ => {
                for (&index, out) in indices.iter().zip(out.chunks_exact_mut(step * cols)) {
                    cpu.dequantize(matrix, index as usize * step, out);
                }
            }
        };
        self.floats(py, indices.len() * step * cols, |cpu, out| gather(cpu, &tensor.matrix(), out))
    }

    /// Checks every hash and every rule that needs a look at the contents.
    #[pyo3(signature = (progress=None))]
    fn verify(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        work::run(py, progress, None, |observer| self.file.check_contents(observer))
    }
}

impl Packed {
    /// Floats that `fill` computes without the interpreter, as the bytes of an array.
    fn floats<'py>(
        &self,
        py: Python<'py>,
        count: usize,
        fill: impl FnOnce(Cpu, &mut [f32]) + Send,
    ) -> PyResult<Bound<'py, PyByteArray>> {
        let pool = work::pool(None).map_err(|error| exception(py, &error))?;
        PyByteArray::new_with(py, count * size_of::<f32>(), |bytes| {
            let cpu = self.cpu;
            let fill = || match bytemuck::try_cast_slice_mut(bytes) {
                Ok(floats) => fill(cpu, floats),
                // Python promises no alignment, and gives none where there are no bytes.
                Err(_) => {
                    let mut floats = vec![0.0; count];
                    fill(cpu, &mut floats);
                    bytes.copy_from_slice(bytemuck::cast_slice(&floats));
                }
            };
            py.detach(|| pool.install(fill));
            Ok(())
        })
    }
}

/// A model to measure: one that is open, or the path of a packed file or checkpoint.
#[derive(FromPyObject)]
pub enum Model<'py> {
    Open(PyRef<'py, Packed>),
    Path(PathBuf),
}
