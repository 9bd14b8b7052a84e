//! Container runtimes in tests: a sandbox of processes and mounts, and an image made by hand.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kernel::netns::Netns;
use kernel::process;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Process and mount namespaces whose first process is a shell that waits.
pub(crate) struct Sandbox {
    unshare: Child,
    /// The first process, as it is numbered outside.
    pid: u32,
}

impl Sandbox {
    pub(crate) fn new() -> Sandbox {
        let mut command = Command::new("unshare");
        // A folder of its own for what has a fixed place.
        let script =
            "for d in /opt /run /var/lib /var/log; do mount -t tmpfs none $d; done; mkdir -p /opt/cni/bin; echo up; exec sleep infinity";
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", script]);
        process::die_with_parent(&mut command);
        let mut unshare = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(unshare.stdout.take().unwrap()), &mut line).unwrap();
        assert_eq!(line, "up\n");
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", unshare.id())).unwrap();
        Sandbox { unshare, pid: children.trim().parse().unwrap() }
    }

    /// A shell's script in here, on a host of the lab.
    pub(crate) fn shell(&self, host: &Path, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid.to_string(), "-p", "-m"]).arg(format!("--net={}", host.display())).args(["sh", "-ec", script]);
        command.stdin(Stdio::null());
        command
    }

    #[track_caller]
    pub(crate) fn run(&self, host: &Path, script: &str) -> String {
        let output = self.shell(host, script).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{script}\n{text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// The network namespace of a process that is numbered in here.
    pub(crate) fn netns(&self, pid: &str) -> Netns {
        Netns::open(Path::new(&format!("/proc/{}/root/proc/{pid}/ns/net", self.pid))).unwrap()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The first process takes all others along.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        // What is left of their cgroups is empty folders, once the kernel has let the last process go.
        for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let folder = controller.path().join(cgroup());
            for _ in 0..200 {
                remove_folders(&folder);
                if !folder.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// The cgroup of all containers of this test process.
pub(crate) fn cgroup() -> String {
    format!("flannel-test-{}", std::process::id())
}

fn remove_folders(folder: &Path) {
    for inner in std::fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_folders(&inner.path());
    }
    let _ = std::fs::remove_dir(folder);
}

/// A container image in OCI's layout with nothing in it but busybox, as a tar file.
pub(crate) fn image(folder: &Path) -> PathBuf {
    let blobs = folder.join("image/blobs/sha256");
    let root = folder.join("rootfs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed by `cargo xtask test`");
    let tar = |from: &Path, to: &Path| {
        assert!(Command::new("tar").arg("-C").arg(from).arg("-cf").arg(to).arg(".").status().unwrap().success());
    };
    tar(&root, &folder.join("layer.tar"));
    let blob = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(blobs.join(&digest), bytes).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let layer = blob(&std::fs::read(folder.join("layer.tar")).unwrap());
    let config = json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/busybox", "sleep", "100000"] },
        "rootfs": { "type": "layers", "diff_ids": [layer.0] } });
    let config = blob(config.to_string().as_bytes());
    let oci = "application/vnd.oci.image";
    let manifest = json!({ "schemaVersion": 2, "mediaType": format!("{oci}.manifest.v1+json"),
        "config": { "mediaType": format!("{oci}.config.v1+json"), "digest": config.0, "size": config.1 },
        "layers": [{ "mediaType": format!("{oci}.layer.v1.tar"), "digest": layer.0, "size": layer.1 }] });
    let manifest = blob(manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [{ "mediaType": format!("{oci}.manifest.v1+json"), "digest": manifest.0, "size": manifest.1,
        "annotations": { "io.containerd.image.name": "localhost/pod:1", "org.opencontainers.image.ref.name": "1" } }] });
    std::fs::write(folder.join("image/index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("image/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let file = folder.join("image.tar");
    tar(&folder.join("image"), &file);
    file
}
