//! Mount namespaces: a host of the lab has a `/run` of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags};
use rustix::thread::LinkNameSpaceType;

use crate::sys;

/// A mount namespace, kept alive.
#[derive(Debug)]
pub struct Mounts {
    file: File,
}

impl Mounts {
    /// Copies the calling process's mount namespace and lets `prepare` mount what differs. The caller stays where it is.
    ///
    /// # Errors
    /// When the privilege is missing (`CAP_SYS_ADMIN`), or `prepare` fails.
    pub fn create(prepare: impl FnOnce() -> io::Result<()> + Send) -> io::Result<Mounts> {
        on_a_thread(|| {
            sys::unshare(libc::CLONE_NEWNS)?;
            prepare()?;
            Ok(Mounts { file: File::open("/proc/thread-self/ns/mnt")? })
        })
    }

    /// Runs a function on a thread in this mount namespace. The thread begins in the caller's network namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_a_thread(|| {
            // A thread that shares its working directory with others cannot change its mount namespace.
            sys::unshare(libc::CLONE_FS)?;
            rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Mount))?;
            Ok(f())
        })
    }

    /// Lets the command start in this mount namespace.
    ///
    /// # Errors
    /// When there is no free descriptor.
    pub fn enter(&self, command: &mut Command) -> io::Result<()> {
        sys::enter_mount_namespace(command, self.file.as_fd().try_clone_to_owned()?);
        Ok(())
    }

    /// The number of the descriptor: another process of this user reaches the namespace by `/proc/PID/fd/NUMBER`.
    pub fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn on_a_thread<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(f).join().map_err(|_| io::Error::other("the thread in the mount namespace panicked"))?)
}

/// Mounts an empty tmpfs.
///
/// # Errors
/// When the kernel refuses.
pub fn tmpfs(path: &std::path::Path) -> io::Result<()> {
    Ok(rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=755"))?)
}

/// Makes `path` show `source` as well, with all that is mounted below it.
///
/// # Errors
/// When the kernel refuses.
pub fn bind(source: &std::path::Path, path: &std::path::Path) -> io::Result<()> {
    Ok(rustix::mount::mount_bind_recursive(source, path)?)
}

/// A copy of a directory tree with all that is mounted below it, attached nowhere yet.
///
/// # Errors
/// When the kernel refuses.
pub fn detached(source: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(rustix::fs::CWD, source, flags)?)
}

/// Mounts a copy from [`detached`].
///
/// # Errors
/// When the kernel refuses.
pub fn attach(tree: &OwnedFd, path: &std::path::Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(tree, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Lets what is mounted below `path` from now on appear in later copies of this mount namespace too, and the other way round.
///
/// # Errors
/// When the kernel refuses.
pub fn share(path: &std::path::Path) -> io::Result<()> {
    Ok(rustix::mount::mount_change(path, MountPropagationFlags::SHARED)?)
}
