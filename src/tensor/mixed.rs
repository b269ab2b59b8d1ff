//! A model some of whose tensors come from elsewhere.

use std::{borrow::Cow, collections::HashMap, path::Path};

use serde_json::Value;

use super::{ActivationQuantization, ComplexPart, Tensor, TensorSource};
use crate::error::Result;

/// A source some of whose tensors are replaced by others of the same shapes.
pub struct Mixed<'a> {
    source: &'a dyn TensorSource,
    replaced: HashMap<String, Tensor<'a>>,
    activations: &'a [ActivationQuantization],
}

impl<'a> Mixed<'a> {
    /// The source with these tensors in place of its own, by name.
    pub fn new(source: &'a dyn TensorSource, replaced: HashMap<String, Tensor<'a>>) -> Self {
        Self { source, replaced, activations: source.activations() }
    }

    /// The same with these records of quantized activations, whose scales are among the replaced tensors.
    pub fn with_activations(self, activations: &'a [ActivationQuantization]) -> Self {
        Self { activations, ..self }
    }

    /// The same without scales for quantized activations.
    pub fn without_activations(self) -> Self {
        Self { activations: &[], ..self }
    }
}

impl TensorSource for Mixed<'_> {
    fn path(&self) -> &Path {
        self.source.path()
    }

    fn config(&self) -> Option<&Value> {
        self.source.config()
    }

    fn names(&self) -> &[String] {
        self.source.names()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.source.shape(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        match self.replaced.get(name) {
            Some(tensor) => Ok(tensor.borrowed()),
            None => self.source.tensor(name),
        }
    }

    fn file(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>> {
        self.source.file(name)
    }

    fn file_bytes(&self) -> u64 {
        self.source.file_bytes()
    }

    fn complex_part(&self, name: &str) -> Option<ComplexPart> {
        self.source.complex_part(name)
    }

    fn activations(&self) -> &[ActivationQuantization] {
        self.activations
    }
}
