//! The protocol that all plugins share: environment, configuration, versions, errors (CNI specification 1.1.0; this
//! project's specification, section 7.1).

use std::path::{Path, PathBuf};

use ::flannel::pod::Attachment;
use ::flannel::{IfName, Mac};
use serde_json::{Map, Value, json};

/// Supported versions of the specification.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// An error that the runtime reads from standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// The specification's code; 999 for an internal error.
    pub code: u32,
    /// The act, the object, the reason and the fix.
    pub msg: String,
    /// Further details; may be empty.
    pub details: String,
}

impl CniError {
    /// An error with a code of the specification.
    pub fn new(code: u32, msg: impl Into<String>) -> CniError {
        CniError { code, msg: msg.into(), details: String::new() }
    }

    /// Code 2: a field that this plugin does not support.
    pub fn unsupported(msg: impl Into<String>) -> CniError {
        CniError::new(2, msg)
    }

    /// Code 4: a variable of the environment is missing or invalid.
    pub fn environment(msg: impl Into<String>) -> CniError {
        CniError::new(4, msg)
    }

    /// Code 6: the configuration cannot be decoded.
    pub fn decode(msg: impl Into<String>) -> CniError {
        CniError::new(6, msg)
    }

    /// Code 7: the configuration is not valid.
    pub fn config(msg: impl Into<String>) -> CniError {
        CniError::new(7, msg)
    }

    /// Code 999: the operation failed.
    pub fn failed(msg: impl Into<String>) -> CniError {
        CniError::new(999, msg)
    }

    /// The JSON on standard output.
    pub fn to_json(&self) -> String {
        let mut object = json!({ "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            object["details"] = self.details.clone().into();
        }
        pretty(&object)
    }
}

impl std::fmt::Display for CniError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.msg)
    }
}

/// JSON with an indent of four spaces, as the reference implementation prints it.
pub fn pretty(value: &Value) -> String {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, serde_json::ser::PrettyFormatter::with_indent(b"    "));
    serde::Serialize::serialize(value, &mut serializer).expect("a JSON value serializes into memory");
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

/// The command of the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Verify that the attachment is as ADD left it.
    Check,
    /// Remove the state of all attachments but the valid ones.
    Gc,
    /// Report whether an ADD could succeed.
    Status,
    /// Report the supported versions.
    Version,
}

/// The variables of the protocol; an empty one counts as missing.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    command: Option<String>,
    container_id: Option<String>,
    netns: Option<String>,
    ifname: Option<String>,
    args: Option<String>,
    path: Option<String>,
    netns_override: Option<String>,
    depth: u32,
}

/// The variable with the depth of delegation: how many plugins called each other before this one.
pub const DEPTH: &str = "FLANNEL_CNI_DEPTH";

impl Environment {
    /// Reads the variables with a function that returns the value of a variable.
    pub fn from(var: impl Fn(&str) -> Option<String>) -> Environment {
        let get = |name: &str| var(name).filter(|value| !value.is_empty());
        Environment {
            command: get("CNI_COMMAND"),
            container_id: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            ifname: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
            path: get("CNI_PATH"),
            netns_override: get("CNI_NETNS_OVERRIDE"),
            depth: get(DEPTH).and_then(|text| text.parse().ok()).unwrap_or(0),
        }
    }

    /// The command; `None` if no runtime called the program.
    ///
    /// # Errors
    /// Code 4 for a command that does not exist.
    pub fn command(&self) -> Result<Option<Command>, CniError> {
        Ok(Some(match self.command.as_deref() {
            None => return Ok(None),
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("GC") => Command::Gc,
            Some("STATUS") => Command::Status,
            Some("VERSION") => Command::Version,
            Some(other) => return Err(CniError::environment(format!("unknown CNI_COMMAND: {other}"))),
        }))
    }

