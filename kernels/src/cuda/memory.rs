//! Memory on the card: buffers that are used again and again, and copies to and from them.

use std::{cell::RefCell, rc::Rc};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{CUdeviceptr, CUresult},
};

use super::{
    context::Context,
    driver::refused,
    error::{CudaError, Result},
};

/// Sizes are rounded up to this, so that buffers of nearly the same size serve each other.
const GRAIN: usize = 512;

/// Memory on the card that is given back when it is dropped.
pub(super) struct Memory {
    context: Rc<Context>,
    pointer: CUdeviceptr,
    bytes: usize,
}

impl Memory {
    fn new(context: &Rc<Context>, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(GRAIN).max(GRAIN);
        context.enter()?;
        // SAFETY: the size is not zero, and nothing reads the memory before it is written: see `Buffer`.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(pointer) => Ok(Self { context: context.clone(), pointer, bytes }),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, _) = context.memory()?;
                Err(CudaError::OutOfMemory { asked: bytes as u64, free })
            }
            Err(error) => Err(refused("cuMemAlloc")(error)),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A failure here can only repeat one that a call before it has told.
        let _ = self.context.enter().and_then(|()| self.context.synchronize());
        // SAFETY: the pointer came from `malloc_sync`, is freed once, and no work that could use it is left.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

/// Buffers that wait to be used again. All work is on one stream, so that one which is dropped may be taken at once: what
/// was launched before finishes before what is launched after.
pub struct Pool {
    context: Rc<Context>,
    free: RefCell<Vec<Rc<Memory>>>,
}

impl Pool {
    pub(super) fn new(context: &Rc<Context>) -> Rc<Self> {
        Rc::new(Self { context: context.clone(), free: RefCell::default() })
    }

    /// A buffer of at least so many bytes, its contents unspecified.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub(super) fn take(self: &Rc<Self>, bytes: usize) -> Result<Buffer> {
        let memory = match self.waiting(bytes) {
            Some(memory) => memory,
            None => Rc::new(Memory::new(&self.context, bytes)?),
        };
        Ok(Buffer { memory, home: Some(self.clone()) })
    }

    /// Gives back all that waits.
    pub(super) fn clear(&self) {
        self.free.take();
    }

    /// The smallest that is large enough, unless it is so large that most of it would lie idle.
    fn waiting(&self, bytes: usize) -> Option<Rc<Memory>> {
        let mut free = self.free.borrow_mut();
        let fits = |memory: &Rc<Memory>| (bytes..=2 * bytes.max(GRAIN)).contains(&memory.bytes);
        let fitting = free.iter().enumerate().filter(|(_, memory)| fits(memory));
        let index = fitting.min_by_key(|(_, memory)| memory.bytes).map(|(index, _)| index)?;
        Some(free.swap_remove(index))
    }
}

/// Memory on the card. What it holds is what was written to it last, by a copy or a kernel.
pub struct Buffer {
    memory: Rc<Memory>,
    /// Where the memory waits to be used again once the buffer is dropped, unless a recorded step holds it.
    home: Option<Rc<Pool>>,
}

impl Buffer {
    /// A buffer of its own, whose memory is given back when it is dropped.
    pub(super) fn new(context: &Rc<Context>, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Rc::new(Memory::new(context, bytes)?), home: None })
    }

    pub(super) fn memory(&self) -> &Rc<Memory> {
        &self.memory
    }

    /// Whether it came from this pool.
    pub(super) fn is_of(&self, pool: &Rc<Pool>) -> bool {
        self.home.as_ref().is_some_and(|home| Rc::ptr_eq(home, pool))
    }

    /// Where it lies on the card.
    pub(super) fn pointer(&self) -> CUdeviceptr {
        self.memory.pointer
    }

    /// The bytes that it has room for.
    pub fn bytes(&self) -> usize {
        self.memory.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = &self.home
            && Rc::strong_count(&self.memory) == 1
        {
            home.free.borrow_mut().push(self.memory.clone());
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}
