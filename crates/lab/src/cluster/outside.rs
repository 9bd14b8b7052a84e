//! The connection to a store outside of the lab's namespaces: a helper process that stays outside connects and passes the
//! sockets in (unix(7), `SCM_RIGHTS`). It leaves nothing in the file system.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::Context;
use kernel::netns::Netns;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The socket to the helper process.
static OUTSIDE: OnceLock<UnixStream> = OnceLock::new();

/// Starts the helper process. Must be called before [`crate::isolate`].
pub(crate) fn prepare(program: &std::path::Path) -> anyhow::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command.args(["lab", "outside"]).stdin(Stdio::from(OwnedFd::from(theirs)));
    kernel::process::die_with_parent(&mut command);
    command.spawn().context("cannot start the helper process that connects to --etcd")?;
    OUTSIDE.set(ours).ok().context("the helper process was started twice")
}

/// The helper process: for each target that it reads from its standard input, it sends back a connection.
pub(crate) fn serve() -> anyhow::Result<()> {
    let line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut reader = &line;
    loop {
        let mut length = [0];
        if reader.read(&mut length)? == 0 {
            return Ok(());
        }
        let mut target = vec![0; usize::from(length[0])];
        reader.read_exact(&mut target)?;
        let connected = String::from_utf8(target).ok().and_then(|target| TcpStream::connect(target).ok());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = connected.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(&line, &[IoSlice::new(&[u8::from(connected.is_some())])], &mut control, SendFlags::empty())?;
    }
}

fn connect(target: &str) -> anyhow::Result<TcpStream> {
    let mut line = OUTSIDE.get().context("the helper process was not started")?;
    let length = u8::try_from(target.len()).context("--etcd: the address is too long")?;
    line.write_all(&[&[length], target.as_bytes()].concat())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut answer = [0];
    recvmsg(line, &mut [IoSliceMut::new(&mut answer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(TcpStream::from(fd));
        }
    }
    anyhow::bail!("--etcd: cannot connect to {target}")
}

/// Listens at the address of the lab's store and forwards to the target outside, for the rest of the process's life.
pub(super) fn forward(middle: &Netns, target: &str) -> anyhow::Result<()> {
    drop(connect(target)?);
    let listener = middle.run(|| TcpListener::bind(super::STORE))??;
    let target = target.to_owned();
    std::thread::spawn(move || {
        for inside in listener.incoming().flatten() {
            if let Ok(outside) = connect(&target) {
                let _ = join(inside, outside);
            }
        }
    });
    Ok(())
}

/// Copies both ways until either side ends.
fn join(inside: TcpStream, outside: TcpStream) -> io::Result<()> {
    for (mut from, mut to) in [(inside.try_clone()?, outside.try_clone()?), (outside, inside)] {
        std::thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    Ok(())
}
