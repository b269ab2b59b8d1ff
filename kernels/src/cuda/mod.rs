//! Kernels on an NVIDIA card: the driver is looked for when the program runs, and compiles the PTX that is embedded here.
//!
//! Nothing of CUDA is needed to build or to start the program. All work runs on one stream, in order, so that results
//! need no waiting until they are read. A [`Cuda`] stays on the thread that made it.

mod context;
mod driver;
mod elementwise;
mod error;
mod linear;
mod matrix;
mod memory;
mod mixture;
mod norm;
mod ptx;
mod sequence;
mod step;
mod values;

use std::{cell::RefCell, collections::HashMap, rc::Rc};

use context::{Arguments, Context, Kernel, LaunchShape, Module};
use memory::{Buffer, Pool};

pub use driver::{Card, OLDEST_CARD, Version};
pub use error::{CudaError, Result};
pub use linear::Precision;
pub use matrix::DeviceMatrix;
pub use mixture::DeviceExperts;
pub use sequence::{DeviceCache, DeviceCarry, DeviceScan};
pub use step::StepGraph;
pub use values::DeviceValues;

/// Threads of a block of the element-wise kernels.
const THREADS: u32 = 256;

/// The most blocks along the dimensions of a grid that are limited to 16 bits.
const MOST_BLOCKS: u32 = 65_535;

/// A card ready to compute: every operation is a method.
pub struct Cuda {
    kernels: RefCell<HashMap<KernelName, Rc<Kernel>>>,
    modules: RefCell<HashMap<&'static str, Rc<Module>>>,
    /// Where buffers come from now; a recorded step has a pool of its own, so that nothing else uses its buffers.
    pool: RefCell<Rc<Pool>>,
    /// Where they come from outside of steps.
    main_pool: Rc<Pool>,
    slots: step::Slots,
    card: Card,
    context: Rc<Context>,
}

/// The parts that a kernel's name is joined from.
type KernelName = [&'static str; 3];

impl Cuda {
    /// Takes the first card that the driver shows.
    ///
    /// # Errors
    /// Every [`CudaError`]: without a driver or a card, with ones that are too old.
    pub fn open() -> Result<Self> {
        driver::start(ptx::MODULES.iter().map(|(_, text)| *text))?;
        let (device, card) = driver::first_card()?;
        let context = Context::new(device)?;
        let main_pool = Pool::new(&context);
        let pool = RefCell::new(main_pool.clone());
        let slots = step::Slots::new(&context)?;
        let (kernels, modules) = (RefCell::default(), RefCell::default());
        Ok(Self { kernels, modules, pool, main_pool, slots, card, context })
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Bytes of the card's memory that are free now.
    ///
    /// # Errors
    /// [`CudaError::Call`].
    pub fn free_memory(&self) -> Result<u64> {
        Ok(self.context.memory()?.0)
    }

    /// Checks that so many bytes are free, once what waits to be used again is given back.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        self.main_pool.clear();
        let free = self.free_memory()?;
        if bytes > free { Err(CudaError::OutOfMemory { asked: bytes, free }) } else { Ok(()) }
    }

    /// A kernel by the parts of its name, compiled when it is first asked for.
    fn kernel(&self, module: &'static str, name: KernelName) -> Result<Rc<Kernel>> {
        if let Some(kernel) = self.kernels.borrow().get(&name) {
            return Ok(kernel.clone());
        }
        let loaded = self.modules.borrow().get(module).cloned();
        let module = match loaded {
            Some(module) => module,
            None => {
                let text = ptx::MODULES.iter().find(|(known, _)| *known == module).map(|(_, text)| *text);
                let loaded = Rc::new(self.context.load(text.expect("every module is embedded"))?);
                self.modules.borrow_mut().insert(module, loaded.clone());
                loaded
            }
        };
        let kernel = Rc::new(module.kernel(name.concat())?);
        self.kernels.borrow_mut().insert(name, kernel.clone());
        Ok(kernel)
    }

    /// A buffer for so many values of a type of `size` bytes.
    fn buffer(&self, count: usize, size: usize) -> Result<Buffer> {
        let bytes = count.checked_mul(size).filter(|&bytes| bytes <= isize::MAX as usize);
        let Some(bytes) = bytes else {
            return Err(CudaError::OutOfMemory { asked: u64::MAX, free: self.context.memory()?.0 });
        };
        self.with_room(|| self.pool.borrow().take(bytes))
    }

    /// What `allocate` returns; where it finds no room, once more after what waits to be used again is given back.
    fn with_room<T>(&self, allocate: impl Fn() -> Result<T>) -> Result<T> {
        match allocate() {
            // A graph may point to what waits in the pool that it is recorded with.
            Err(CudaError::OutOfMemory { .. }) if !self.context.is_recording() => {
                self.main_pool.clear();
                self.pool.borrow().clear();
                allocate()
            }
            allocated => allocated,
        }
    }

    /// A buffer that holds these bytes.
    fn uploaded(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.buffer(bytes.len(), 1)?;
        self.context.upload(bytes, &buffer, 0)?;
        Ok(buffer)
    }

    /// Launches a kernel.
    ///
    /// # Safety
    /// As [`Context::launch`].
    unsafe fn launch(
        &self,
        module: &'static str,
        name: KernelName,
        shape: LaunchShape,
        arguments: Arguments<'_>,
    ) -> Result<()> {
        let kernel = self.kernel(module, name)?;
        // SAFETY: the caller's promise.
        unsafe { self.context.launch(&kernel, shape, arguments) }
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("card", &self.card).finish_non_exhaustive()
    }
}

/// A grid of one dimension.
fn line(blocks: u32, block: u32) -> LaunchShape {
    LaunchShape { grid: [blocks, 1, 1], block, shared_bytes: 0 }
}

/// The grid of an element-wise kernel over `count` elements; its threads take several where that many blocks are not
/// enough.
fn elements(count: usize) -> LaunchShape {
    line(count.div_ceil(THREADS as usize).min(MOST_BLOCKS as usize) as u32, THREADS)
}

/// A size as kernels take it.
fn size(what: &'static str, found: usize) -> Result<u32> {
    let most = i32::MAX as usize;
    if found > most { Err(CudaError::TooLarge { what, found, most }) } else { Ok(found as u32) }
}
