//! A step of decoding that is recorded once and then run again as a whole.
//!
//! What changes from one step to the next, the token and its position, lies in two words of the card's memory that the
//! kernels read, so that the same recorded work serves every step.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::{
    Cuda,
    context::{Arguments, Context, Graph},
    error::{CudaError, Result},
    linear::embed_shape,
    matrix::DeviceMatrix,
    memory::{Buffer, Pool},
    values::DeviceValues,
};

/// Where the kernels find the position and the token.
pub(super) struct Slots {
    /// Positions seen before, and the token of a step.
    pub words: Buffer, // u32 [2]
    past: Cell<Option<usize>>,
    /// What the step that is being recorded has used.
    used: RefCell<Option<Used>>,
}

/// What a recorded step uses that is sized by positions.
struct Used {
    /// The numbers of positions of its caches.
    caches: Vec<Rc<Cell<usize>>>,
    /// It serves positions below this one: no cache has more room, and no table more rows.
    room: usize,
}

/// Where in the words the position lies, in bytes.
const POSITION: usize = 0;
/// Where the token lies.
const TOKEN: usize = size_of::<u32>();

impl Slots {
    pub(super) fn new(context: &Rc<Context>) -> Result<Self> {
        let words = Buffer::new(context, 2 * size_of::<u32>())?;
        Ok(Self { words, past: Cell::new(None), used: RefCell::default() })
    }

    /// Notes a cache with room for so many positions, whose number grows with each step.
    pub(super) fn note_cache(&self, positions: &Rc<Cell<usize>>, capacity: usize) {
        if let Some(used) = &mut *self.used.borrow_mut() {
            used.caches.push(positions.clone());
            used.room = used.room.min(capacity);
        }
    }

    /// Notes a table that has rows for so many positions.
    fn note_table(&self, rows: usize) {
        if let Some(used) = &mut *self.used.borrow_mut() {
            used.room = used.room.min(rows);
        }
    }
}

/// What is kept of a step between one time and the next.
#[derive(Default)]
pub struct StepGraph(Stage);

impl StepGraph {
    /// Whether the step is recorded, so that it is replayed from now on.
    pub fn is_recorded(&self) -> bool {
        matches!(self.0, Stage::Recorded { .. })
    }
}

#[derive(Default)]
enum Stage {
    /// It has not run yet.
    #[default]
    New,
    /// It has run once: its buffers are there and its kernels are compiled.
    Run(Rc<Pool>),
    Recorded {
        graph: Graph,
        output: DeviceValues,
        used: Used,
    },
    /// It cannot be recorded, so that it is run each time.
    Refused,
}

impl Cuda {
    /// Tells the kernels how many positions come before the tokens of this call.
    pub(super) fn set_past(&self, past: usize) -> Result<()> {
        if self.slots.past.get() != Some(past) {
            self.set_words(past, &[self.position(past)?])?;
        }
        Ok(())
    }

    fn set_words(&self, past: usize, words: &[u32]) -> Result<()> {
        self.slots.past.set(None);
        self.context.upload(bytemuck::cast_slice(words), &self.slots.words, 0)?;
        self.slots.past.set(Some(past));
        Ok(())
    }

    fn position(&self, past: usize) -> Result<u32> {
        super::size("a position", past)
    }

    /// Runs one step of decoding and copies its logits to `out`: the first time as `run` does, then recorded, then
    /// replayed without it. Only [`embed_step`](Self::embed_step), [`embed_at_step`](Self::embed_at_step) and
    /// [`row_at_step`](Self::row_at_step) may use the token and the position. A replay works on the memory that the
    /// recorded `run` used, which it keeps.
    ///
    /// # Panics
    /// If a recorded step is another [`Cuda`]'s, its caches do not hold `past` positions, or they or its tables have no room
    /// for one more.
    ///
    /// # Errors
    /// What `run` returns; [`CudaError::Call`].
    pub fn step<E: From<CudaError>>(
        &self,
        step: &mut StepGraph,
        (token, past): (u32, usize),
        mut run: impl FnMut() -> Result<DeviceValues, E>,
        out: &mut Vec<f32>,
    ) -> Result<(), E> {
        self.set_words(past, &[self.position(past)?, token])?;
        match std::mem::take(&mut step.0) {
            Stage::New => {
                let pool = Pool::new(&self.context);
                let output = self.within(&pool, &mut run)?;
                self.read(&output, out)?;
                step.0 = Stage::Run(pool);
            }
            Stage::Run(pool) => step.0 = self.record(pool, past, run, out)?,
            Stage::Recorded { graph, output, used } => {
                assert!(graph.is_of(&self.context), "a step is replayed on the card that recorded it");
                assert!(
                    past < used.room,
                    "the recorded step has room for {} positions, not for {past} and one",
                    used.room
                );
                assert!(used.caches.iter().all(|positions| positions.get() == past), "caches of {past} positions");
                graph.run()?;
                used.caches.iter().for_each(|positions| positions.set(past + 1));
                self.read(&output, out)?;
                step.0 = Stage::Recorded { graph, output, used };
            }
            Stage::Refused => {
                self.read(&run()?, out)?;
                step.0 = Stage::Refused;
            }
        }
        Ok(())
    }

