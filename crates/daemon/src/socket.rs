//! The daemon's socket, for root on this host: where it is, the server's end and the client's end.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::fs::{CWD, Mode, chmodat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

use crate::http::{Client, Connections, PAUSE, Sources};

/// Clients that wait to be accepted.
const BACKLOG: i32 = 64;
/// How long the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of the longest answer: the state of 10,000 peers has 6 MB.
const ANSWER: u64 = 64 << 20;
/// Bytes of the longest event.
const LINE: u64 = 1 << 20;

/// Where the socket is: `flag`, which may be `off` for none, else beside the subnet file. Each subnet file has its own, because each has a
/// daemon of its own.
pub fn path(flag: Option<&Path>, subnet_file: &Path) -> Option<PathBuf> {
    match flag {
        Some(path) if path.as_os_str() == "off" => None,
        Some(path) => Some(path.to_owned()),
        None => Some(beside(subnet_file)),
    }
}

/// The socket of the daemon with this subnet file, unless a flag names another.
pub fn beside(subnet_file: &Path) -> PathBuf {
    match subnet_file.file_name() {
        Some(name) if name != "subnet.env" => subnet_file.with_file_name(format!("flanneld.{}.sock", name.to_string_lossy())),
        _ => subnet_file.with_file_name("flanneld.sock"),
    }
}

/// The server's end.
#[derive(Debug)]
pub struct Listener(UnixListener);

impl Listener {
    /// Binds the socket with mode 0600, in place of one that a dead daemon left. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When another daemon serves it, when another file is there, or when it cannot be made.
    pub fn bind(path: &Path) -> anyhow::Result<Listener> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => bail!("another file is there"),
            Ok(_) => {
                ensure!(UnixStream::connect(path).is_err(), "another program serves it: give this flanneld its own --socket");
                fs::remove_file(path).context("cannot replace the socket of a former flanneld")?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // Until it listens, no client can connect: none does before the mode is right.
        chmodat(CWD, path, Mode::RUSR | Mode::WUSR, rustix::fs::AtFlags::empty())?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Listener(UnixListener::from_std(socket.into())?))
    }

    /// Serves until it is dropped. The file stays: a daemon that is being started may have replaced it.
    pub async fn serve(self, sources: Sources) {
        let mut connections = Connections::new(sources);
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => connections.serve(stream, IpAddr::V4(Ipv4Addr::LOCALHOST), Client::Root).await,
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
}

/// Why the daemon did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No daemon runs.
    #[error("no flanneld answers at {0}: {1}")]
    Absent(String, io::Error),
    /// It runs, and has not finished its start.
    #[error("{0}")]
    Starting(String),
    /// Any other failure.
    #[error("cannot ask flanneld at {0}: {1}")]
    Failed(String, String),
}

/// Asks the daemon and returns the body of its answer.
///
/// # Errors
/// [`AskError`].
pub fn ask(socket: &Path, path: &str) -> Result<String, AskError> {
    let mut body = String::new();
    let failed = |error: io::Error| AskError::Failed(socket.display().to_string(), error.to_string());
    let (status, stream) = request(socket, path)?;
    stream.take(ANSWER).read_to_string(&mut body).map_err(failed)?;
    match status {
        200 => Ok(body),
        503 => Err(AskError::Starting(body.trim().to_owned())),
        status => Err(AskError::Failed(socket.display().to_string(), format!("status {status}: {}", body.trim()))),
    }
}

/// Follows the events: calls `each` with every line, until it returns false or the daemon ends.
///
/// # Errors
/// [`AskError`].
pub fn follow(socket: &Path, mut each: impl FnMut(&str) -> bool) -> Result<(), AskError> {
    let failed = |error: io::Error| AskError::Failed(socket.display().to_string(), error.to_string());
    let (status, mut stream) = request(socket, "/events")?;
    if status != 200 {
        return Err(AskError::Failed(socket.display().to_string(), format!("status {status}")));
    }
    loop {
        let mut line = String::new();
        if (&mut stream).take(LINE).read_line(&mut line).map_err(failed)? == 0 || !each(line.trim_end()) {
            return Ok(());
        }
    }
}

