//! `flannel`: turns `subnet.env` into the configuration of another plugin, `bridge` unless told otherwise, and
//! delegates to it (specification, section 7.2).

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ::flannel::subnet_env::SubnetEnv;
use serde_json::{Map, Value, json};

use crate::delegate;
use crate::host_local::publish;
use crate::protocol::{CniError, Command, Request, array, object, string};
use crate::result::CniResult;

pub(crate) fn run(request: &Request) -> Result<Option<CniResult>, CniError> {
    let stored = Stored { directory: PathBuf::from(string(&request.conf, "dataDir")?.unwrap_or("/var/lib/cni/flannel")) };
    let name = stored_name(&request.container_id, &request.ifname);
    match request.command {
        Command::Add => {
            let conf = delegate_conf(&request.conf, &subnet_env(request)?)?;
            // Stored before the delegate is called: whatever happens to us now, a DEL can undo it.
            stored.write(&name, &conf)?;
            delegate::call(request, Command::Add, conf, "delegate.type")
        }
        Command::Del => {
            let Some(conf) = stored.read(&name)? else {
                // An ADD that was killed before it stored anything may have left this much.
                remove_file(&stored.temporary(&name))?;
                // A file without content is what a power cut may leave of a stored configuration.
                if stored.file(&name).exists()
                    && let Ok(env) = subnet_env(request)
                {
                    delegate::call(request, Command::Del, delegate_conf(&request.conf, &env)?, "delegate.type")?;
                    stored.remove(&name)?;
                } else if let Some(conf) = stored.read(&request.container_id)? {
                    // Stored by the container alone, as the reference plugin does; it may be another attachment's too.
                    delegate::call(request, Command::Del, conf, "delegate.type")?;
                }
                return Ok(None);
            };
            // Kept until the delegate has succeeded, so that a failed DEL can be repeated.
            delegate::call(request, Command::Del, conf, "delegate.type")?;
            stored.remove(&name).map(|()| None)
        }
        Command::Check => {
            let Some(mut conf) = stored.read(&name)? else {
                return Err(CniError::failed(format!("container {} was not added by this plugin", request.container_id)));
            };
            if let Some(previous) = request.conf.get("prevResult") {
                conf.insert("prevResult".to_owned(), previous.clone());
            }
            delegate::call(request, Command::Check, conf, "delegate.type")
        }
        Command::Gc => {
            let valid = request.valid_attachments()?;
            let mut conf = delegate_conf(&request.conf, &subnet_env(request)?)?;
            conf.insert("cni.dev/valid-attachments".to_owned(), request.conf["cni.dev/valid-attachments"].clone());
            delegate::call(request, Command::Gc, conf, "delegate.type")?;
            stored
                .retain(&request.name, |file| valid.iter().any(|(container, ifname)| stored_name(container, ifname) == file))
                .map(|()| None)
        }
        Command::Status => match subnet_env(request) {
            Ok(env) => delegate::call(request, Command::Status, delegate_conf(&request.conf, &env)?, "delegate.type"),
            // Code 50: the plugin cannot serve an ADD.
            Err(error) => Err(CniError { code: 50, ..error }),
        },
        Command::Version => Ok(None),
    }
}

fn subnet_env(request: &Request) -> Result<SubnetEnv, CniError> {
    let file = string(&request.conf, "subnetFile")?.unwrap_or("/run/flannel/subnet.env");
    let text = fs::read_to_string(file).map_err(|error| {
        CniError::failed(format!(
            "subnetFile: cannot read {file}: {error}. flanneld writes it once it has a lease: is it running on this host? See its log"
        ))
    })?;
    SubnetEnv::parse(&text).map_err(|error| CniError::failed(format!("{file} {error}")))
}

/// The delegate's configuration.
fn delegate_conf(conf: &Map<String, Value>, env: &SubnetEnv) -> Result<Map<String, Value>, CniError> {
    let mut delegate = object(conf, "delegate")?.cloned().unwrap_or_default();
    if delegate.get("type").is_some_and(|kind| !kind.is_string()) {
        return Err(CniError::config("delegate: its type must be a string"));
    }
    for field in ["name", "ipam"] {
        if delegate.contains_key(field) {
            return Err(CniError::config(format!("delegate: it must not have {field:?}: that is filled in from subnet.env")));
        }
    }
    if let Some(runtime) = object(conf, "runtimeConfig")? {
        delegate.insert("runtimeConfig".to_owned(), runtime.clone().into());
    }
    delegate.insert("name".to_owned(), conf.get("name").cloned().unwrap_or_default());
    delegate.entry("type").or_insert("bridge".into());
    delegate.entry("ipMasq").or_insert((!env.ip_masq).into());
    delegate.entry("mtu").or_insert(env.mtu.into());
    if delegate["type"] == "bridge" {
        delegate.entry("isGateway").or_insert(true.into());
    }
    if let Some(version) = string(conf, "cniVersion")?.filter(|version| !version.is_empty()) {
        delegate.insert("cniVersion".to_owned(), version.into());
    }
    let mut ipam = object(conf, "ipam")?.cloned().unwrap_or_default();
    ipam.entry("type").or_insert("host-local".into());
    let ranges: Vec<Value> = env.subnets.iter().map(|(_, subnet)| json!([{ "subnet": subnet.to_string() }])).collect();
    let mut routes = array(&ipam, "routes")?.cloned().unwrap_or_default();
    routes.extend(env.networks.iter().map(|network| json!({ "dst": network.to_string() })));
    ipam.insert("ranges".to_owned(), ranges.into());
    ipam.insert("routes".to_owned(), routes.into());
    delegate.insert("ipam".to_owned(), ipam.into());
    Ok(delegate)
}

