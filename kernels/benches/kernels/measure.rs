//! What the benches share: which lines are wanted, the machine's limits, and a line each with its share of them.

use std::collections::HashMap;
use std::time::Duration;

use bkpack_kernels::Cpu;
use bkpack_kernels::cpu::{describe, probe};

/// How long one line is repeated.
const REPEAT: Duration = Duration::from_millis(300);

/// Measures the lines that the command line asks for.
pub struct Bench {
    pub cpu: Cpu,
    /// All of them are part of a wanted line's label.
    words: Vec<String>,
    /// An object a line instead of text.
    json: bool,
    fma: Option<f64>,
    int8: Option<f64>,
    exp: Option<f64>,
    reads: HashMap<usize, f64>,
}

/// What a line does, and what of it the machine limits.
#[derive(Clone, Copy, Default)]
pub struct Work {
    /// Read from and written to memory, each byte once.
    pub bytes: usize,
    /// Of f32, a multiplication and an addition counting one each.
    pub flops: usize,
    /// Of 8-bit integers, counted likewise.
    pub int8_operations: usize,
    pub exponentials: usize,
}

/// In what a line gives its figure.
#[derive(Clone, Copy)]
pub enum Figure {
    /// Bytes a second, in 10^9.
    Bytes,
    /// Operations of f32 or INT8 a second, in 10^9.
    Operations,
    /// Nanoseconds for each of so many positions.
    Positions(usize),
}

impl Bench {
    /// Reads the command line: words that choose lines, and `--json`.
    pub fn from_arguments() -> Self {
        let cpu = Cpu::from_environment().unwrap_or_else(|error| {
            eprintln!("error: {error}");
            std::process::exit(2);
        });
        // Cargo adds `--bench`.
        let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let json = arguments.iter().any(|argument| argument == "--json");
        let words: Vec<String> = arguments.into_iter().filter(|argument| argument != "--json").collect();
        if let Some(unknown) = words.iter().find(|word| word.starts_with('-')) {
            eprintln!("error: {unknown} is no option: pass --json, or words that choose lines");
            std::process::exit(2);
        }
        let bench = Self { cpu, words, json, fma: None, int8: None, exp: None, reads: HashMap::new() };
        if !json {
            println!("{}, {}, {} threads", describe::name(), cpu.isa(), rayon::current_num_threads());
        }
        bench
    }

    /// Whether any line whose label begins like this may be wanted: its operands are then worth making.
    pub fn wants(&self, label: &str) -> bool {
        self.words.iter().all(|word| label.contains(word.as_str()))
    }

    /// Operations a second in f32.
    pub fn fma(&mut self) -> f64 {
        *self.fma.get_or_insert_with(|| self.cpu.fma_rate())
    }

    /// Operations a second in INT8.
    pub fn int8(&mut self) -> f64 {
        *self.int8.get_or_insert_with(|| self.cpu.int8_rate())
    }

    /// Exponentials a second.
    pub fn exp(&mut self) -> f64 {
        *self.exp.get_or_insert_with(|| self.cpu.exp_rate())
    }

    /// Bytes a second, read over and over from about so many; the widest loads of the machine count.
    pub fn read(&mut self, bytes: usize) -> f64 {
        let digits = 10usize.pow(bytes.max(1).ilog10().saturating_sub(1));
        let bytes = bytes.max(4096).next_multiple_of(digits);
        *self.reads.entry(bytes).or_insert_with(|| {
            let mut memory = memmap2::MmapMut::map_anon(bytes).expect("memory for the probe");
            #[cfg(target_os = "linux")]
            let _ = memory.advise(memmap2::Advice::HugePage);
            memory.fill(1);
            Cpu::detect().read_rate(&memory)
        })
    }

    /// Times `run` if the line is wanted; returns the seconds of the fastest repetition.
    pub fn line(&mut self, label: &str, figure: Figure, work: Work, run: impl FnMut()) -> Option<f64> {
        if !self.wants(label) {
            return None;
        }
        let seconds = probe::fastest(REPEAT, run);
        let mut limits = vec![("reading memory", work.bytes as f64 / self.read(work.bytes))];
        if work.flops > 0 {
            limits.push(("f32 multiply-adds", work.flops as f64 / self.fma()));
        }
        if work.int8_operations > 0 {
            limits.push(("INT8 products", work.int8_operations as f64 / self.int8()));
        }
        if work.exponentials > 0 {
            limits.push(("exponentials", work.exponentials as f64 / self.exp()));
        }
        let (limit, least) = limits.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there is at least one");
        let (value, unit) = match figure {
            Figure::Bytes => (work.bytes as f64 / seconds / 1e9, "GB/s"),
            Figure::Operations => ((work.flops + work.int8_operations) as f64 / seconds / 1e9, "GOP/s"),
            Figure::Positions(count) => (1e9 * seconds / count as f64, "ns a position"),
        };
        self.print(label, seconds, value, unit, Some((limit, least / seconds)));
        Some(seconds)
    }

    /// Prints a limit itself.
    pub fn limit(&mut self, label: &str, unit: &str, rate: impl FnOnce(&mut Self) -> f64) {
        if self.wants(label) {
            let value = rate(self) / 1e9;
            self.print(label, 0.0, value, unit, None);
        }
    }

    fn print(&self, label: &str, seconds: f64, value: f64, unit: &str, limit: Option<(&str, f64)>) {
        if self.json {
            // Labels and units are plain ASCII, whose debug form is JSON.
            let (cpu, isa, threads) = (describe::name(), self.cpu.isa(), rayon::current_num_threads());
            let limit = limit.map(|(name, share)| format!(",\"limit\":{name:?},\"share\":{share:.4}"));
            println!(
                "{{\"line\":{label:?},\"value\":{value:.4},\"unit\":{unit:?},\"seconds\":{seconds:e}{},\"cpu\":{cpu:?},\
                 \"isa\":\"{isa}\",\"threads\":{threads}}}",
                limit.unwrap_or_default()
            );
            return;
        }
        let limit = limit.map(|(name, share)| format!("{:4.0} % of {name}", 100.0 * share));
        println!("{label:58} {value:10.2} {unit:13} {}", limit.unwrap_or_default());
    }
}
