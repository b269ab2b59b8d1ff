//! What an export consists of: tensors under llama.cpp's names, and where the rows of each come from.

use std::ops::Range;

use super::container::Metadata;

/// A model as llama.cpp knows its architecture.
#[derive(Debug)]
pub(super) struct Description {
    /// Keys that the architecture has; the tokenizer's are not among them.
    pub metadata: Metadata,
    pub entries: Vec<Entry>,
    /// Rows of the embedding: token ids that the model knows.
    pub vocab_size: usize,
    /// Why llama.cpp would not load it.
    pub refusals: Vec<String>,
    /// Where llama.cpp computes something else.
    pub warnings: Vec<String>,
}

/// One tensor of the export.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub content: Content,
    /// Whether llama.cpp computes with it in F32 only: vectors, routers, convolutions.
    pub wide: bool,
}

/// Where the values of a tensor come from.
#[derive(Debug)]
pub(super) enum Content {
    /// Rows of packed tensors, one piece after the other.
    Rows(Vec<Piece>),
    /// `-exp(x)` of a packed tensor.
    NegativeExp(String),
    /// Computed from config.json.
    Values(Vec<f32>),
}

/// Rows of one packed tensor.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub tensor: String,
    pub rows: Range<usize>,
    pub order: Order,
}

/// The order in which rows are written. They are moved whole, so packed ones stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    AsTheyAre,
    /// Within each head of so many rows the two halves alternate: llama.cpp turns neighbours where transformers turns
    /// elements half a head apart.
    Interleaved {
        head_dim: usize,
    },
}

impl Order {
    /// Which row of the packed tensor becomes row `row`.
    pub(super) fn source(self, row: usize) -> usize {
        match self {
            Order::AsTheyAre => row,
            Order::Interleaved { head_dim } => {
                let (head, place) = (row / head_dim, row % head_dim);
                head * head_dim + place % 2 * (head_dim / 2) + place / 2
            }
        }
    }
}

impl Entry {
    /// A whole packed matrix `[rows, cols]`.
    pub(super) fn matrix(name: String, tensor: String, [rows, cols]: [usize; 2], order: Order) -> Self {
        let piece = Piece { tensor, rows: 0..rows, order };
        Self { name, shape: vec![rows, cols], content: Content::Rows(vec![piece]), wide: false }
    }

    /// A whole packed vector.
    pub(super) fn vector(name: String, tensor: String, length: usize, order: Order) -> Self {
        let piece = Piece { tensor, rows: 0..1, order };
        Self { name, shape: vec![length], content: Content::Rows(vec![piece]), wide: true }
    }

    /// The packed tensors that it comes from.
    pub(super) fn sources(&self) -> Vec<&str> {
        match &self.content {
            Content::Rows(pieces) => pieces.iter().map(|piece| piece.tensor.as_str()).collect(),
            Content::NegativeExp(tensor) => vec![tensor],
            Content::Values(_) => Vec::new(),
        }
    }

    /// Columns of a row.
    pub(super) fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_each_head_alternate() {
        let order = Order::Interleaved { head_dim: 6 };
        let rows: Vec<usize> = (0..12).map(|row| order.source(row)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        // New row 2i + j of a head is its old row j * head_dim / 2 + i.
        let order = Order::Interleaved { head_dim: 64 };
        for (head, i, j) in [(0, 0, 0), (2, 31, 1), (8, 7, 0), (8, 7, 1)] {
            assert_eq!(order.source(head * 64 + 2 * i + j), head * 64 + j * 32 + i);
        }
    }
}
