//! `flannel`: turns `subnet.env` into the configuration of another plugin, `bridge` by default, and delegates to it
//! (specification, section 7.2).

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use ::flannel::subnet_env::SubnetEnv;
use kernel::file::{self, Existing, How};
use serde_json::{Map, Value, json};

use crate::delegate;
use crate::protocol::{CniError, Command, Request, VALID_ATTACHMENTS, array, field, object, string};
use crate::result::CniResult;

pub(crate) fn run(request: &Request<'_>) -> Result<Option<CniResult>, CniError> {
    let configured = string(request.conf, "dataDir");
    // DEL ignores an invalid dataDir, which ADD rejects.
    let configured = if request.command == Command::Del { configured.ok().flatten() } else { configured? };
    let stored = Stored { directory: PathBuf::from(configured.unwrap_or("/var/lib/cni/flannel")) };
    let name = stored_name(request.container_id, request.ifname);
    match request.command {
        Command::Add => {
            let conf = delegate_conf(request.conf, &subnet_env(request)?)?;
            // Stored before the delegate is called, so that a DEL can undo the ADD even if this process is killed.
            stored.write(&name, &conf)?;
            delegate::call(request, Command::Add, &conf, "delegate.type")
        }
        Command::Del => del(request, &stored, &name).map(|()| None),
        Command::Check => {
            let mut conf = match stored.read(&name)? {
                StoredConf::Valid(conf) => conf,
                StoredConf::Missing => {
                    return Err(CniError::failed(format!("container {} was not added by this plugin", request.container_id)));
                }
                StoredConf::Corrupt => {
                    let text = format!("{}; delete the pod and create it again", stored.describe_corrupt(&name));
                    return Err(CniError::failed(text));
                }
            };
            if let Some(previous) = request.conf.get("prevResult") {
                conf.insert("prevResult".to_owned(), previous.clone());
            }
            delegate::call(request, Command::Check, &conf, "delegate.type")
        }
        Command::Gc => {
            let valid = request.valid_attachments()?;
            let mut conf = delegate_conf(request.conf, &subnet_env(request)?)?;
            conf.insert(VALID_ATTACHMENTS.to_owned(), request.conf[VALID_ATTACHMENTS].clone());
            // An error of the delegate must not keep stale files, nor the reverse.
            let collected = delegate::call(request, Command::Gc, &conf, "delegate.type");
            let keep = |file: &str| valid.iter().any(|valid| stored_name(&valid.container, &valid.ifname) == file);
            stored.retain(request.name, keep)?;
            collected.map(|_| None)
        }
        Command::Status => match subnet_env(request) {
            Ok(env) => delegate::call(request, Command::Status, &delegate_conf(request.conf, &env)?, "delegate.type"),
            // Code 50: the plugin cannot serve ADD requests.
            Err(error) => Err(CniError { code: 50, ..error }),
        },
        Command::Version => Ok(None),
    }
}

fn del(request: &Request<'_>, stored: &Stored, name: &str) -> Result<(), CniError> {
    let found = stored.read(name)?;
    if let StoredConf::Valid(conf) = found {
        // The file is kept until the delegate has succeeded, so that a failed DEL can be repeated.
        delegate::call(request, Command::Del, &conf, "delegate.type")?;
        return stored.remove(name);
    }
    // An ADD that was killed while it stored the configuration may have left its temporary file.
    remove_file(&stored.temporary(name))?;
    // A power cut can leave an empty file. DEL must not fail for ever because of it.
    if matches!(found, StoredConf::Corrupt) {
        let text = stored.describe_corrupt(name);
        match subnet_env(request).and_then(|env| delegate_conf(request.conf, &env)) {
            Ok(conf) => {
                eprintln!("flannel: {text}; using the present configuration instead");
                delegate::call(request, Command::Del, &conf, "delegate.type")?;
                return stored.remove(name);
            }
            Err(error) => eprintln!("flannel: {text}, and the present configuration cannot be used: {error}"),
        }
    }
    // The reference plugin names the file by the container alone. The file may belong to another attachment too, so it stays.
    if let StoredConf::Valid(conf) = stored.read(request.container_id)? {
        delegate::call(request, Command::Del, &conf, "delegate.type")?;
    }
    Ok(())
}

