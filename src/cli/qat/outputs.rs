//! What a training writes, and what it must not write over.

use std::{collections::HashMap, fs::File, io::BufReader, path::Path};

use bkpack::{Error, Result, format, train::qat};
use serde::de::IgnoredAny;

use super::QatArgs;
use crate::cli::{
    figure::{DPI, FigureFiles, place},
    refuse_file_of_checkpoint, refuse_same_file, under_option,
};

impl QatArgs {
    /// Refuses outputs that must not be written to; returns the figure's files.
    pub(super) fn check_outputs(&self, partial: &Path) -> Result<Option<FigureFiles>> {
        let force = self.force || self.dry_run;
        let plot = self.plot.as_deref();
        let figure = plot.map(|path| FigureFiles::new("--plot", path, &[], DPI, force)).transpose()?;
        let mut outputs = vec![("--output", self.output.as_path()), ("--output", partial)];
        outputs.extend(self.save_metrics.iter().map(|path| ("--save-metrics", path.as_path())));
        outputs.extend(figure.iter().flat_map(FigureFiles::paths).map(|path| ("--plot", path)));
        for (index, &(option, output)) in outputs.iter().enumerate() {
            self.check_apart((option, output), &outputs[..index])?;
        }

        qat::check_target(&self.output, force)?;
        qat::check_saved(partial)?;
        if partial.exists() && !self.resume && !force {
            let why = "is left from an interrupted training; pass --resume to go on there, or --force to start anew";
            return Err(Error::Training { path: partial.to_owned(), why: why.into() });
        }
        let metrics = self.save_metrics.iter().map(|path| ("--save-metrics", path.as_path(), is_metrics(path)));
        let figures = figure.iter().flat_map(FigureFiles::paths).map(|path| ("--plot", path, false));
        for (option, path, metrics) in metrics.chain(figures) {
            if !metrics {
                let teacher = self.teacher.iter().filter(|teacher| teacher.is_dir());
                let mut models = [&self.source].into_iter().chain(teacher);
                let refused = models.try_for_each(|model| refuse_file_of_checkpoint(model, path));
                refused.map_err(|error| under_option(option, error))?;
            }
            // The metrics of the training that goes on.
            format::check_output(path, force || metrics && self.resume && partial.exists())?;
        }
        Ok(figure)
    }

    /// Refuses an output that is an input, or one of the `others`, or that lies in the folder that is written.
    fn check_apart(&self, (option, output): (&'static str, &Path), others: &[(&'static str, &Path)]) -> Result<()> {
        let refuse = |why: String| Err(Error::Option { option, why });
        let (folder, wanted) = (place(&self.output), place(output));
        if let Some((other, _)) = others.iter().find(|(_, other)| wanted.is_some() && place(other) == wanted) {
            return refuse(format!("{} is what {other} writes, too; choose another name", output.display()));
        }
        let is_in_folder =
            |path: &Path| folder.is_some() && place(path).as_deref().and_then(Path::parent) == folder.as_deref();
        if is_in_folder(output) {
            return refuse(format!("{} lies in the folder that --output writes; choose another", output.display()));
        }
        let models = [Some(self.source.as_path()), self.teacher.as_deref(), self.checkpoint.config()];
        if let Some(model) = models.iter().flatten().find(|model| model.is_file() && is_in_folder(model)) {
            let why = format!("{} lies in the folder that --output writes; choose another", model.display());
            return Err(Error::Option { option: "--output", why });
        }
        let texts = [&self.recipe, &self.text, &self.tokens, &self.val, &self.val_tokens];
        let mut inputs = models.into_iter().chain(texts.map(|path| path.as_deref())).flatten();
        let refused = inputs.try_for_each(|input| refuse_same_file(input, output));
        refused.map_err(|error| under_option(option, error))
    }
}

/// Whether a file holds what `--save-metrics` writes; of one that does not, little is read.
fn is_metrics(path: &Path) -> bool {
    let read = |file| serde_json::from_reader::<_, HashMap<String, IgnoredAny>>(BufReader::new(file)).ok();
    let found = path.is_file().then(|| File::open(path).ok().and_then(read)).flatten();
    let keys = ["encoding", "weights", "options", "validation", "steps"];
    found.is_some_and(|found| keys.iter().all(|&key| found.contains_key(key)))
}