    fn require(&self, command: Command) -> Result<(), CniError> {
        use Command::{Add, Check, Del};
        let attachment = matches!(command, Add | Check | Del);
        let needed = [
            ("CNI_CONTAINERID", attachment && self.container_id.is_none()),
            ("CNI_NETNS", matches!(command, Add | Check) && self.netns.is_none()),
            ("CNI_IFNAME", attachment && self.ifname.is_none()),
            ("CNI_PATH", self.path.is_none()),
        ];
        let missing: Vec<&str> = needed.iter().filter(|(_, missing)| *missing).map(|(name, _)| *name).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(CniError::environment(format!("required env variables [{}] missing", missing.join(","))))
    }
}

/// One call of a plugin, which owns the data that a [`Request`] borrows.
#[derive(Debug)]
pub struct Invocation {
    command: Command,
    container_id: String,
    netns: Option<PathBuf>,
    netns_override: bool,
    ifname: String,
    args: String,
    path: Vec<PathBuf>,
    name: String,
    version: String,
    conf: Map<String, Value>,
    text: String,
    depth: u32,
}

/// One call of a plugin, validated. A delegate in this process gets the same call with another configuration
/// ([`Request::delegated`]); nothing is copied for that.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// What to do.
    pub command: Command,
    /// The container; empty for GC and STATUS.
    pub container_id: &'a str,
    /// The path of its network namespace.
    pub netns: Option<&'a Path>,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be the host's own.
    pub netns_override: bool,
    /// The interface in it; empty for GC and STATUS.
    pub ifname: &'a str,
    /// `CNI_ARGS`, unparsed.
    pub args: &'a str,
    /// The directories of `CNI_PATH`.
    pub path: &'a [PathBuf],
    /// The network's name.
    pub name: &'a str,
    /// The configuration's version of the specification.
    pub version: &'a str,
    /// The whole configuration.
    pub conf: &'a Map<String, Value>,
    /// The configuration's text; empty for a delegate in this process.
    pub text: &'a str,
    /// How many plugins called each other before this one.
    pub depth: u32,
}

impl Invocation {
    /// Reads and validates one call.
    ///
    /// # Errors
    /// With the specification's code, naming the variable or the field.
    pub fn new(command: Command, environment: &Environment, stdin: &str) -> Result<Invocation, CniError> {
        environment.require(command)?;
        let container_id = environment.container_id.clone().unwrap_or_default();
        let ifname = environment.ifname.clone().unwrap_or_default();
        if !container_id.is_empty() && !is_identifier(&container_id) {
            return Err(CniError::environment(format!(
                "invalid CNI_CONTAINERID {container_id:?}: it must match [a-zA-Z0-9][a-zA-Z0-9_.-]*"
            )));
        }
        if !ifname.is_empty() {
            let parsed = if command == Command::Add { new_interface(&ifname) } else { ifname.parse().map_err(|error| format!("{error}")) };
            parsed.map_err(|error| CniError::environment(format!("invalid CNI_IFNAME: {error}")))?;
        }
        // Some editors put a byte-order mark before the text.
        let conf: Value = serde_json::from_str(stdin.strip_prefix('\u{feff}').unwrap_or(stdin))
            .map_err(|error| CniError::decode(format!("the configuration on standard input is not JSON: {error}")))?;
        let Value::Object(conf) = conf else {
            return Err(CniError::decode("the configuration on standard input is not a JSON object"));
        };
        let name = string(&conf, "name")?.unwrap_or_default().to_owned();
        if !is_identifier(&name) {
            return Err(CniError::config(format!(
                "name: invalid or missing network name {name:?}: it must match [a-zA-Z0-9][a-zA-Z0-9_.-]*"
            )));
        }
        let version = string(&conf, "cniVersion")?.unwrap_or(OLDEST).to_owned();
        check_version(command, &version)?;
        Ok(Invocation {
            command,
            container_id,
            netns: environment.netns.clone().map(PathBuf::from),
            netns_override: environment.netns_override.as_deref().is_some_and(is_true),
            ifname,
            args: environment.args.clone().unwrap_or_default(),
            path: environment.path.as_deref().unwrap_or_default().split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
            name,
            version,
            conf,
            text: stdin.to_owned(),
            depth: environment.depth,
        })
    }

