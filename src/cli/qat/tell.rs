//! What a training says of itself: its plan, its figures, what came of it.

use bkpack::{
    Result,
    checkpoint::Checkpoint,
    pack::PackOptions,
    progress::Observer,
    report::{
        figure::Figure,
        table::{count, facts},
        training::{Curve, draw},
    },
    train::qat::{self, Data, History, Options, Trained, Training},
};
use bkpack_kernels::Cpu;
use serde_json::{Value, json};

use super::QatArgs;
use crate::cli::print;

impl QatArgs {
    fn encoding_name(&self) -> String {
        match (&self.encoding, &self.recipe) {
            (Some(request), _) => request.to_string(),
            (_, Some(path)) => path.display().to_string(),
            _ => unreachable!("the options require one of the two"),
        }
    }

    pub(super) fn metrics(&self, history: &History, options: &Options, weights: u64) -> Value {
        json!({
            "model": self.source,
            "encoding": self.encoding_name(),
            "weights": weights,
            "options": options,
            "baseline_ppl": history.baseline_ppl,
            "validation": history.validation,
            "steps": history.steps,
        })
    }

    pub(super) fn figure(&self, history: &History) -> Figure {
        let curve = Curve {
            losses: history.steps.iter().map(|record| (record.step, record.cross_entropy)).collect(),
            validation: history.validation.iter().map(|record| (record.step, record.nll)).collect(),
            baseline: history.baseline_ppl.map(f64::ln),
        };
        let name = self.source.canonicalize().unwrap_or_else(|_| self.source.clone());
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        draw(&format!("Training of {name} through {}", self.encoding_name()), &curve)
    }

    pub(super) fn tell_plan(
        &self,
        cpu: Cpu,
        checkpoint: &Checkpoint,
        pack: &PackOptions,
        training: &Training,
        data: &Data,
        observer: &dyn Observer,
    ) -> Result<()> {
        let (folder, packed) = qat::file_bytes(cpu, checkpoint, pack, observer)?;
        let state = training.state_bytes();
        let tokens = self.steps * (self.batch * training.ctx()) as u64;
        let rounds = tokens as f64 / data.tokens.len() as f64;
        if self.json {
            let object = json!({
                "steps": self.steps,
                "tokens": tokens,
                "text_tokens": data.tokens.len(),
                "weights": training.weights(),
                "memory_bytes": training.memory_bytes(),
                "state_bytes": state,
                "folder_bytes": folder,
                "packed_bytes": packed,
            });
            return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
        }
        if self.common.quiet {
            return Ok(());
        }
        let rows = [
            ("steps", format!("{} of {} windows of {} tokens", self.steps, self.batch, training.ctx())),
            ("tokens", format!("{tokens}, {rounds:.2} times the {} of the text", data.tokens.len())),
            ("weights", training.weights().to_string()),
            ("memory", format!("{} and what the windows compute", bytes(training.memory_bytes()))),
            ("state", format!("{} beside the output until the end", bytes(state))),
            ("folder", format!("{}, trained weights in F32", bytes(folder))),
            ("model.bkpack", bytes(packed)),
        ];
        print(&facts(rows).trim_fmt())
    }

    pub(super) fn tell(&self, trained: &Trained, (weights, packed_bytes): (u64, u64), seconds: f64) -> Result<()> {
        let History { steps, validation, baseline_ppl } = &trained.history;
        // A text that was named only when the training went on was not measured before it.
        let untrained = validation.first().filter(|record| record.step == 0).map(|record| record.ppl);
        let (first, last) = (&steps[0], &steps[steps.len() - 1]);
        if self.json {
            let object = json!({
                "output": self.output,
                "packed": self.output.join("model.bkpack"),
                "packed_bytes": packed_bytes,
                "weights": weights,
                "steps": last.step,
                "first_loss": first.loss,
                "last_loss": last.loss,
                "baseline_ppl": baseline_ppl,
                "untrained_ppl": untrained,
                "trained_ppl": validation.last().map(|record| record.ppl),
                "seconds": seconds,
            });
            return print(&serde_json::to_string_pretty(&object).expect("plain data is JSON"));
        }
        if self.common.quiet {
            return Ok(());
        }
        let mut rows = vec![
            ("steps", format!("{} in {seconds:.1} s", last.step)),
            ("loss", format!("{:.4} at first, {:.4} at last", first.loss, last.loss)),
        ];
        if let (Some(baseline), Some(trained)) = (baseline_ppl, validation.last()) {
            let untrained = untrained.map(|ppl| format!("{ppl:.3} packed without training, ")).unwrap_or_default();
            rows.push(("perplexity", format!("{baseline:.3} as it was, {untrained}{:.3} trained", trained.ppl)));
        }
        rows.push(("written", self.output.display().to_string()));
        rows.push(("packed", format!("{} ({})", self.output.join("model.bkpack").display(), bytes(packed_bytes))));
        print(&facts(rows).trim_fmt())
    }
}

fn bytes(value: u64) -> String {
    format!("{} bytes", count(value))
}

/// JSON as people read it.
pub(super) fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("plain data is JSON");
    bytes.push(b'\n');
    bytes
}
