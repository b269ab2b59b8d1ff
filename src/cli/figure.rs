//! The files of a figure: which ones a name stands for, and writing all of them or none.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use bkpack::{
    Error, Result,
    error::long,
    format::{check_output, persist, temporary_beside},
    report::figure::{Figure, Format},
};

use super::{refuse_file_of_checkpoint, refuse_same_file, under_option};

/// Dots per inch where the user names none.
pub const DPI: u16 = 300;

/// The files that a figure is written to.
pub struct FigureFiles {
    option: &'static str,
    files: Vec<(Format, PathBuf)>,
    dpi: u16,
    force: bool,
}

impl FigureFiles {
    /// `output` with each of `formats` (or with its own extension, or as PDF) and a PNG preview, checked before any work.
    ///
    /// # Errors
    /// [`Error::Option`] for an extension of another kind of picture; what [`check_output`] refuses.
    pub fn new(option: &'static str, output: &Path, formats: &[Format], dpi: u16, force: bool) -> Result<Self> {
        let extension = output.extension().map(|extension| extension.to_string_lossy().into_owned());
        let own = extension.as_deref().and_then(|extension| extension.parse::<Format>().ok());
        let other = ["jpg", "jpeg", "gif", "tif", "tiff", "webp", "bmp", "ps", "html", "json"];
        if let Some(extension) = extension.filter(|extension| other.contains(&extension.to_lowercase().as_str())) {
            let why = format!("a figure is written as pdf, svg, png or eps, not {}", long(&extension));
            return Err(Error::Option { option, why });
        }
        let stem = if own.is_some() { output.with_extension("") } else { output.to_owned() };
        if stem.file_name().is_none() {
            return Err(Error::Option { option, why: format!("{} names no file", output.display()) });
        }
        let mut formats = if formats.is_empty() { vec![own.unwrap_or(Format::Pdf)] } else { formats.to_vec() };
        formats.push(Format::Png);
        formats.sort_unstable();
        formats.dedup();
        let files: Vec<(Format, PathBuf)> = formats
            .into_iter()
            .map(|format| {
                // Not with_extension: a name such as `llama-1.1b` has no extension.
                let mut path = stem.clone().into_os_string();
                path.push(format!(".{}", format.name()));
                (format, path.into())
            })
            .collect();
        for (_, path) in &files {
            check_output(path, force)?;
        }
        Ok(Self { option, files, dpi, force })
    }

    /// The paths.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(_, path)| path.as_path())
    }

    /// Refuses to write a figure over the file that it shows.
    pub fn refuse_input(&self, input: &Path) -> Result<()> {
        let refused = self.paths().try_for_each(|path| refuse_same_file(input, path));
        refused.map_err(|error| under_option(self.option, error))
    }

    /// Refuses to write a figure over a file of the checkpoint it shows.
    pub fn refuse_files_of(&self, checkpoint: &Path) -> Result<()> {
        let refused = self.paths().try_for_each(|path| refuse_file_of_checkpoint(checkpoint, path));
        refused.map_err(|error| under_option(self.option, error))
    }

    /// Refuses a figure whose files include another output of the same command, which may not exist yet.
    pub fn refuse_other_output(&self, output: &Path) -> Result<()> {
        let Some(same) = self.paths().find(|path| place(path) == place(output)) else { return Ok(()) };
        let why = format!("{} is another output of this command, not a figure", same.display());
        Err(Error::Option { option: self.option, why })
    }

    /// Writes all files and `more` beside them, or none if one cannot be drawn or its folder takes no files.
    pub fn write(&self, figure: &Figure, more: &[(PathBuf, Vec<u8>)]) -> Result<()> {
        let mut contents = more.to_vec();
        for (format, path) in &self.files {
            contents.push((path.clone(), figure.render(*format, self.dpi)?));
        }
        let mut written = Vec::new();
        for (path, bytes) in &contents {
            let mut temporary = temporary_beside(path)?;
            temporary.write_all(bytes).map_err(Error::io(path))?;
            written.push((temporary, path));
        }
        written.into_iter().try_for_each(|(temporary, path)| persist(temporary, path, self.force))
    }
}

/// Where a file is or would be: its folder may be reached in several ways, and it may be a link.
pub fn place(path: &Path) -> Option<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    path.canonicalize().ok().or_else(|| Some(folder.canonicalize().ok()?.join(path.file_name()?)))
}