    fn record<E: From<CudaError>>(
        &self,
        pool: Rc<Pool>,
        past: usize,
        mut run: impl FnMut() -> Result<DeviceValues, E>,
        out: &mut Vec<f32>,
    ) -> Result<Stage, E> {
        self.slots.used.replace(Some(Used { caches: Vec::new(), room: usize::MAX }));
        let recorded = self.context.capture(pool.clone(), || self.within(&pool, &mut run));
        let used = self.slots.used.take().expect("it was put there above");
        match recorded {
            Some((graph, output)) => {
                graph.run()?;
                self.read(&output, out)?;
                Ok(Stage::Recorded { graph, output, used })
            }
            None => {
                // Nothing of the recording has run.
                used.caches.iter().for_each(|positions| positions.set(past));
                self.read(&run()?, out)?;
                Ok(Stage::Refused)
            }
        }
    }

    /// Runs with buffers from a pool of its own.
    fn within<T>(&self, pool: &Rc<Pool>, run: impl FnOnce() -> T) -> T {
        let outside = self.pool.replace(pool.clone());
        let result = run();
        self.pool.replace(outside);
        result
    }

    /// The row of `table` of the token of the step under way: `[1, cols]`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], [`CudaError::Call`].
    pub fn embed_step(&self, table: &DeviceMatrix) -> Result<DeviceValues> {
        self.embed_word(table, TOKEN)
    }

    /// The row of `table` of the position of the step under way: `[1, cols]`.
    ///
    /// # Panics
    /// If `table` has no row for the position that a step starts from.
    ///
    /// # Errors
    /// As [`embed_step`](Self::embed_step).
    pub fn embed_at_step(&self, table: &DeviceMatrix) -> Result<DeviceValues> {
        self.note_position(table.rows());
        self.embed_word(table, POSITION)
    }

    /// The row of `table` that the word at [`POSITION`] or [`TOKEN`] names.
    fn embed_word(&self, table: &DeviceMatrix, word: usize) -> Result<DeviceValues> {
        let out = self.scratch(1, table.cols())?;
        let arguments = Arguments::of_matrix(table).part(&self.slots.words, word).buffer(&out.buffer);
        let encoding = table.encoding_name();
        // SAFETY: embed(table, tokens, out) reads one number, and writes a row of NaN for one beyond the table.
        unsafe { self.launch(encoding, ["embed_", encoding, ""], embed_shape(1, table.cols()), arguments)? };
        Ok(out)
    }

    /// Notes a table of so many rows, one for each position.
    fn note_position(&self, rows: usize) {
        let past = self.slots.past.get().unwrap_or(usize::MAX);
        assert!(past < rows, "{rows} rows have none for position {past}");
        self.slots.note_table(rows);
    }

    /// The row of `x` of the position of the step under way: `[1, cols]`.
    ///
    /// # Panics
    /// If `x` has no row for the position that a step starts from.
    ///
    /// # Errors
    /// As [`embed_step`](Self::embed_step).
    pub fn row_at_step(&self, x: &DeviceValues) -> Result<DeviceValues> {
        self.note_position(x.rows());
        // SAFETY: the first word is the position, for which `x` has a row; a replay asserts the same of its position.
        unsafe { self.gather_by(x, Arguments::default().buffer(&x.buffer).buffer(&self.slots.words), 1) }
    }
}
