//! The text files of the checkout.

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Folders that hold nothing of the project's own text.
const SKIPPED: [&str; 7] = ["target", ".git", "corpus", "artifacts", "coverage", "node_modules", "mutants.out"];

/// A text file: its path from the project's root with `/`, and its lines.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    /// Was this file written by a program?
    pub(crate) fn is_generated(&self) -> bool {
        self.text.lines().next().is_some_and(|line| line.contains("@generated"))
    }
}

/// All files that `wanted` accepts by their path, in the order of their paths.
pub(crate) fn sources(wanted: impl Fn(&str) -> bool) -> anyhow::Result<Vec<Source>> {
    let (mut files, mut folders) = (Vec::new(), vec![PathBuf::from(".")]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
            let entry = entry?;
            let (path, kind) = (entry.path(), entry.file_type()?);
            if kind.is_dir() && !SKIPPED.iter().any(|name| path.ends_with(name)) {
                folders.push(path);
            } else if kind.is_file() {
                let path = name(&path);
                if wanted(&path) {
                    files.push(path);
                }
            }
        }
    }
    files.sort();
    let mut sources = Vec::new();
    for path in files {
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {path}"))?;
        // An image or an archive has no words and no lines.
        if let Ok(text) = String::from_utf8(bytes) {
            sources.push(Source { path, text });
        }
    }
    Ok(sources)
}

fn name(path: &Path) -> String {
    path.strip_prefix(".").unwrap_or(path).to_string_lossy().into_owned()
}
