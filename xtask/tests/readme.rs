//! The texts that README's table quotes are those that the programs print.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true if !path.ends_with("tests") => sources(&path, found),
            true => {}
            false if path.extension().is_some_and(|extension| extension == "rs") => found.push(path),
            false => {}
        }
    }
}

/// Source text with the strings as they are printed: without line ends that the compiler removes, and without escapes.
fn printed(source: &str) -> String {
    let mut lines = source.lines();
    let mut text = String::new();
    while let Some(line) = lines.next() {
        let mut line = line;
        while let (Some(start), Some(next)) = (line.strip_suffix('\\'), lines.clone().next()) {
            text.push_str(start);
            lines.next();
            line = next.trim_start();
        }
        text.push_str(line);
        text.push('\n');
    }
    text.replace("\\\"", "\"")
}

/// The quoted texts of the first column of the table, in parts that hold nothing variable.
fn quoted(readme: &str) -> Vec<String> {
    let (_, table) = readme.split_once("| You see | It means |").unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    let columns = rows.map(|row| row.split(" | ").next().unwrap());
    let texts = columns.flat_map(|column| column.split('`').skip(1).step_by(2));
    texts.flat_map(|text| text.split('…')).map(|part| part.trim().to_owned()).filter(|part| part.len() > 5).collect()
}

#[test]
fn texts_of_the_table_are_printed_by_the_programs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    sources(&root.join("crates"), &mut files);
    let sources: String = files.iter().map(|file| printed(&std::fs::read_to_string(file).unwrap())).collect();
    let parts = quoted(&std::fs::read_to_string(root.join("README.md")).unwrap());
    assert!(parts.len() > 15, "{parts:?}");
    // The path of a sysctl, of /readyz and of a file are no texts.
    let is_text = |part: &&String| !part.contains('/');
    let missing: Vec<&String> = parts.iter().filter(is_text).filter(|part| !sources.contains(part.as_str())).collect();
    assert!(missing.is_empty(), "README quotes texts that no source has: {missing:#?}");
}
