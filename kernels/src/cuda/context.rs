//! A card made ready: its context and the one stream that all work runs on, in order.

use std::{
    cell::{Cell, RefCell},
    ffi::CString,
    rc::Rc,
};

use cudarc::driver::{
    result::{self, stream::StreamKind},
    sys::{
        CUcontext, CUdevice, CUdeviceptr, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUmodule, CUstream,
        CUstreamCaptureMode,
    },
};

use super::{
    driver::refused,
    error::{CudaError, Result},
    matrix::{DeviceMatrix, RawMatrix},
    memory::{Buffer, Memory, Pool},
};

/// One thread holds it; it is made current there before each call that needs it, since another part of the program may
/// have set its own.
pub struct Context {
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    /// What is recorded, while work is not run.
    recording: RefCell<Option<Recording>>,
}

/// What the work that is being recorded uses.
struct Recording {
    /// Where it takes buffers from: the graph holds all of it.
    pool: Rc<Pool>,
    /// The memory of every other buffer.
    memory: Vec<Rc<Memory>>,
}

impl Context {
    pub(super) fn new(device: CUdevice) -> Result<Rc<Self>> {
        // SAFETY: the device is one that the driver gave.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(refused("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context was retained above and is released when `self` is dropped.
        unsafe { result::ctx::set_current(context) }.map_err(refused("cuCtxSetCurrent"))?;
        let stream = result::stream::create(StreamKind::NonBlocking).map_err(refused("cuStreamCreate"))?;
        Ok(Rc::new(Self { device, context, stream, recording: RefCell::default() }))
    }