    /// The call.
    pub fn request(&self) -> Request<'_> {
        Request {
            command: self.command,
            container_id: &self.container_id,
            netns: self.netns.as_deref(),
            netns_override: self.netns_override,
            ifname: &self.ifname,
            args: &self.args,
            path: &self.path,
            name: &self.name,
            version: &self.version,
            conf: &self.conf,
            text: &self.text,
            depth: self.depth,
        }
    }
}

/// The version of a configuration without `cniVersion`.
const OLDEST: &str = "0.1.0";

/// Does the configuration's version exist, and does it have the command?
fn check_version(command: Command, version: &str) -> Result<(), CniError> {
    let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
    let (since, verb) = match command {
        Command::Check => ("0.4.0", "CHECK"),
        Command::Gc => ("1.1.0", "GC"),
        Command::Status => ("1.1.0", "STATUS"),
        _ => (OLDEST, ""),
    };
    let details = match place(version) {
        None => format!("config is {version:?}, plugin supports {VERSIONS:?}"),
        Some(at) if place(since) > Some(at) => format!("config version {version:?} does not allow {verb}"),
        Some(_) => return Ok(()),
    };
    Err(CniError { code: 1, msg: "incompatible CNI versions".to_owned(), details })
}

impl<'a> Request<'a> {
    /// The same call with another configuration, for a delegate in this process. This program built the configuration, or it
    /// is the caller's own, so it is not validated again.
    pub fn delegated<'b>(&self, command: Command, conf: &'b Map<String, Value>) -> Request<'b>
    where
        'a: 'b,
    {
        let text = |name: &str| string(conf, name).ok().flatten();
        Request {
            command,
            name: text("name").unwrap_or(self.name),
            version: text("cniVersion").unwrap_or(self.version),
            conf,
            text: "",
            depth: self.depth + 1,
            ..*self
        }
    }

    /// The attachment that the call is about.
    pub fn attachment(&self) -> Attachment {
        Attachment { network: self.name.to_owned(), container: self.container_id.to_owned(), ifname: self.ifname.to_owned() }
    }

    /// Is the configuration's version this one or later?
    pub fn speaks(&self, since: &str) -> bool {
        let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
        place(self.version) >= place(since)
    }

    /// Refuses a configuration with an earlier version.
    ///
    /// # Errors
    /// Code 1.
    pub fn require_version(&self, since: &str) -> Result<(), CniError> {
        if self.speaks(since) {
            return Ok(());
        }
        let details = format!("config is {:?}, plugin supports {since} and later", self.version);
        Err(CniError { code: 1, msg: "incompatible CNI versions".to_owned(), details })
    }

    /// A value of `CNI_ARGS`; an empty value counts as missing.
    ///
    /// # Errors
    /// When `CNI_ARGS` is malformed, or has unknown keys and `IgnoreUnknown` is not set.
    pub fn arg(&self, name: &str) -> Result<Option<&'a str>, CniError> {
        let mut found = None;
        let mut unknown = None;
        let mut tolerant = false;
        for pair in self.args.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .filter(|(_, value)| !value.contains('='))
                .ok_or_else(|| CniError::environment(format!("CNI_ARGS: invalid pair {pair:?}: it must be KEY=VALUE")))?;
            match key {
                "IgnoreUnknown" => tolerant = is_true(value),
                "IP" | "MAC" => {}
                _ => unknown = Some(key),
            }
            if key == name && !value.is_empty() {
                found = Some(value);
            }
        }
        match unknown.filter(|_| !tolerant) {
            Some(key) => Err(CniError::environment(format!("CNI_ARGS: unknown args [{key:?}]: set IgnoreUnknown=1 to pass them"))),
            None => Ok(found),
        }
    }

    /// The object `args.cni` of the configuration.
    ///
    /// # Errors
    /// Code 6, naming the field.
    pub fn cni_args(&self) -> Result<Option<&'a Map<String, Value>>, CniError> {
        object(self.conf, "args")?.map(|args| object(args, "cni")).transpose().map(Option::flatten)
    }

    /// The object `runtimeConfig` of the configuration.
    ///
    /// # Errors
    /// Code 6, naming the field.
    pub fn runtime_config(&self) -> Result<Option<&'a Map<String, Value>>, CniError> {
        object(self.conf, "runtimeConfig")
    }

    /// The valid attachments of a GC. `null` is an empty list: that is how libcni writes a nil slice of Go.
    ///
    /// # Errors
    /// When the list is missing or malformed; then nothing may be removed.
    pub fn valid_attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let list = match self.conf.get(VALID_ATTACHMENTS) {
            Some(Value::Array(list)) => list.as_slice(),
            Some(Value::Null) => &[],
            _ => return Err(CniError::config(format!("{VALID_ATTACHMENTS}: GC needs the list of valid attachments"))),
        };
        let read = |entry: &Value| {
            let text = |name| Some(entry.get(name)?.as_str()?.to_owned());
            Some(Attachment { network: self.name.to_owned(), container: text("containerID")?, ifname: text("ifname")? })
        };
        list.iter()
            .map(read)
            .collect::<Option<_>>()
            .ok_or_else(|| CniError::config(format!("{VALID_ATTACHMENTS}: each entry needs containerID and ifname")))
    }
}