fn subnet_env(request: &Request<'_>) -> Result<SubnetEnv, CniError> {
    let file = string(request.conf, "subnetFile")?.unwrap_or("/run/flannel/subnet.env");
    let text = fs::read_to_string(file).map_err(|error| {
        CniError::failed(format!(
            "subnetFile: cannot read {file}: {error}. flanneld writes it once it has a lease: is it running on this host? See its log"
        ))
    })?;
    // Some editors put a byte-order mark before the text.
    SubnetEnv::parse(text.strip_prefix('\u{feff}').unwrap_or(&text)).map_err(|error| CniError::failed(format!("{file} {error}")))
}

/// Builds the delegate's configuration. Fields that are `null` or empty count as missing.
fn delegate_conf(conf: &Map<String, Value>, env: &SubnetEnv) -> Result<Map<String, Value>, CniError> {
    let is_set = |_: &String, value: &mut Value| !value.is_null() && value.as_str() != Some("");
    let mut delegate = object(conf, "delegate")?.cloned().unwrap_or_default();
    delegate.retain(is_set);
    if delegate.get("type").is_some_and(|kind| !kind.is_string()) {
        return Err(CniError::config("delegate.type must be a string"));
    }
    for (field, reason) in [("name", "the network's name is used"), ("ipam", "it is built from subnet.env")] {
        if delegate.contains_key(field) {
            return Err(CniError::config(format!("delegate.{field}: remove it; {reason}")));
        }
    }
    if let Some(runtime) = object(conf, "runtimeConfig")? {
        delegate.insert("runtimeConfig".to_owned(), runtime.clone().into());
    }
    delegate.insert("name".to_owned(), field(conf, "name").cloned().unwrap_or_default());
    delegate.entry("type").or_insert("bridge".into());
    delegate.entry("ipMasq").or_insert((!env.ip_masq).into());
    delegate.entry("mtu").or_insert(env.mtu.into());
    if delegate["type"] == "bridge" {
        delegate.entry("isGateway").or_insert(true.into());
    }
    if let Some(version) = string(conf, "cniVersion")? {
        delegate.insert("cniVersion".to_owned(), version.into());
    }
    let mut ipam = object(conf, "ipam")?.cloned().unwrap_or_default();
    ipam.retain(is_set);
    ipam.entry("type").or_insert("host-local".into());
    let ranges: Vec<Value> = env.subnets.iter().map(|(_, subnet)| json!([{ "subnet": subnet.to_string() }])).collect();
    let mut routes = array(&ipam, "routes")?.cloned().unwrap_or_default();
    routes.extend(env.networks.iter().map(|network| json!({ "dst": network.to_string() })));
    ipam.insert("ranges".to_owned(), ranges.into());
    ipam.insert("routes".to_owned(), routes.into());
    delegate.insert("ipam".to_owned(), ipam.into());
    Ok(delegate)
}

/// The name of an attachment's file. For `eth0` it is the container ID alone, as in the reference plugin, so that each
/// plugin can delete an attachment that the other one added. Further interfaces of a container have their own files, which
/// the reference plugin does not write. A container ID never contains a colon.
fn stored_name(container: &str, ifname: &str) -> String {
    if ifname == "eth0" { container.to_owned() } else { format!("{container}:{ifname}") }
}

/// A stored delegate configuration.
enum StoredConf {
    Missing,
    /// The file exists, but is not a JSON object.
    Corrupt,
    Valid(Map<String, Value>),
}

/// The directory of the delegates' configurations, one file per attachment.
struct Stored {
    directory: PathBuf,
}

impl Stored {
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The temporary file of a write. Its name needs no random part: a runtime runs one call per container at a time.
    fn temporary(&self, name: &str) -> PathBuf {
        self.directory.join(format!(".{name}"))
    }