/// Sends a request by HTTP/1.0, whose answer ends with the connection, and reads the head of the answer.
fn request(socket: &Path, path: &str) -> Result<(u16, BufReader<UnixStream>), AskError> {
    let name = || socket.display().to_string();
    let failed = |error: io::Error| AskError::Failed(name(), error.to_string());
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => AskError::Failed(name(), format!("{error} (only root may)")),
        _ => AskError::Absent(name(), error),
    })?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").map_err(failed)?;
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    loop {
        let before = head.len();
        (&mut stream).take(LINE).read_line(&mut head).map_err(failed)?;
        if head.len() == before {
            return Err(AskError::Failed(name(), "it closed the connection".to_owned()));
        }
        if head[before..].trim().is_empty() {
            break;
        }
    }
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or_else(|| AskError::Failed(name(), "no HTTP answer".to_owned()))?, stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use flannel::check::Finding;
    use tokio::sync::watch;

    use crate::ready::Ready;
    use crate::state::Process;
    use crate::view::View;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("flannel-socket-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn sources() -> (watch::Sender<Arc<View>>, Sources) {
        let (publish, view) = watch::channel(Arc::default());
        let paths = watch::channel(Arc::default()).1;
        (publish, Sources { ready: Ready::default(), view, paths, process: Arc::new(Process::now(true)) })
    }

    #[test]
    fn each_subnet_file_has_its_own_socket() {
        let at = |file: &str| path(None, Path::new(file)).unwrap().display().to_string();
        assert_eq!(at("/run/flannel/subnet.env"), "/run/flannel/flanneld.sock");
        assert_eq!(at("/run/flannel/other.env"), "/run/flannel/flanneld.other.env.sock");
        assert_eq!(path(Some(Path::new("off")), Path::new("/run/flannel/subnet.env")), None);
        assert_eq!(path(Some(Path::new("/x.sock")), Path::new("/y")), Some("/x.sock".into()));
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let folder = folder("replace");
        let path = folder.join("flanneld.sock");
        let living = Listener::bind(&path).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o777, meta.uid()), (0o600, rustix::process::geteuid().as_raw()));
        assert!(Listener::bind(&path).unwrap_err().to_string().contains("another program serves it"));
        drop(living);
        assert!(matches!(ask(&path, "/state").unwrap_err(), AskError::Absent(..)));
        let _again = Listener::bind(&path).unwrap();
        let file = folder.join("file");
        fs::write(&file, "x").unwrap();
        assert!(Listener::bind(&file).unwrap_err().to_string().contains("another file"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
        fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn state_is_answered_and_events_follow() {
        let folder = folder("events");
        let path = folder.join("flanneld.sock");
        let (publish, sources) = sources();
        tokio::spawn(Listener::bind(&path).unwrap().serve(sources));
        let asked = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || ask(&path, "/state").unwrap_err()).await.unwrap()
        };
        assert!(matches!(asked, AskError::Starting(_)), "{asked}");
        let (send, mut lines) = tokio::sync::mpsc::unbounded_channel();
        let reader = tokio::task::spawn_blocking(move || {
            follow(&path, |line| {
                send.send(line.to_owned()).unwrap();
                line.is_empty()
            })
        });
        assert_eq!(lines.recv().await.unwrap(), "", "it has begun");
        let findings = vec![Finding::warning("x", "a\u{1b}[31mproblem".to_owned(), "")];
        publish.send_replace(Arc::new(View { findings, ..View::default() }));
        let line = lines.recv().await.unwrap();
        assert!(
            line.starts_with(r#"{"time":"20"#)
                && line.ends_with(r#""type":"finding","action":"began","subject":"x","text":"a\u001b[31mproblem"}"#),
            "{line}"
        );
        reader.await.unwrap().unwrap();
        fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_is_disconnected() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let folder = folder("slow");
        let path = folder.join("flanneld.sock");
        let (publish, sources) = sources();
        tokio::spawn(Listener::bind(&path).unwrap().serve(sources));
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"GET /events HTTP/1.0\r\n\r\n").await.unwrap();
        let mut first = [0; 16];
        stream.read_exact(&mut first).await.unwrap();
        tokio::time::pause();
        // Until the kernel's buffers are full, and then for STALLED.
        for round in 0..30 {
            let findings = vec![Finding::warning("x", format!("{round}{}", "x".repeat(50_000)), "")];
            publish.send_replace(Arc::new(View { findings, ..View::default() }));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_secs(11)).await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert!(rest.len() < 2_000_000, "{}", rest.len());
        fs::remove_dir_all(folder).unwrap();
    }
}
