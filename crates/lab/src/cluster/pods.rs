//! Pods of a lab, created by the CNI plugins.

use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use flannel::Cidr;
use kernel::netns::Netns;
use serde_json::{Value, json};

use super::Lab;

/// A pod of a lab.
#[derive(Debug)]
pub struct Pod {
    /// `h1-pod`, or with a number.
    pub name: String,
    /// The place of its host in [`Lab::hosts`].
    pub host: usize,
    /// Its network namespace.
    pub netns: Netns,
    /// The path of that namespace, as the plugin gets it.
    pub path: PathBuf,
    /// Its first address.
    pub address: IpAddr,
    /// Its address of each family.
    pub addresses: Vec<IpAddr>,
    /// The result of its ADD.
    pub result: Value,
}

impl Lab {
    /// Creates a pod on a host with the CNI plugin.
    ///
    /// # Errors
    /// When the plugin fails; the text has its error.
    pub fn add_pod(&mut self, host: usize) -> anyhow::Result<Pod> {
        self.pods += 1;
        let name = if self.pods <= self.hosts.len() {
            format!("{}-pod", self.hosts[host].name)
        } else {
            format!("{}-pod{}", self.hosts[host].name, self.pods)
        };
        let netns = Netns::create()?;
        let path = self.root.join("netns").join(&name);
        netns.bind(&path)?;
        self.cni(host, "loopback", "ADD", &name, &path, "lo")?;
        let output = self.cni(host, "flannel", "ADD", &name, &path, "eth0")?;
        let result: Value = serde_json::from_str(&output).with_context(|| format!("the plugin's result is not JSON: {output}"))?;
        let texts = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
        let addresses = texts.map(|text| Ok(text.parse::<Cidr>()?.addr)).collect::<anyhow::Result<Vec<IpAddr>>>()?;
        let address = *addresses.first().context("the plugin's result has no address")?;
        Ok(Pod { name, host, netns, path, address, addresses, result })
    }

    /// The CNI configuration of a host.
    pub fn cni_conf(&self, host: usize, plugin: &str) -> Value {
        let directory = &self.hosts[host].directory;
        if plugin == "loopback" {
            return json!({ "cniVersion": "1.0.0", "name": "lo", "type": "loopback" });
        }
        json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "flannel",
            "dataDir": directory.join("cni/flannel"),
            "delegate": { "isDefaultGateway": true, "hairpinMode": true },
            "ipam": { "dataDir": directory.join("cni/networks") },
        })
    }

    /// A command that calls a plugin on a host, and the configuration for its standard input. Spawn it in the host's network
    /// namespace; it enters the host's mount namespace by itself.
    ///
    /// # Errors
    /// When there is no free descriptor.
    pub fn cni_command(
        &self,
        host: usize,
        plugin: &str,
        verb: &str,
        container: &str,
        netns: &Path,
        ifname: &str,
    ) -> anyhow::Result<(Command, String)> {
        let bin = self.root.join("bin");
        let mut command = Command::new(bin.join(plugin));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", ifname)
            .env("CNI_PATH", &bin)
            .envs(self.plan.env.iter().cloned());
        self.hosts[host].mounts.enter(&mut command)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok((command, self.cni_conf(host, plugin).to_string()))
    }

    /// Calls a plugin on a host and returns its standard output.
    ///
    /// # Errors
    /// When the plugin fails; the text has its error.
    pub fn cni(&self, host: usize, plugin: &str, verb: &str, container: &str, netns: &Path, ifname: &str) -> anyhow::Result<String> {
        self.call(host, self.cni_command(host, plugin, verb, container, netns, ifname)?)
    }

    /// Maps a port of a pod's host to the pod (`ADD`), or removes the mapping (`DEL`), with the portmap plugin.
    ///
    /// # Errors
    /// When the plugin fails; the text has its error.
    pub fn map_port(&self, pod: &Pod, verb: &str, port: u16) -> anyhow::Result<()> {
        let mappings = json!([{ "hostPort": port, "containerPort": 80, "protocol": "tcp" }]);
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "portmap",
            "runtimeConfig": { "portMappings": mappings },
            "prevResult": pod.result,
        });
        let (command, _) = self.cni_command(pod.host, "portmap", verb, &pod.name, &pod.path, "eth0")?;
        self.call(pod.host, (command, conf.to_string())).map(drop)
    }

    fn call(&self, host: usize, (mut command, conf): (Command, String)) -> anyhow::Result<String> {
        let mut child = self.hosts[host].netns.run(|| command.spawn())?.with_context(|| format!("cannot start {command:?}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(conf.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text)
    }
}
