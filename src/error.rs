//! The library's one error type: each variant names the rule that was broken.

use std::{
    fmt::{self, Display, Write},
    path::{Path, PathBuf},
};

/// Result of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in one sentence: which file, which tensor, which rule, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// Nothing is overwritten unless asked for.
    #[error("{} exists; pass --force to replace it", path.display())]
    Exists { path: PathBuf },

    /// The output is something that a file must not take the place of.
    #[error("{}: {why}", path.display(), why = long(why))]
    BadOutput { path: PathBuf, why: String },

    /// A path is no checkpoint and no packed file.
    #[error("{}: {why}", path.display(), why = long(why))]
    NotAModel { path: PathBuf, why: String },
    /// The file breaks a rule of the safetensors format.
    #[error("{}: not a valid safetensors file: {why}", path.display(), why = long(why))]
    Safetensors { path: PathBuf, why: String },
    /// A JSON object names a key twice, so readers would disagree about it.
    #[error("{}: the header names {key:?} twice", path.display(), key = short(key))]
    DuplicateKey { path: PathBuf, key: String },
    /// A JSON file does not parse or has the wrong structure.
    #[error("{}: {why}", path.display(), why = long(why))]
    Json { path: PathBuf, why: String },
    /// The index names a shard that is not there.
    #[error("{}: shard {shard} named by the index is missing; fetch it again", path.display(), shard = short(shard))]
    MissingShard { path: PathBuf, shard: String },
    /// The index and the shards disagree about a tensor.
    #[error(
        "{}: the index puts tensor {tensor} into {shard}, which does not hold it",
        path.display(), tensor = short(tensor), shard = short(shard)
    )]
    IndexMismatch { path: PathBuf, tensor: String, shard: String },
    /// Two shards hold the same tensor, or a shard holds one that the index does not name.
    #[error(
        "{}: tensor {tensor} is in {shard}, where the index does not put it",
        path.display(), tensor = short(tensor), shard = short(shard)
    )]
    StrayTensor { path: PathBuf, tensor: String, shard: String },
    /// The file breaks a rule of zip archives.
    #[error("{}: zip archive: {why}", path.display(), why = long(why))]
    Zip { path: PathBuf, why: String },
    /// A member of an NPZ file breaks a rule of NumPy's array format.
    #[error("{}: {member}: {why}", path.display(), member = short(member), why = long(why))]
    Npy { path: PathBuf, member: String, why: String },
    /// A PyTorch file is broken, or holds no state dict.
    #[error("{}: PyTorch file: {why}", path.display(), why = long(why))]
    Torch { path: PathBuf, why: String },
    /// A pickle names a global that no state dict needs.
    #[error(
        "{}: global {global} is not allowed; nothing from a checkpoint is executed; save the state dict alone",
        path.display(),
        global = short(global)
    )]
    Global { path: PathBuf, global: String },
    /// A tensor's values are not within the bytes that are stored for it.
    #[error("{}: tensor {tensor}: {why}", path.display(), tensor = short(tensor), why = long(why))]
    Extent { path: PathBuf, tensor: String, why: String },
    /// The tensors of a file are views of the same bytes over and over.
    #[error(
        "{}: its tensors ask for {viewed} bytes of the {stored} that are stored, more than 16 times as much; save copies \
         of them (tensor.clone())", path.display()
    )]
    Sharing { path: PathBuf, viewed: u64, stored: u64 },
    /// Two tensors have the same name, after renaming or as the part of a complex one.
    #[error("{}: two tensors are named {tensor}; rename one of them", path.display(), tensor = short(tensor))]
    SharedName { path: PathBuf, tensor: String },
    /// An 8-bit tensor whose values are meant to be multiplied by another tensor.
    #[error(
        "{}: tensor {tensor} is an 8-bit float whose true values need {scale}; multiply them and save it as BF16",
        path.display(),
        tensor = short(tensor),
        scale = short(scale)
    )]
    ScaledFloat8 { path: PathBuf, tensor: String, scale: String },
    /// An F64 that is too large for F32.
    #[error(
        "{}: tensor {tensor} holds {value:e}, which F32 cannot hold; F64 is rounded to F32",
        path.display(), tensor = short(tensor)
    )]
    NarrowingRange { path: PathBuf, tensor: String, value: f64 },
    /// A tensor's type is not one that can be packed.
    #[error(
        "{}: tensor {tensor} is {dtype}; only floats of 8 to 64 bits and complex numbers of them can be packed",
        path.display(), tensor = short(tensor), dtype = short(dtype)
    )]
    UnsupportedDtype { path: PathBuf, tensor: String, dtype: String },
    /// A tensor without elements.
    #[error(
        "{}: tensor {tensor} has shape {shape}, which holds no element; remove it from the checkpoint",
        path.display(), tensor = short(tensor), shape = short(&format!("{shape:?}"))
    )]
    EmptyTensor { path: PathBuf, tensor: String, shape: Vec<usize> },
    /// A weight is NaN or infinite.
    #[error(
        "{}: tensor {tensor} holds {count} NaN or infinite values, the first at element {first}; \
         repair the checkpoint, or pass --allow-nonfinite to keep this tensor as FP32", path.display(),
        tensor = short(tensor)
    )]
    NonFinite { path: PathBuf, tensor: String, count: usize, first: usize },
    /// A value does not fit the float type that was asked for.
    #[error(
        "{}: tensor {tensor} holds {value}, which {dtype} cannot hold; keep it, or use BF16 or FP32",
        path.display(), tensor = short(tensor)
    )]
    FloatRange { path: PathBuf, tensor: String, value: f32, dtype: &'static str },
    /// A tensor's shape disagrees with config.json.
    #[error(
        "{}: tensor {tensor} has shape {found} where config.json asks for {expected}",
        path.display(),
        tensor = short(tensor),
        found = short(&format!("{found:?}")),
        expected = short(&format!("{expected:?}"))
    )]
    ShapeMismatch { path: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor that the architecture needs is absent.
    #[error("{}: tensor {tensor} is missing", path.display(), tensor = short(tensor))]
    MissingTensor { path: PathBuf, tensor: String },

    /// The user names a tensor that the file does not hold.
    #[error(
        "{}: no tensor is named {tensor}{}", path.display(), did_you_mean(near), tensor = short(tensor)
    )]
    NoSuchTensor { path: PathBuf, tensor: String, near: Vec<String> },

    /// config.json is absent where a model must be run.
    #[error(
        "{}: no config.json, so it cannot be run; name one with --config FILE (for a packed file: when it is converted)",
        path.display()
    )]
    MissingConfig { path: PathBuf },
    /// A field of config.json is absent, of the wrong type or out of range.
    #[error("{}: config.json: {field}: {why}", path.display(), why = long(why))]
    Config { path: PathBuf, field: &'static str, why: String },
    /// The architecture is not one that this program runs.
    #[error(
        "{}: architecture {architecture} cannot be run (supported: {supported})",
        path.display(), architecture = short(architecture)
    )]
    UnknownArchitecture { path: PathBuf, architecture: String, supported: String },
    /// The model carries no tokenizer, or one that does not load.
    #[error("{}: {why}", path.display(), why = long(why))]
    Tokenizer { path: PathBuf, why: String },

    /// A regular expression does not parse.
    #[error("pattern {pattern:?}: {why}", pattern = short(pattern), why = long(why))]
    Pattern { pattern: String, why: String },
    /// The text of an encoding is not understood.
    #[error(
        "encoding {text:?}: {why} (examples: int4, int4:g64, int3:g128:asym, int8:row, ternary, binary:g64, fp16, bf16, fp32, keep)",
        text = short(text),
        why = long(why)
    )]
    EncodingText { text: String, why: String },
    /// A file that a policy is read from is broken, or does not fit the checkpoint.
    #[error("{}: {}{why}", path.display(), line.map_or(String::new(), |line| format!("line {line}: ")))]
    PolicyFile { path: PathBuf, line: Option<usize>, why: String },
    /// A file of targets is broken, or a result that it names is.
    #[error("{}: {}{why}", path.display(), line.map_or(String::new(), |line| format!("line {line}: ")), why = long(why))]
    Targets { path: PathBuf, line: Option<usize>, why: String },
    /// No choice of encodings makes a file as small as asked for.
    #[error("a file of {asked} bytes is asked for, but the smallest that these encodings allow has {floor} bytes")]
    Budget { asked: u64, floor: u64 },
    /// An option's value is out of range.
    #[error("{option}: {why}", why = long(why))]
    Option { option: &'static str, why: String },

    /// A packed file was written by a newer format version.
    #[error("{}: format version {found} is not supported (this reader knows version 1)", path.display())]
    FormatVersion { path: PathBuf, found: u64 },
    /// The file is valid safetensors, but no packed file.
    #[error("{}: the header's metadata has no {key:?}: not a bkpack file", path.display())]
    MissingMetadata { path: PathBuf, key: &'static str },
    /// The manifest does not have the structure of version 1.
    #[error("{}: manifest: {why}", path.display(), why = long(why))]
    Manifest { path: PathBuf, why: String },
    /// The header's bytes do not match their hash.
    #[error("{}: the header does not match its seal: it was changed after packing", path.display())]
    Seal { path: PathBuf },
    /// The data section does not start on a page.
    #[error("{}: the data starts at byte {start}, which is not a multiple of 4096", path.display())]
    DataStart { path: PathBuf, start: usize },
    /// A part does not start on a multiple of its element size.
    #[error(
        "{}: part {part} starts at byte {offset}, which its type {dtype} does not divide",
        path.display(), part = short(part), dtype = short(dtype)
    )]
    Misaligned { path: PathBuf, part: String, offset: usize, dtype: String },
    /// Two logical tensors share a name.
    #[error("{}: the manifest names {name} twice", path.display(), name = short(name))]
    DuplicateTensor { path: PathBuf, name: String },
    /// The manifest names a part that the file does not hold.
    #[error("{}: tensor {tensor}: part {part} is missing", path.display(), tensor = short(tensor), part = short(part))]
    MissingPart { path: PathBuf, tensor: String, part: String },
    /// A part's name is not the one that its tensor and role give it.
    #[error(
        "{}: {tensor}: a part is named {found:?} where the rule gives {expected:?}",
        path.display(), tensor = short(tensor), found = short(found), expected = short(expected)
    )]
    PartName { path: PathBuf, tensor: String, found: String, expected: String },
    /// A hash is not 64 lowercase hex digits.
    #[error("{}: part {part}: its blake3 is not 64 lowercase hex digits", path.display(), part = short(part))]
    HashText { path: PathBuf, part: String },
    /// A part belongs to two tensors.
    #[error("{}: part {part} is claimed twice", path.display(), part = short(part))]
    SharedPart { path: PathBuf, part: String },
    /// A part belongs to no tensor.
    #[error("{}: part {part} belongs to no tensor of the manifest", path.display(), part = short(part))]
    OrphanPart { path: PathBuf, part: String },
    /// An encoding names a role that its parts lack, or has one too many.
    #[error("{}: tensor {tensor}: {why}", path.display(), tensor = short(tensor), why = long(why))]
    Parts { path: PathBuf, tensor: String, why: String },
    /// A part's type is not the one that the encoding asks for.
    #[error(
        "{}: tensor {tensor}: part {part} is {found} where the encoding asks for {expected}",
        path.display(), tensor = short(tensor), part = short(part), found = short(found)
    )]
    PartDtype { path: PathBuf, tensor: String, part: String, found: String, expected: &'static str },
    /// A part's shape is not the one that the encoding asks for.
    #[error(
        "{}: tensor {tensor}: part {part} has shape {found} where the encoding asks for {expected}",
        path.display(),
        tensor = short(tensor),
        part = short(part),
        found = short(&format!("{found:?}")),
        expected = short(&format!("{expected:?}"))
    )]
    PartShape { path: PathBuf, tensor: String, part: String, found: Vec<usize>, expected: Vec<usize> },
    /// An encoding that this version does not know.
    #[error(
        "{}: tensor {tensor}: encoding {kind:?} is not known to this version",
        path.display(), tensor = short(tensor), kind = short(kind)
    )]
    UnknownEncoding { path: PathBuf, tensor: String, kind: String },
    /// An encoding or a part has a field that this version does not know: it could change the meaning.
    #[error("{}: tensor {tensor}: {why}", path.display(), tensor = short(tensor), why = long(why))]
    UnknownField { path: PathBuf, tensor: String, why: String },
    /// A parameter of an encoding is out of range.
    #[error("{}: tensor {tensor}: encoding: {why}", path.display(), tensor = short(tensor), why = long(why))]
    EncodingRange { path: PathBuf, tensor: String, why: String },
    /// A logical shape is empty or too large.
    #[error(
        "{}: tensor {tensor}: shape {shape}: {why}",
        path.display(), tensor = short(tensor), shape = short(&format!("{shape:?}"))
    )]
    Shape { path: PathBuf, tensor: String, shape: Vec<u64>, why: &'static str },
    /// The manifest's field `complex` names no half of a complex tensor.
    #[error(
        "{}: tensor {tensor}: complex is {found}, where only \"real\" and \"imaginary\" are known",
        path.display(), tensor = short(tensor), found = short(found)
    )]
    ComplexField { path: PathBuf, tensor: String, found: String },
    /// Half of a complex tensor is not named as one.
    #[error(
        "{}: tensor {tensor} is half of a complex tensor, so its name must end in {suffix}",
        path.display(), tensor = short(tensor)
    )]
    ComplexName { path: PathBuf, tensor: String, suffix: &'static str },
    /// Half of a complex tensor has no other half of its shape.
    #[error(
        "{}: tensor {tensor} is half of a complex tensor: {other} {why}",
        path.display(), tensor = short(tensor), other = short(other), why = long(why)
    )]
    ComplexPair { path: PathBuf, tensor: String, other: String, why: String },
    /// A tensor has the name of a complex one that is there in halves.
    #[error(
        "{}: tensor {tensor} is there twice, as it is and as the complex {half} and its other half",
        path.display(), tensor = short(tensor), half = short(half)
    )]
    ComplexClash { path: PathBuf, tensor: String, half: String },
    /// A shard other than the first records how activations are quantized.
    #[error("{}: activations belong into the manifest of the first shard", path.display())]
    ActivationShard { path: PathBuf },
    /// Activations of a component that this version does not know, or of one component twice.
    #[error("{}: activations of {component:?}: {why}", path.display(), component = short(component))]
    ActivationComponent { path: PathBuf, component: String, why: &'static str },
    /// A parameter of quantized activations is out of range.
    #[error(
        "{}: activations of {component}: {field} is {found}, not {expected}",
        path.display(), component = short(component)
    )]
    ActivationRange { path: PathBuf, component: String, field: &'static str, found: u64, expected: &'static str },
    /// A tensor of activation scales is absent, named twice or not what it must be.
    #[error("{}: activation scales {tensor}: {why}", path.display(), tensor = short(tensor), why = long(why))]
    ActivationScale { path: PathBuf, tensor: String, why: String },
    /// An activation scale is negative, NaN or infinite.
    #[error(
        "{}: activation scales {tensor}: element {element} is {found}; a scale is finite and not negative",
        path.display(), tensor = short(tensor)
    )]
    ActivationScaleValue { path: PathBuf, tensor: String, element: usize, found: f32 },
    /// A part's bytes do not match their hash.
    #[error(
        "{}: tensor {tensor}: part {part} does not match its BLAKE3 hash: its bytes were changed",
        path.display(), tensor = short(tensor), part = short(part)
    )]
    PartHash { path: PathBuf, tensor: String, part: String },
    /// Codes outside the grid, or padding that is not zero.
    #[error("{}: tensor {tensor}: part {part}: {why}", path.display(), tensor = short(tensor), part = short(part))]
    Codes { path: PathBuf, tensor: String, part: String, why: &'static str },
    /// A travelling file's name could leave its folder.
    #[error(
        "{}: travelling file {name:?}: a name is one path component of letters, digits and ._-",
        path.display(), name = short(name)
    )]
    FileName { path: PathBuf, name: String },
    /// The shards of a packed model do not belong together.
    #[error("{}: {why}", path.display(), why = long(why))]
    ShardSet { path: PathBuf, why: String },
    /// The index is not the one that follows from the shards.
    #[error("{}: {why}", path.display(), why = long(why))]
    ShardIndex { path: PathBuf, why: String },
    /// An archive breaks its format.
    #[error("{}: archive: {why}", path.display(), why = long(why))]
    Archive { path: PathBuf, why: String },

    /// Token ids that the model has no row for, or too few of them.
    #[error("{source_name}: {why}", why = long(why))]
    Tokens { source_name: String, why: String },
    /// A model computes what cannot be measured.
    #[error("{}: {why}", path.display(), why = long(why))]
    Output { path: PathBuf, why: String },
    /// A model cannot be run with so little.
    #[error("{}: {why}", path.display(), why = long(why))]
    Reduction { path: PathBuf, why: String },
    /// A gradient is NaN or infinite.
    #[error("{}: the gradient of tensor {tensor} is NaN or infinite on window {window} of the text", path.display())]
    Gradient { path: PathBuf, tensor: String, window: usize },
    /// The library that differentiates refused an operation.
    #[error("gradients cannot be computed: {0}")]
    Autograd(Box<candle_core::Error>),
    /// A training cannot begin, or its saved state is not what it must be.
    #[error("{}: {why}", path.display(), why = long(why))]
    Training { path: PathBuf, why: String },
    /// A training ran away.
    #[error(
        "{}: the loss, its gradient, a weight or the perplexity is NaN or infinite at step {step}; try a lower \
         --learning-rate, a longer --warmup or a smaller --clip", path.display()
    )]
    Diverged { path: PathBuf, step: u64 },
    /// An importance file, or the partial one of an interrupted run, is not what it must be.
    #[error("{}: {why}", path.display())]
    Importance { path: PathBuf, why: String },
    /// Changing a token changes logits before it.
    #[error(
        "{}: looks ahead: changing a token changes the logits of earlier positions, so its perplexity is not that of a \
         language model; pass --allow-lookahead to measure it all the same", path.display()
    )]
    LooksAhead { path: PathBuf },
    /// The activations of a component are to be quantized that the architecture does not have.
    #[error(
        "{}: the architecture has no Birman-Schwinger core (bk_core) whose activations could be quantized",
        path.display()
    )]
    NoCore { path: PathBuf },
    /// A model that looks ahead is to continue a text.
    #[error("{}: its positions see those after them, so it cannot continue a text token by token", path.display())]
    NotSequential { path: PathBuf },
    /// A measurement of quality on random weights.
    #[error("{}: its weights are random (written by bkpack synth): perplexity would mean nothing", path.display())]
    Synthetic { path: PathBuf },
    /// The layout of another runtime cannot hold the model.
    #[error("{}: cannot be exported to {target}: {why}", path.display(), why = long(why))]
    Export { path: PathBuf, target: &'static str, why: String },
    /// The files of a sweep hold nothing that can be used.
    #[error("{}: {why}", path.display(), why = long(why))]
    Results { path: PathBuf, why: String },
    /// A figure cannot be drawn or written.
    #[error("figure: {why}", why = long(why))]
    Figure { why: String },
    /// Two models cannot be compared.
    #[error("{why}", why = long(why))]
    Incomparable { why: String },
    /// `BKPACK_ISA` names an instruction set that does not run here.
    #[error(transparent)]
    Isa(#[from] bkpack_kernels::cpu::IsaError),
    /// The GPU cannot be used, or its memory is full.
    #[error(transparent)]
    Cuda(#[from] bkpack_kernels::cuda::CudaError),
}

impl Error {
    /// An operating-system error about `path`; for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { path: path.as_ref().to_owned(), source }
    }

    /// A pattern that does not parse, with the cause from the last line of what the parser says.
    pub(crate) fn pattern(text: &str, error: &regex::Error) -> Error {
        let message = error.to_string();
        let why = message.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Error::Pattern { pattern: text.to_owned(), why }
    }
}

/// The names that a user may have meant.
fn did_you_mean(near: &[String]) -> String {
    let names: Vec<String> = near.iter().map(|name| short(name).to_string()).collect();
    if names.is_empty() { String::new() } else { format!("; the nearest are {}", names.join(", ")) }
}

/// A name from a file that is not trusted, as a message shows it: its first 100 characters, and control characters
/// escaped, so that no file can move the cursor or make a line of its own. `{:?}` adds quotes.
pub fn short(text: &str) -> Printable<'_> {
    Printable { text, most: 100 }
}