    fn write(&self, name: &str, conf: &Map<String, Value>) -> Result<(), CniError> {
        let file = self.file(name);
        let failed = |error: std::io::Error| CniError::new(5, format!("dataDir: cannot write {}: {error}", file.display()));
        let text = serde_json::to_vec(conf).map_err(|error| failed(error.into()))?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory).map_err(failed)?;
        let put = |existing| file::put(&file, &text, How { mode: 0o600, durable: true, existing }, |_| Ok(()));
        let written = match put(Existing::Keep) {
            // An earlier ADD that failed left it.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => put(Existing::ReplaceAlone),
            other => other,
        };
        written.map_err(failed)
    }

    fn read(&self, name: &str) -> Result<StoredConf, CniError> {
        let file = self.file(name);
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(StoredConf::Missing),
            Err(error) => return Err(CniError::new(5, format!("dataDir: cannot read {}: {error}", file.display()))),
        };
        Ok(match serde_json::from_slice(&text) {
            Ok(Value::Object(conf)) => StoredConf::Valid(conf),
            _ => StoredConf::Corrupt,
        })
    }

    /// The error about a corrupt file.
    fn describe_corrupt(&self, name: &str) -> String {
        format!("dataDir: {} is not valid JSON", self.file(name).display())
    }

    fn remove(&self, name: &str) -> Result<(), CniError> {
        remove_file(&self.temporary(name))?;
        remove_file(&self.file(name))
    }

    /// Removes the configurations of one network's attachments for which `keep` is false. Continues after an error and
    /// returns the first. A corrupt file does not name its network, so it stays until DEL.
    fn retain(&self, network: &str, keep: impl Fn(&str) -> bool) -> Result<(), CniError> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Ok(()) };
        let mut done = Ok(());
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|id| !id.starts_with('.') && !keep(id)) else { continue };
            let is_ours = |conf: &Map<String, Value>| field(conf, "name").and_then(Value::as_str) == Some(network);
            let removed = match self.read(id) {
                Ok(StoredConf::Valid(conf)) if is_ours(&conf) => remove_file(&entry.path()),
                Ok(StoredConf::Corrupt) => {
                    eprintln!("flannel: {}; it is kept until its container is deleted", self.describe_corrupt(id));
                    Ok(())
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            done = done.and(removed);
        }
        done
    }
}

/// Removes a file, if it exists.
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
    use crate::protocol::{Environment, Invocation};

    const ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

    fn conf(text: &str) -> Result<String, String> {
        let Ok(Value::Object(conf)) = serde_json::from_str(text) else { panic!("{text}") };
        delegate_conf(&conf, &SubnetEnv::parse(ENV).unwrap()).map(|conf| Value::Object(conf).to_string()).map_err(|error| error.msg)
    }

    #[test]
    fn delegate_configuration_is_the_reference_plugins() {
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
    fn each_network_of_the_file_gets_a_route() {
        let Ok(Value::Object(plain)) = serde_json::from_str(r#"{"name":"n"}"#) else { panic!("an object") };
        let env = ENV.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16");
        let conf = delegate_conf(&plain, &SubnetEnv::parse(&env).unwrap()).unwrap();
        assert_eq!(conf["ipam"]["routes"], json!([{ "dst": "10.1.0.0/16" }, { "dst": "192.168.0.0/16" }]));
        assert_eq!(conf["ipam"]["ranges"], json!([[{ "subnet": "10.1.17.0/24" }]]));
    }

    #[test]
    fn empty_and_null_fields_are_filled_in() {
        let plain = conf(r#"{"name":"n","type":"flannel"}"#).unwrap();
        let empty = r#"{"name":"n","type":"flannel","cniVersion":"","delegate":{"type":"","mtu":null,"ipMasq":null,"isGateway":null,"name":"","ipam":null},
            "ipam":{"type":"","routes":null,"dataDir":""},"runtimeConfig":null}"#;
        assert_eq!(conf(empty).unwrap(), plain);
    }

    #[test]
    fn forbidden_fields_of_the_delegate_are_refused() {
        assert_eq!(conf(r#"{"name":"n","delegate":{"type":7}}"#).unwrap_err(), "delegate.type must be a string");
        let error = |delegate: &str| conf(&format!(r#"{{"name":"n","delegate":{delegate}}}"#)).unwrap_err();
        assert_eq!(error(r#"{"ipam":{}}"#), "delegate.ipam: remove it; it is built from subnet.env");
        assert_eq!(error(r#"{"name":"x"}"#), "delegate.name: remove it; the network's name is used");
    }

    #[test]
    fn check_names_a_corrupt_stored_configuration() {
        let directory = std::env::temp_dir().join(format!("flannel-corrupt-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let check = |text: &str| {
            fs::write(directory.join("c1"), text).unwrap();
            let conf = json!({ "cniVersion": "1.0.0", "name": "n", "dataDir": directory });
            let environment = Environment::from(|name: &str| {
                let values = [("CNI_CONTAINERID", "c1"), ("CNI_NETNS", "/ns"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/absent")];
                values.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
            });
            let invocation = Invocation::new(Command::Check, &environment, &conf.to_string()).unwrap();
            run(&invocation.request()).unwrap_err().msg
        };
        let wanted = format!("dataDir: {}/c1 is not valid JSON; delete the pod and create it again", directory.display());
        assert_eq!((check(""), check("[]")), (wanted.clone(), wanted));
        assert!(check(r#"{"type":"bridge"}"#).starts_with("delegate.type: failed to find plugin"));
        fs::remove_dir_all(&directory).unwrap();
    }
}