    /// Makes the context current.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(refused("cuCtxSetCurrent"))
    }

    /// Free and total bytes of the card's memory.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(refused("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Waits for all work.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(refused("cuStreamSynchronize"))
    }

    /// Copies bytes to a buffer, from a byte of it on, and waits until they are there: the driver promises nothing of when
    /// it has read them.
    ///
    /// # Panics
    /// If they do not fit.
    pub(super) fn upload(&self, bytes: &[u8], to: &Buffer, offset: usize) -> Result<()> {
        assert!(offset + bytes.len() <= to.bytes(), "{} bytes do not fit the buffer of {}", bytes.len(), to.bytes());
        // Recorded, it would read the bytes again at each replay, when they may be gone.
        self.check_running("a copy to the card")?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        let target = to.pointer() + offset as CUdeviceptr;
        // SAFETY: the target has room (checked above); the copy ends before `bytes` is borrowed no more, since the stream
        // is waited for, whether or not the copy was refused.
        let copied = unsafe { result::memcpy_htod_async(target, bytes, self.stream) };
        let waited = self.synchronize();
        copied.map_err(refused("cuMemcpyHtoDAsync"))?;
        waited
    }

    /// Copies the start of a buffer to memory, once the work before it is done.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub(super) fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.bytes(), "the buffer has fewer than {} bytes", bytes.len());
        self.check_running("a copy from the card")?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the source has as many bytes (checked above); the copy ends before `bytes` is borrowed no more, since
        // the stream is waited for, whether or not the copy was refused.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from.pointer(), self.stream) };
        let waited = self.synchronize();
        copied.map_err(refused("cuMemcpyDtoHAsync"))?;
        waited
    }

    /// Sets the first bytes of a buffer to zero.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub(super) fn zero(&self, buffer: &mut Buffer, bytes: usize) -> Result<()> {
        assert!(bytes <= buffer.bytes(), "the buffer has fewer than {bytes} bytes");
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        self.hold(buffer);
        // SAFETY: the buffer has as many bytes (checked above), and its memory outlives the work.
        let set = unsafe { result::memset_d8_async(buffer.pointer(), 0, bytes, self.stream) };
        set.map_err(refused("cuMemsetD8Async"))
    }

    /// Whether work is recorded and not run.
    pub(super) fn is_recording(&self) -> bool {
        self.recording.borrow().is_some()
    }

    /// Keeps the memory of a buffer for the graph that is being recorded.
    fn hold(&self, buffer: &Buffer) {
        if let Some(recording) = &mut *self.recording.borrow_mut()
            && !buffer.is_of(&recording.pool)
        {
            recording.memory.push(buffer.memory().clone());
        }
    }

    /// The same of memory that kernels find by pointers in the card's memory.
    pub(super) fn hold_memory(&self, memory: &[Rc<Memory>]) {
        if let Some(recording) = &mut *self.recording.borrow_mut() {
            recording.memory.extend_from_slice(memory);
        }
    }

    fn check_running(&self, what: &str) -> Result<()> {
        match self.is_recording() {
            true => Err(CudaError::Call { call: "cuStreamBeginCapture", why: format!("{what} cannot be recorded") }),
            false => Ok(()),
        }
    }

    /// Records what `run` launches in place of running it; `None` where the driver or `run` refuses. `run` takes its new
    /// buffers from `pool`, which nothing else uses.
    pub(super) fn capture<T, E>(
        self: &Rc<Self>,
        pool: Rc<Pool>,
        run: impl FnOnce() -> Result<T, E>,
    ) -> Option<(Graph, T)> {
        // Relaxed, because another thread may use the card at the same time: nothing here waits on it.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives, and the capture is ended below on every path.
        unsafe { result::stream::begin_capture(self.stream, mode) }.ok()?;
        self.recording.replace(Some(Recording { pool, memory: Vec::new() }));
        let ran = run();
        let held = self.recording.take();
        // SAFETY: the stream is the one whose capture was begun.
        let graph = unsafe { result::stream::end_capture(self.stream) }.ok().filter(|graph| !graph.is_null())?;
        let graph = Graph { context: self.clone(), graph, runnable: std::ptr::null_mut(), _held: held };
        graph.instantiate().zip(ran.ok())
    }

    /// Compiles PTX for the card.
    pub(super) fn load(self: &Rc<Self>, ptx: &str) -> Result<Module> {
        let text = CString::new(ptx).expect("PTX holds no NUL");
        self.enter()?;
        // SAFETY: the image is PTX that ends in NUL and lives through the call.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.map_err(refused("cuModuleLoadData"))?;
        Ok(Module { context: self.clone(), module })
    }

    /// Copies bytes within the card's memory.
    ///
    /// # Panics
    /// If one of the buffers is shorter.
    pub(super) fn copy(&self, from: &Buffer, offset: usize, to: &mut Buffer, bytes: usize) -> Result<()> {
        assert!(offset + bytes <= from.bytes() && bytes <= to.bytes(), "both buffers hold {bytes} bytes");
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        self.hold(from);
        self.hold(to);
        let source = from.pointer() + offset as CUdeviceptr;
        // SAFETY: both ends are within their buffers (checked above), which are not the same, and whose memory outlives
        // the work.
        let copied = unsafe { result::memcpy_dtod_async(to.pointer(), source, bytes, self.stream) };
        copied.map_err(refused("cuMemcpyDtoDAsync"))
    }

    /// Runs a kernel on a grid of blocks; nothing where the grid has none.
    ///
    /// # Safety
    /// The arguments must be those that the kernel takes, in their order and types, and the kernel must stay within the
    /// buffers that they point to.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Kernel,
        shape: LaunchShape,
        mut arguments: Arguments<'_>,
    ) -> Result<()> {
        let LaunchShape { grid, block, shared_bytes } = shape;
        if grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        arguments.buffers.iter().flatten().for_each(|buffer| self.hold(buffer));
        if shared_bytes > kernel.shared_bytes.get() {
            kernel.allow_shared(shared_bytes)?;
        }
        let matrix = arguments.matrix.as_mut().map(|matrix| std::ptr::from_mut(matrix).cast());
        let slots = arguments.slots[..arguments.count].iter_mut().map(|slot| std::ptr::from_mut(slot).cast());
        let mut pointers = [std::ptr::null_mut(); MOST_ARGUMENTS + 1];
        let mut count = 0;
        for (pointer, argument) in pointers.iter_mut().zip(matrix.into_iter().chain(slots)) {
            *pointer = argument;
            count += 1;
        }
        // SAFETY: the module that the kernel is of lives as long as the kernel, and memory outlives the work on it; the
        // rest is the caller's promise.
        let launched = unsafe {
            let arguments = &mut pointers[..count];
            result::launch_kernel(kernel.function, grid.into(), (block, 1, 1), shared_bytes, self.stream, arguments)
        };
        launched.map_err(|error| of(&kernel.name, refused("cuLaunchKernel")(error)))
    }
}