/// A sentence that may hold text from a file, shown as [`short`] does, up to 800 characters.
pub fn long(text: &str) -> Printable<'_> {
    Printable { text, most: 800 }
}

/// What [`short`] and [`long`] give.
#[derive(Clone, Copy)]
pub struct Printable<'a> {
    text: &'a str,
    most: usize,
}

impl Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (index, c) in self.text.chars().enumerate() {
            match c {
                _ if index == self.most => return f.write_str("..."),
                c if is_unsafe(c) => write!(f, "{}", c.escape_default())?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Control characters, and those that break a line or turn its direction.
fn is_unsafe(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Autograd(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_stays_on_one_short_line() {
        assert_eq!(short("a\n\u{1b}[31m\u{202e}b").to_string(), "a\\n\\u{1b}[31m\\u{202e}b");
        assert_eq!(format!("{:?}", short("é\0")), "\"é\\u{0}\"");
        assert_eq!(short(&"é".repeat(101)).to_string(), "é".repeat(100) + "...");
        assert_eq!(short(&"é".repeat(100)).to_string(), "é".repeat(100));
        let error = Error::SharedName { path: "f".into(), tensor: "\r".repeat(1000) };
        assert!(error.to_string().starts_with(r"f: two tensors are named \r\r") && error.to_string().len() < 300);
    }
}
