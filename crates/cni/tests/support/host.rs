//! A host for plugins, shared by several test programs; each uses what it needs of it.

#![allow(dead_code, clippy::allow_attributes, reason = "each test program uses a part")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kernel::link;
use kernel::netlink::{Protocol, Socket};
use kernel::netns::{self, Netns};
use serde_json::{Value, json};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_flannel-cni");

/// A host to call plugins on: a namespace, the plugins' directory, a place for files.
pub(crate) struct Host {
    pub(crate) root: PathBuf,
    pub(crate) netns: Netns,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Also when the test fails: the kernel gives the number of a namespace that has ended to another.
        let _ = self.netns.run(kernel::pod_rules::clear);
    }
}

impl Host {
    pub(crate) fn new(name: &str) -> Host {
        let root = Path::new("/mnt").join(name);
        std::fs::create_dir_all(root.join("bin")).unwrap();
        for plugin in cni::NAMES {
            std::os::unix::fs::symlink(PROGRAM, root.join("bin").join(plugin)).unwrap();
        }
        let host = Host { root, netns: Netns::create().unwrap() };
        host.netns.run(kernel::pod_rules::clear).unwrap();
        host.subnet_env(true);
        host
    }

    pub(crate) fn tear_down(&self) {
        for file in std::fs::read_dir(&self.root).unwrap().flatten() {
            if file.file_name().to_string_lossy().starts_with("ns-") {
                netns::unbind(&file.path()).unwrap();
            }
        }
        std::fs::remove_dir_all(&self.root).unwrap();
    }

    pub(crate) fn subnet_env(&self, ip_masq: bool) {
        let text = format!("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ={ip_masq}\n");
        std::fs::write(self.root.join("subnet.env"), text).unwrap();
    }

    pub(crate) fn pod(&self, id: &str) -> Netns {
        let netns = Netns::create().unwrap();
        netns.bind(&self.path(id)).unwrap();
        netns
    }

    pub(crate) fn path(&self, id: &str) -> PathBuf {
        self.root.join(format!("ns-{id}"))
    }

    pub(crate) fn conf(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "name": "net", "type": "flannel", "subnetFile": self.root.join("subnet.env"), "dataDir": self.root.join("flannel"),
                "delegate": { "isDefaultGateway": true }, "ipam": { "dataDir": self.root.join("networks") } })
    }

    pub(crate) fn bridge_conf(&self, ipam: &Value) -> Value {
        let mut ipam = ipam.clone();
        ipam["type"] = "host-local".into();
        ipam["dataDir"] = self.root.join("networks").to_string_lossy().into_owned().into();
        json!({ "cniVersion": "1.0.0", "name": "net", "type": "bridge", "isDefaultGateway": true, "ipam": ipam })
    }

    /// Calls a plugin; `Ok` is what it printed, `Err` its error object.
    pub(crate) fn call(&self, plugin: &str, verb: &str, id: &str, conf: &Value) -> Result<String, Value> {
        self.call_with(plugin, verb, id, &conf.to_string(), &[])
    }

    pub(crate) fn call_with(&self, plugin: &str, verb: &str, id: &str, stdin: &str, env: &[(&str, &str)]) -> Result<String, Value> {
        let bin = self.root.join("bin");
        let mut command = Command::new(bin.join(plugin));
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", self.path(id))
            .env("CNI_IFNAME", "eth0");
        command.env("CNI_PATH", &bin).envs(env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.netns.run(|| command.spawn()).unwrap().unwrap();
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        match output.status.success() {
            true => Ok(text),
            false => Err(serde_json::from_str(&text)
                .unwrap_or_else(|_| panic!("no error object: {text:?} {}", String::from_utf8_lossy(&output.stderr)))),
        }
    }

    pub(crate) fn add(&self, id: &str) -> Value {
        serde_json::from_str(&self.call("flannel", "ADD", id, &self.conf("1.0.0")).unwrap()).unwrap()
    }

    pub(crate) fn links(&self) -> BTreeSet<String> {
        self.netns.run(|| link::list(&mut socket()).unwrap().iter().map(|l| l.name.to_string()).collect()).unwrap()
    }

    pub(crate) fn files(&self, directory: &str) -> BTreeSet<String> {
        std::fs::read_dir(self.root.join(directory))
            .into_iter()
            .flatten()
            .flatten()
            .map(|f| f.file_name().to_string_lossy().into_owned())
            .collect()
    }

    pub(crate) fn nft(&self) -> String {
        let output = self.netns.run(|| Command::new("nft").args(["list", "ruleset"]).output()).unwrap();
        String::from_utf8(output.expect("nft is installed by `cargo xtask test`").stdout).unwrap()
    }
}

fn socket() -> Socket {
    Socket::open(Protocol::Route).unwrap()
}