/// The same error, saying of which kernel.
fn of(name: &str, error: CudaError) -> CudaError {
    match error {
        CudaError::Call { call, why } => CudaError::Call { call, why: format!("of {name}: {why}") },
        error => error,
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing that was made in the context is left: it would hold the context.
        unsafe {
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Kernels compiled for the card.
pub(super) struct Module {
    context: Rc<Context>,
    module: CUmodule,
}

impl Module {
    /// The kernel of a name.
    pub(super) fn kernel(self: &Rc<Self>, name: String) -> Result<Kernel> {
        let symbol = CString::new(name.as_str()).expect("names hold no NUL");
        // SAFETY: the module is loaded as long as `self` lives, which the kernel sees to.
        let function = unsafe { result::module::get_function(self.module, symbol) };
        let function = function.map_err(|error| of(&name, refused("cuModuleGetFunction")(error)))?;
        Ok(Kernel { _module: self.clone(), function, name, shared_bytes: Cell::new(SHARED_BYTES) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: it was loaded once, and no kernel of it is left.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

/// Shared memory that every kernel may ask for.
const SHARED_BYTES: u32 = 48 << 10;

/// A function that runs on the card.
pub(super) struct Kernel {
    _module: Rc<Module>,
    function: CUfunction,
    name: String,
    /// Shared memory that it may ask for.
    shared_bytes: Cell<u32>,
}

impl Kernel {
    fn allow_shared(&self, bytes: u32) -> Result<()> {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded as long as `self` lives.
        let set = unsafe { result::function::set_function_attribute(self.function, attribute, bytes as i32) };
        set.map_err(|error| of(&self.name, refused("cuFuncSetAttribute")(error)))?;
        self.shared_bytes.set(bytes);
        Ok(())
    }
}

/// How many blocks of how many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaunchShape {
    pub grid: [u32; 3],
    pub block: u32,
    pub shared_bytes: u32,
}

/// The most arguments of a kernel beside a matrix.
const MOST_ARGUMENTS: usize = 16;

/// The arguments of a kernel: a matrix, where it takes one, comes first; each other has a slot of 8 bytes, whose low bytes
/// are the value, whatever its size.
#[derive(Default)]
pub(super) struct Arguments<'a> {
    matrix: Option<RawMatrix>,
    slots: [u64; MOST_ARGUMENTS],
    count: usize,
    /// What they point to: the parts of the matrix come last.
    buffers: [Option<&'a Buffer>; MOST_ARGUMENTS + 3],
}

impl<'a> Arguments<'a> {
    pub(super) fn of_matrix(matrix: &'a DeviceMatrix) -> Self {
        let mut arguments = Self { matrix: Some(matrix.raw()), ..Self::default() };
        arguments.buffers[MOST_ARGUMENTS..].copy_from_slice(&matrix.buffers());
        arguments
    }

    fn push(mut self, slot: u64) -> Self {
        self.slots[self.count] = slot;
        self.count += 1;
        self
    }

    pub(super) fn buffer(self, buffer: &'a Buffer) -> Self {
        self.part(buffer, 0)
    }

    /// A part of a buffer, from a byte on.
    pub(super) fn part(mut self, buffer: &'a Buffer, offset: usize) -> Self {
        assert!(offset < buffer.bytes(), "the buffer ends before byte {offset}");
        self.buffers[self.count] = Some(buffer);
        self.push(buffer.pointer() + offset as u64)
    }

    /// A pointer that may be null.
    pub(super) fn optional(self, buffer: Option<&'a Buffer>) -> Self {
        match buffer {
            Some(buffer) => self.buffer(buffer),
            None => self.push(0),
        }
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.push(value.into())
    }

    pub(super) fn u64(self, value: usize) -> Self {
        self.push(value as u64)
    }

    pub(super) fn f32(self, value: f32) -> Self {
        self.push(value.to_bits().into())
    }
}

/// Recorded work that can be run again as a whole. It holds the memory that it works on.
pub(super) struct Graph {
    context: Rc<Context>,
    graph: CUgraph,
    runnable: CUgraphExec,
    _held: Option<Recording>,
}

impl Graph {
    fn instantiate(mut self) -> Option<Self> {
        let flags = cudarc::driver::sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph is the one that a capture has given.
        self.runnable = unsafe { result::graph::instantiate(self.graph, flags) }.ok()?;
        Some(self)
    }

    /// Whether it was recorded in this context.
    pub(super) fn is_of(&self, context: &Rc<Context>) -> bool {
        Rc::ptr_eq(&self.context, context)
    }

    /// Runs it, after all work before.
    pub(super) fn run(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both live as long as `self`, and so does the memory that the recorded work uses.
        unsafe { result::graph::launch(self.runnable, self.context.stream) }.map_err(refused("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        // SAFETY: each is destroyed once, and no run of it is left.
        unsafe {
            if !self.runnable.is_null() {
                let _ = result::graph::exec_destroy(self.runnable);
            }
            let _ = result::graph::destroy(self.graph);
        }
    }
}