/// The field of a GC that lists the attachments to keep.
pub const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// Parses a boolean of the environment as the reference implementation does.
fn is_true(text: &str) -> bool {
    text == "1" || text.eq_ignore_ascii_case("true")
}

/// Validates a name for a new interface. The kernel replaces `%d` by a number, and uses `all` and `default` as the names of
/// sysctl directories for all interfaces.
///
/// # Errors
/// The reason why the kernel would refuse it.
pub fn new_interface(name: &str) -> Result<IfName, String> {
    if matches!(name, "all" | "default") {
        return Err(format!("{name:?} is reserved by the kernel: choose another name"));
    }
    if name.contains('%') {
        return Err(format!("{name:?} contains %, which the kernel replaces by a number: choose another name"));
    }
    name.parse().map_err(|error| format!("{error}"))
}

/// Parses a MAC address for an interface.
///
/// # Errors
/// Code 7, naming the field.
pub fn unicast_mac(field: &str, text: &str) -> Result<Mac, CniError> {
    let mac: Mac = text.parse().map_err(|error| CniError::config(format!("{field}: {error}")))?;
    if mac.0[0] & 1 != 0 || mac.0 == [0; 6] {
        return Err(CniError::config(format!("{field}: {mac} is a multicast or zero address: an interface needs a unicast MAC")));
    }
    Ok(mac)
}

fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric()) && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Looks up a field by its name, case-insensitively as Go does. The exact spelling wins; `null` counts as missing.
pub fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let found = object.get(name).or_else(|| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value));
    found.filter(|value| !value.is_null())
}

/// A field that must be a string. An empty string counts as missing: Go programs write unset fields that way.
///
/// # Errors
/// Code 6, naming the field.
pub fn string<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, CniError> {
    Ok(typed(object, name, "a string", Value::as_str)?.filter(|text| !text.is_empty()))
}

/// A field that must be true or false.
///
/// # Errors
/// Code 6, naming the field.
pub fn boolean(object: &Map<String, Value>, name: &str) -> Result<Option<bool>, CniError> {
    typed(object, name, "true or false", Value::as_bool)
}

/// A field that must be an object.
///
/// # Errors
/// Code 6, naming the field.
pub fn object<'a>(parent: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>, CniError> {
    typed(parent, name, "an object", Value::as_object)
}

/// A field that must be a list.
///
/// # Errors
/// Code 6, naming the field.
pub fn array<'a>(parent: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Vec<Value>>, CniError> {
    typed(parent, name, "a list", Value::as_array)
}

/// A field that must be a whole number, not negative.
///
/// # Errors
/// Code 6, naming the field.
pub fn number(object: &Map<String, Value>, name: &str) -> Result<Option<u32>, CniError> {
    typed(object, name, "a whole number of at least 0", |value| value.as_u64().and_then(|n| u32::try_from(n).ok()))
}