/// The name of an attachment's file. The usual interface has upstream's name, the container alone, so that its plugin
/// and ours can undo what the other did; further interfaces of a container have files of their own, which upstream's
/// have not. No container's name has a colon.
fn stored_name(container: &str, ifname: &str) -> String {
    if ifname == "eth0" { container.to_owned() } else { format!("{container}:{ifname}") }
}

/// The delegates' configurations, one file an attachment.
struct Stored {
    directory: PathBuf,
}

impl Stored {
    fn file(&self, container: &str) -> PathBuf {
        self.directory.join(container)
    }

    /// Where the file is while it is written. A runtime calls for one container once at a time.
    fn temporary(&self, container: &str) -> PathBuf {
        self.directory.join(format!(".{container}"))
    }

    fn write(&self, container: &str, conf: &Map<String, Value>) -> Result<(), CniError> {
        let temporary = self.temporary(container);
        let text = Value::Object(conf.clone()).to_string();
        let written = (|| {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
            // Killed at whatever moment, this leaves the file or nothing.
            match publish(&self.directory, &self.file(container), text.as_bytes(), true) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => return other,
            }
            let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, self.file(container))
        })();
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            CniError::new(5, format!("dataDir: cannot write {}: {error}", self.file(container).display()))
        })
    }

    fn read(&self, container: &str) -> Result<Option<Map<String, Value>>, CniError> {
        let file = self.file(container);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CniError::new(5, format!("dataDir: cannot read {}: {error}", file.display()))),
        };
        match serde_json::from_str(&text) {
            Ok(Value::Object(conf)) => Ok(Some(conf)),
            // A DEL must not fail for ever because of it.
            _ => {
                eprintln!("flannel: {} is no configuration; undoing by the present one instead", file.display());
                Ok(None)
            }
        }
    }

    fn remove(&self, container: &str) -> Result<(), CniError> {
        remove_file(&self.temporary(container))?;
        remove_file(&self.file(container))
    }

    /// Removes the configurations of one network's containers that `keep` refuses.
    fn retain(&self, network: &str, keep: impl Fn(&str) -> bool) -> Result<(), CniError> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|id| !id.starts_with('.')) else { continue };
            let ours = self.read(id)?.is_some_and(|conf| conf.get("name").and_then(Value::as_str) == Some(network));
            if ours && !keep(id) {
                remove_file(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes a file; that it is gone already is as good.
pub(crate) fn remove_file(path: &Path) -> Result<(), CniError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(CniError::new(5, format!("cannot remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

    fn conf(text: &str) -> Result<String, String> {
        let Ok(Value::Object(conf)) = serde_json::from_str(text) else { panic!("{text}") };
        delegate_conf(&conf, &SubnetEnv::parse(ENV).unwrap()).map(|conf| Value::Object(conf).to_string()).map_err(|error| error.msg)
    }

    #[test]
    fn the_delegates_configuration_is_upstreams() {
        assert_eq!(
            conf(r#"{"name":"cni-flannel","type":"flannel"}"#).unwrap(),
            r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#
        );
        assert_eq!(
            conf(r#"{"name":"n","cniVersion":"1.0.0","delegate":{"type":"macvlan","mtu":1400,"hairpinMode":true},"ipam":{"type":"dhcp","routes":[{"dst":"1.0.0.0/8"}],"x":1},"runtimeConfig":{"ips":[]}}"#).unwrap(),
            r#"{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"1.0.0.0/8"},{"dst":"10.1.0.0/16"}],"type":"dhcp","x":1},"mtu":1400,"name":"n","runtimeConfig":{"ips":[]},"type":"macvlan"}"#
        );
    }

    #[test]
    fn what_the_delegate_must_not_say() {
        assert_eq!(conf(r#"{"name":"n","delegate":{"type":7}}"#).unwrap_err(), "delegate: its type must be a string");
        assert!(conf(r#"{"name":"n","delegate":{"ipam":{}}}"#).unwrap_err().contains("\"ipam\""));
    }
}
