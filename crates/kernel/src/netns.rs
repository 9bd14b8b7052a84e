//! Network namespaces. Each thread is in one; a descriptor refers to one, and two descriptors refer to the same one if device and inode
//! are equal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::LinkNameSpaceType;

use crate::sys;

/// An open network namespace, which exists at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// Opens the network namespace at a path, such as `/var/run/netns/x` or `/proc/7/ns/net`.
    ///
    /// # Errors
    /// When the path does not exist or is not a network namespace.
    pub fn open(path: &Path) -> io::Result<Netns> {
        let file = File::open(path)?;
        if !sys::is_network_namespace(file.as_fd()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a network namespace"));
        }
        Ok(Netns { file })
    }

    /// The calling thread's network namespace.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> io::Result<Netns> {
        Netns::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Creates a network namespace with `lo` down. The calling thread stays in its namespace.
    ///
    /// # Errors
    /// When the privilege is missing (`CAP_SYS_ADMIN`).
    pub fn create() -> io::Result<Netns> {
        let home = Netns::current()?;
        sys::unshare(libc::CLONE_NEWNET)?;
        let new = Netns::current();
        home.enter_or_abort();
        new
    }

    /// Device and inode, which identify the namespace.
    ///
    /// # Errors
    /// When the descriptor cannot be read.
    pub fn id(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Runs a function with the calling thread in this namespace, and then returns to the thread's namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered. If the thread cannot return, the process is aborted: to continue in the wrong namespace
    /// would be worse.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        struct Home(Netns);
        impl Drop for Home {
            fn drop(&mut self) {
                self.0.enter_or_abort();
            }
        }
        let home = Netns::current()?;
        rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
        // From here on: a thread that may not enter a namespace has not left its own, and could not enter that one either.
        let home = Home(home);
        let result = f();
        drop(home);
        Ok(result)
    }

    fn enter_or_abort(&self) {
        if rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network)).is_err() {
            std::process::abort();
        }
    }

    /// Names the namespace in the file system: creates `path` and bind-mounts the namespace on it.
    ///
    /// # Errors
    /// When the file cannot be created or mounted on.
    pub fn bind(&self, path: &Path) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        File::create(path)?;
        let source = PathBuf::from(format!("/proc/thread-self/fd/{}", self.file.as_raw_fd()));
        Ok(rustix::mount::mount_bind(&source, path)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Removes a name that [`Netns::bind`] created.
///
/// # Errors
/// When the path is not mounted or cannot be removed.
pub fn unbind(path: &Path) -> io::Result<()> {
    rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)?;
    std::fs::remove_file(path)
}

/// Moves the calling process into the user namespace of another process of the same user, into the mount namespace that the other
/// process has open as descriptor `mounts`, and into the network namespace at the path `network` there. Must be called while the process
/// has one thread.
///
/// # Errors
/// When the other process has ended, or belongs to another user.
pub fn join(pid: u32, mounts: i32, network: &Path) -> io::Result<()> {
    let (user, mount) = (File::open(format!("/proc/{pid}/ns/user"))?, File::open(format!("/proc/{pid}/fd/{mounts}"))?);
    let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
    // Entering the own user namespace is an error.
    if id(&user)? != id(&File::open("/proc/self/ns/user")?)? {
        rustix::thread::move_into_link_name_space(user.as_fd(), Some(LinkNameSpaceType::User))?;
    }
    rustix::thread::move_into_link_name_space(mount.as_fd(), Some(LinkNameSpaceType::Mount))?;
    let network = Netns::open(network)?;
    Ok(rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Moves the calling process into new mount and network namespaces and, unless it is root already, into a new user namespace in which
/// it is root; then mounts a private tmpfs at `scratch`. Everything created there disappears with the last process in the namespaces.
///
/// Must be called while the process has one thread.
///
/// # Errors
/// When the system forbids it; the text names the setting to change.
pub fn isolate(scratch: &Path) -> io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let advice = |error: io::Error| {
        let text = format!(
            "cannot create namespaces: {error}. Run as root, or allow unprivileged user namespaces \
             (sysctl user.max_user_namespaces > 0, kernel.unprivileged_userns_clone = 1, kernel.apparmor_restrict_unprivileged_userns = 0)"
        );
        io::Error::new(error.kind(), text)
    };
    if uid.is_root() {
        sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET).map_err(advice)?;
    } else {
        sys::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET).map_err(advice)?;
        let write = |name: &str, text: String| std::fs::write(format!("/proc/self/{name}"), text).map_err(advice);
        write("setgroups", "deny".to_owned())?;
        write("uid_map", format!("0 {} 1", uid.as_raw()))?;
        write("gid_map", format!("0 {} 1", gid.as_raw()))?;
    }
    // Without this, new mounts would propagate outside if `/` is a shared mount.
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    rustix::mount::mount("tmpfs", scratch, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=755"))?;
    Ok(())
}