fn typed<'a, T>(
    object: &'a Map<String, Value>,
    name: &str,
    what: &str,
    read: impl Fn(&'a Value) -> Option<T>,
) -> Result<Option<T>, CniError> {
    let Some(value) = field(object, name) else { return Ok(None) };
    read(value).map(Some).ok_or_else(|| CniError::decode(format!("{name} must be {what}")))
}

/// The answer to VERSION of a plugin that supports `since` and later.
pub fn version_answer(since: &str) -> String {
    let supported: Vec<&str> = VERSIONS.into_iter().skip_while(|version| *version != since).collect();
    json!({ "cniVersion": "1.1.0", "supportedVersions": supported }).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(env: &[(&str, &str)], stdin: &str, want: Expect) {
        let env = Environment::from(|name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()));
        let got = match env.command().and_then(|command| Invocation::new(command.expect("a command"), &env, stdin)) {
            Ok(invocation) => {
                let request = invocation.request();
                format!("{:?} {} {} {}", request.command, request.name, request.version, request.container_id)
            }
            Err(error) => format!("{}: {} {}", error.code, error.msg, error.details),
        };
        want.assert_eq(&got);
    }

    const ADD: [(&str, &str); 5] =
        [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_NETNS", "/ns"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/bin")];

    #[test]
    fn requests() {
        check(&ADD, r#"{"cniVersion":"1.0.0","name":"n","type":"flannel"}"#, expect!["Add n 1.0.0 c1"]);
        check(&ADD, r#"{"CNIVERSION":"0.3.1","Name":"n"}"#, expect!["Add n 0.3.1 c1"]);
        check(&ADD, r#"{"name":"n"}"#, expect!["Add n 0.1.0 c1"]);
    }

    #[test]
    fn errors_carry_the_specifications_code() {
        check(
            &[("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "")],
            "{}",
            expect!["4: required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing "],
        );
        check(&[("CNI_COMMAND", "GC")], "{}", expect!["4: required env variables [CNI_PATH] missing "]);
        check(&[("CNI_COMMAND", "FROB")], "{}", expect!["4: unknown CNI_COMMAND: FROB "]);
        check(&ADD, "garbage", expect!["6: the configuration on standard input is not JSON: expected value at line 1 column 1 "]);
        check(&ADD, "[]", expect!["6: the configuration on standard input is not a JSON object "]);
        check(&ADD, r#"{"name":7}"#, expect!["6: name must be a string "]);
        check(
            &ADD,
            r#"{"name":"../x"}"#,
            expect![[r#"7: name: invalid or missing network name "../x": it must match [a-zA-Z0-9][a-zA-Z0-9_.-]* "#]],
        );
        check(
            &ADD,
            r#"{"name":"n","cniVersion":"9.0.0"}"#,
            expect![[
                r#"1: incompatible CNI versions config is "9.0.0", plugin supports ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]"#
            ]],
        );
        let mut env = ADD;
        env[0].1 = "CHECK";
        check(
            &env,
            r#"{"name":"n","cniVersion":"0.3.1"}"#,
            expect![[r#"1: incompatible CNI versions config version "0.3.1" does not allow CHECK"#]],
        );
        let mut env = ADD;
        env[1].1 = "../../etc";
        check(&env, "{}", expect![[r#"4: invalid CNI_CONTAINERID "../../etc": it must match [a-zA-Z0-9][a-zA-Z0-9_.-]* "#]]);
        let mut env = ADD;
        env[3].1 = "a/b";
        check(
            &env,
            "{}",
            expect![[
                r#"4: invalid CNI_IFNAME: "a/b" is not an interface name (invalid character or length: 1 to 15 bytes, no slash, colon or white space) "#
            ]],
        );
    }

    #[test]
    fn errors_are_indented_json() {
        expect![[r#"
            {
                "code": 7,
                "msg": "x"
            }"#]]
        .assert_eq(&CniError::config("x").to_json());
    }
}
