//! Buffers that each thread keeps for the next kernel: what runs for every token shall not allocate.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

thread_local! {
    /// Buffers that nobody uses.
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values that live as long as the call of a kernel, first all zero.
pub(super) struct Buffer(Vec<f32>);

impl Buffer {
    pub(super) fn zeros(len: usize) -> Self {
        let mut values = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        values.clear();
        values.resize(len, 0.0);
        Self(values)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.0);
        // A thread that ends keeps nothing.
        let _ = FREE.try_with(|free| free.borrow_mut().push(values));
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_used_again() {
        let dirty = |len| {
            let mut buffer = Buffer::zeros(len);
            assert_eq!(&buffer[..], vec![0.0; len]);
            buffer.fill(1.0);
            buffer.as_ptr()
        };
        let first = dirty(100);
        assert_eq!(dirty(50), first);
        // Two at a time are two.
        let held = Buffer::zeros(10);
        assert_ne!(dirty(50), held.as_ptr());
    }
}
