//! A tar archive (the format ustar of POSIX), compressed by gzip, of a limited size.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

/// Bytes of the largest file in the archive; the rest is cut off.
pub(super) const FILE: usize = 1 << 20;
/// Bytes of all files together. What cannot be compressed stays as large, so the archive is smaller than 10 MB in any case.
pub(super) const WHOLE: usize = 9 << 20;
/// The end of a text that was cut off.
pub(super) const CUT: &str = "\n… cut off …\n";
/// The unit of a tar archive.
const BLOCK: usize = 512;

/// An archive in memory.
#[derive(Debug)]
pub(super) struct Archive {
    encoder: GzEncoder<Vec<u8>>,
    /// The folder in which all files are.
    folder: String,
    /// Seconds since 1970.
    time: u64,
    left: usize,
    /// Files that were left out because the archive was full.
    pub(super) omitted: Vec<String>,
}

impl Archive {
    pub(super) fn new(folder: &str, time: u64) -> Archive {
        let encoder = GzEncoder::new(Vec::new(), Compression::default());
        Archive { encoder, folder: folder.to_owned(), time, left: WHOLE, omitted: Vec::new() }
    }

    /// Adds a file.
    pub(super) fn add(&mut self, name: &str, text: &str) -> io::Result<()> {
        let text = cut(text, FILE);
        let size = text.len().div_ceil(BLOCK) * BLOCK + BLOCK;
        if size > self.left {
            self.omitted.push(name.to_owned());
            return Ok(());
        }
        self.left -= size;
        self.encoder.write_all(&header(&format!("{}/{name}", self.folder), text.len(), self.time))?;
        self.encoder.write_all(text.as_bytes())?;
        self.encoder.write_all(&[0; BLOCK][..text.len().div_ceil(BLOCK) * BLOCK - text.len()])
    }

    /// The compressed archive.
    pub(super) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.encoder.write_all(&[0; 2 * BLOCK])?;
        self.encoder.finish()
    }
}

/// A text of at most so many bytes, with a line at its end that says if the rest was cut off.
fn cut(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    format!("{}{CUT}", &text[..text.floor_char_boundary(most - CUT.len())])
}

/// The header of a file: a field each for name, mode, owner, group, size, time, checksum and type, numbers in octal.
fn header(name: &str, size: usize, time: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    // Longer names than a field has do not occur: this program chooses them.
    put(0, &name[..name.floor_char_boundary(100)]);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{size:011o}\0"));
    put(136, &format!("{time:011o}\0"));
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// The listing of an archive by tar.
    fn listing(archive: &[u8], options: &str) -> String {
        let mut tar = Command::new("tar").args([options, "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut stdin, bytes) = (tar.stdin.take().unwrap(), archive.to_vec());
        let writer = std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
        let output = tar.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn tar_reads_the_archive() {
        let mut archive = Archive::new("report", 1_000_000_000);
        archive.add("a.txt", "text of a\n").unwrap();
        archive.add("kernel/b.txt", &"b".repeat(1024)).unwrap();
        archive.add("empty", "").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(listing(&bytes, "tzf"), "report/a.txt\nreport/kernel/b.txt\nreport/empty\n");
        assert_eq!(listing(&bytes, "xOzf"), format!("text of a\n{}", "b".repeat(1024)));
    }

    #[test]
    fn archive_is_smaller_than_10_mb_whatever_is_added() {
        let mut archive = Archive::new("report", 0);
        // Random letters, so that gzip saves little.
        let noise: String = (0..FILE + 1000).map(|_| char::from(fastrand::u8(b' '..=b'~'))).collect();
        for n in 0..30 {
            archive.add(&format!("{n}"), &noise).unwrap();
        }
        assert_eq!((archive.omitted.len(), archive.omitted[0].as_str()), (22, "8"));
        let bytes = archive.finish().unwrap();
        assert!(bytes.len() < 10_000_000, "{}", bytes.len());
        assert!(listing(&bytes, "tzvf").lines().all(|line| line.contains(" 1048576 ")));
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        let cut_off = cut(&"é".repeat(100), 101);
        assert!(cut_off.len() <= 101 && cut_off.ends_with("é\n… cut off …\n"), "{cut_off}");
        assert_eq!(cut("short", 101), "short");
    }
}
