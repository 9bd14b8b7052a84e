//! The archive from which the guest's kernel fills its root file system: the "newc" format of cpio.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, ensure};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Directory(u32),
    /// A symbolic link and its target.
    Link(PathBuf),
    /// A file of this machine.
    Copy(PathBuf),
    /// A file that is written here, with its permissions.
    Text(String, u32),
}

/// The files of the guest, by their absolute paths.
#[derive(Debug, Default)]
pub(super) struct Archive(BTreeMap<PathBuf, Entry>);

impl Archive {
    /// Is there an entry at this path?
    pub(super) fn has(&self, path: &Path) -> bool {
        self.0.contains_key(path)
    }

    /// Adds a directory, and the directories above it.
    pub(super) fn directory(&mut self, path: &Path, mode: u32) {
        self.parents(path);
        self.0.entry(path.to_owned()).or_insert(Entry::Directory(mode));
    }

    /// Adds a file with this text.
    pub(super) fn text(&mut self, path: &Path, text: String, mode: u32) {
        self.parents(path);
        self.0.insert(path.to_owned(), Entry::Text(text, mode));
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &Path, target: &Path) {
        self.parents(path);
        self.0.insert(path.to_owned(), Entry::Link(target.to_owned()));
    }

    /// Adds `source` at `path`.
    pub(super) fn copy(&mut self, source: &Path, path: &Path) {
        self.parents(path);
        self.0.insert(path.to_owned(), Entry::Copy(source.to_owned()));
    }

    /// Adds a file, a symbolic link with its target, or a directory with all that it has, at the path that it has on this
    /// machine. Links among the directories above become links too, so that each path of this machine leads to it.
    pub(super) fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        ensure!(path.is_absolute(), "{} is no absolute path", path.display());
        let context = || format!("cannot add {} to the guest", path.display());
        let mut place = PathBuf::from("/");
        let mut rest: Vec<Component<'_>> = path.components().skip(1).collect();
        rest.reverse();
        while let Some(part) = rest.pop() {
            let below = place.join(part);
            if std::fs::symlink_metadata(&below).with_context(context)?.is_symlink() {
                let target = std::fs::read_link(&below).with_context(context)?;
                self.link(&below, &target);
                let whole: PathBuf = [place.join(target)].into_iter().chain(rest.iter().rev().map(PathBuf::from)).collect();
                return self.add(&plain(&whole));
            }
            place = below;
        }
        if place.is_dir() {
            self.directory(&place, std::fs::metadata(&place).with_context(context)?.permissions().mode() & 0o7777);
            for entry in std::fs::read_dir(&place).with_context(context)? {
                self.add(&entry.with_context(context)?.path())?;
            }
        } else if place.is_file() {
            self.copy(&place, &place);
        }
        Ok(())
    }

    fn parents(&mut self, path: &Path) {
        for parent in path.ancestors().skip(1).filter(|parent| *parent != Path::new("/")) {
            self.0.entry(parent.to_owned()).or_insert(Entry::Directory(0o755));
        }
    }

    /// Writes the archive. Returns its size.
    pub(super) fn write(&self, file: &Path) -> anyhow::Result<u64> {
        let context = || format!("cannot write {}", file.display());
        let mut output = Output { file: BufWriter::new(File::create(file).with_context(context)?), written: 0, inode: 0 };
        for (path, entry) in &self.0 {
            let name = path.strip_prefix("/").unwrap_or(path);
            output.entry(name, entry).with_context(|| format!("cannot add {} to the guest", path.display()))?;
        }
        output.header("TRAILER!!!".as_bytes(), 0, 0).with_context(context)?;
        output.file.flush().with_context(context)?;
        Ok(output.written)
    }
}

/// Removes `.` and `..` from a path, whose links are none.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

struct Output {
    file: BufWriter<File>,
    written: u64,
    inode: u32,
}

impl Output {
    fn entry(&mut self, name: &Path, entry: &Entry) -> io::Result<()> {
        let name = name.as_os_str().as_bytes();
        match entry {
            Entry::Directory(mode) => self.header(name, DIRECTORY | mode, 0),
            Entry::Link(target) => {
                let target = target.as_os_str().as_bytes();
                self.header(name, SYMLINK | 0o777, target.len() as u64)?;
                self.data(target, target.len() as u64)
            }
            Entry::Text(text, mode) => {
                self.header(name, REGULAR | mode, text.len() as u64)?;
                self.data(text.as_bytes(), text.len() as u64)
            }
            Entry::Copy(source) => {
                let source = File::open(source)?;
                let metadata = source.metadata()?;
                self.header(name, REGULAR | (metadata.permissions().mode() & 0o7777), metadata.len())?;
                self.data(source, metadata.len())
            }
        }
    }

    /// Writes an entry's header and name. All files belong to root.
    fn header(&mut self, name: &[u8], mode: u32, size: u64) -> io::Result<()> {
        let size = u32::try_from(size).map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "the file has more than 4 GiB"))?;
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        self.inode += 1;
        let mut header = b"070701".to_vec();
        for number in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            header.extend(format!("{number:08x}").bytes());
        }
        header.extend(name);
        header.push(0);
        self.data(header.as_slice(), header.len() as u64)
    }

    /// Writes data, up to the next multiple of four bytes.
    fn data(&mut self, data: impl io::Read, size: u64) -> io::Result<()> {
        let copied = io::copy(&mut data.take(size), &mut self.file)?;
        if copied != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was read"));
        }
        self.written += size;
        while !self.written.is_multiple_of(4) {
            self.file.write_all(&[0])?;
            self.written += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive: path, mode and data of each entry.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let (mut entries, mut at) = (Vec::new(), 0);
        loop {
            let number = |field: usize| {
                let start = at + 6 + 8 * field;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (number(1), number(6) as usize, number(11) as usize);
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            at = (data + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(at, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[data..data + size].to_vec()));
        }
    }

    #[test]
    fn links_on_the_way_to_a_file_are_kept() {
        let folder = std::env::temp_dir().canonicalize().unwrap().join(format!("xtask-cpio-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("real/deep")).unwrap();
        std::fs::write(folder.join("real/deep/file"), "five!").unwrap();
        std::os::unix::fs::symlink("real/deep", folder.join("short")).unwrap();
        std::os::unix::fs::symlink("../short/file", folder.join("real/name")).unwrap();
        let mut archive = Archive::default();
        archive.add(&folder.join("real/name")).unwrap();
        archive.text(Path::new("/init"), "#!/bin/sh\n".to_owned(), 0o755);
        assert!(archive.has(&folder.join("real/deep/file")));
        let file = folder.join("archive");
        let size = archive.write(&file).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(bytes.len() as u64, size);
        let entries = read(&bytes);
        let get = |path: &Path| {
            let name = path.strip_prefix("/").unwrap().to_str().unwrap();
            let (_, mode, data) = entries.iter().find(|entry| entry.0 == name).unwrap();
            (*mode, String::from_utf8(data.clone()).unwrap())
        };
        assert_eq!(get(&folder.join("real/name")), (0o120_777, "../short/file".to_owned()));
        assert_eq!(get(&folder.join("short")), (0o120_777, "real/deep".to_owned()));
        assert_eq!(get(&folder.join("real/deep/file")).1, "five!");
        assert_eq!(get(&folder.join("real")), (0o040_755, String::new()));
        assert_eq!(get(Path::new("/init")), (0o100_755, "#!/bin/sh\n".to_owned()));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn missing_file_is_named() {
        let error = Archive::default().add(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
