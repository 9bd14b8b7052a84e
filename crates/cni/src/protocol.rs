//! The protocol shell that all plugins share: environment, configuration, versions, errors (CNI specification 1.1.0;
//! ours, section 7.1).

use std::path::PathBuf;

use serde_json::{Map, Value, json};

/// Versions of the specification that are spoken.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// An error as the runtime reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniError {
    /// The specification's code; 999 for an internal error.
    pub code: u32,
    /// What went wrong: the act, the object, the fix.
    pub msg: String,
    /// More, or nothing.
    pub details: String,
}

impl CniError {
    /// An error with a code of the specification.
    pub fn new(code: u32, msg: impl Into<String>) -> CniError {
        CniError { code, msg: msg.into(), details: String::new() }
    }

    /// Code 2: a field that this plugin does not know how to honour.
    pub fn unsupported(msg: impl Into<String>) -> CniError {
        CniError::new(2, msg)
    }

    /// Code 4: the environment lacks something or has something unusable.
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

    /// Code 999: the work failed.
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

/// What the runtime wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Is the attachment as it was made?
    Check,
    /// Remove what belongs to no valid attachment.
    Gc,
    /// Could an ADD succeed?
    Status,
    /// Which versions are spoken?
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
}

impl Environment {
    /// Reads the variables from a function that knows them.
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
        }
    }

    /// The command; `None` when this was not called by a runtime at all.
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

/// One call of a plugin, validated.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// The container; empty for GC and STATUS.
    pub container_id: String,
    /// The path of its network namespace.
    pub netns: Option<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be the host's own.
    pub netns_override: bool,
    /// The interface in it; empty for GC and STATUS.
    pub ifname: String,
    /// `CNI_ARGS`, as it came.
    pub args: String,
    /// The directories of `CNI_PATH`.
    pub path: Vec<PathBuf>,
    /// The network's name.
    pub name: String,
    /// The configuration's version of the specification.
    pub version: String,
    /// The whole configuration.
    pub conf: Map<String, Value>,
}

impl Request {
    /// Reads and validates one call.
    ///
    /// # Errors
    /// With the specification's code, naming the variable or the field.
    pub fn new(command: Command, environment: &Environment, stdin: &str) -> Result<Request, CniError> {
        environment.require(command)?;
        let container_id = environment.container_id.clone().unwrap_or_default();
        let ifname = environment.ifname.clone().unwrap_or_default();
        if !container_id.is_empty() && !is_identifier(&container_id) {
            return Err(CniError::environment(format!(
                "invalid CNI_CONTAINERID {container_id:?}: it must match [a-zA-Z0-9][a-zA-Z0-9_.-]*"
            )));
        }
        if !ifname.is_empty() {
            ifname.parse::<::flannel::IfName>().map_err(|error| CniError::environment(format!("invalid CNI_IFNAME: {error}")))?;
        }
        let conf: Value = serde_json::from_str(stdin)
            .map_err(|error| CniError::decode(format!("the configuration on standard input is no JSON: {error}")))?;
        let Value::Object(conf) = conf else { return Err(CniError::decode("the configuration on standard input is no JSON object")) };
        let mut request = Request {
            command,
            container_id,
            netns: environment.netns.clone().map(PathBuf::from),
            netns_override: environment.netns_override.as_deref().is_some_and(|text| text == "1" || text.eq_ignore_ascii_case("true")),
            ifname,
            args: environment.args.clone().unwrap_or_default(),
            path: environment.path.as_deref().unwrap_or_default().split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
            name: String::new(),
            version: String::new(),
            conf,
        };
        request.check()?;
        Ok(request)
    }

    /// The same call with another configuration: what a delegate in this process gets.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub fn with_conf(&self, command: Command, conf: Map<String, Value>) -> Result<Request, CniError> {
        let mut request = Request { command, conf, ..self.clone() };
        request.check()?;
        Ok(request)
    }

    fn check(&mut self) -> Result<(), CniError> {
        self.name = string(&self.conf, "name")?.unwrap_or_default().to_owned();
        if !is_identifier(&self.name) {
            return Err(CniError::config(format!(
                "name: invalid or missing network name {:?}: it must match [a-zA-Z0-9][a-zA-Z0-9_.-]*",
                self.name
            )));
        }
        self.version = string(&self.conf, "cniVersion")?.filter(|version| !version.is_empty()).unwrap_or("0.1.0").to_owned();
        let spoken = VERSIONS.iter().position(|version| *version == self.version);
        let (needed, what) = match self.command {
            Command::Check => ("0.4.0", "CHECK"),
            Command::Gc => ("1.1.0", "GC"),
            Command::Status => ("1.1.0", "STATUS"),
            _ => ("0.1.0", ""),
        };
        let details = match spoken {
            None => format!("config is {:?}, plugin supports {VERSIONS:?}", self.version),
            Some(at) if VERSIONS.iter().position(|version| *version == needed) > Some(at) => {
                format!("config version {:?} does not allow {what}", self.version)
            }
            Some(_) => return Ok(()),
        };
        Err(CniError { code: 1, msg: "incompatible CNI versions".to_owned(), details })
    }

    /// Is the configuration's version this one or later?
    ///
    /// # Errors
    /// Code 1.
    pub fn require_version(&self, since: &str) -> Result<(), CniError> {
        let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
        if place(&self.version) >= place(since) {
            return Ok(());
        }
        let details = format!("config is {:?}, plugin supports {since} and later", self.version);
        Err(CniError { code: 1, msg: "incompatible CNI versions".to_owned(), details })
    }

    /// A value of `CNI_ARGS`.
    ///
    /// # Errors
    /// When `CNI_ARGS` is malformed, or has keys that nobody knows and `IgnoreUnknown` is not set.
    pub fn arg(&self, name: &str) -> Result<Option<&str>, CniError> {
        let mut found = None;
        let mut unknown = None;
        let mut tolerant = false;
        for pair in self.args.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .filter(|(_, value)| !value.contains('='))
                .ok_or_else(|| CniError::environment(format!("CNI_ARGS: invalid pair {pair:?}: it must be KEY=VALUE")))?;
            match key {
                "IgnoreUnknown" => tolerant = matches!(value, "1" | "true"),
                "IP" | "MAC" => {}
                _ => unknown = Some(key),
            }
            if key == name {
                found = Some(value);
            }
        }
        match unknown.filter(|_| !tolerant) {
            Some(key) => Err(CniError::environment(format!("CNI_ARGS: unknown args [{key:?}]: set IgnoreUnknown=1 to pass them"))),
            None => Ok(found),
        }
    }

    /// The attachments that are valid, of a GC: container and interface.
    ///
    /// # Errors
    /// When the list is not there or malformed: nothing may be collected then.
    pub fn valid_attachments(&self) -> Result<Vec<(String, String)>, CniError> {
        let field = "cni.dev/valid-attachments";
        let list = self
            .conf
            .get(field)
            .and_then(Value::as_array)
            .ok_or_else(|| CniError::config(format!("{field}: GC needs the list of valid attachments")))?;
        let read = |entry: &Value| Some((entry.get("containerID")?.as_str()?.to_owned(), entry.get("ifname")?.as_str()?.to_owned()));
        list.iter()
            .map(read)
            .collect::<Option<_>>()
            .ok_or_else(|| CniError::config(format!("{field}: each entry needs containerID and ifname")))
    }
}

fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric()) && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// A field by its name, case-insensitively as Go reads it; the exact spelling goes first, a `null` is nothing.
pub fn field<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let found = object.get(name).or_else(|| object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value));
    found.filter(|value| !value.is_null())
}

/// A field that must be a string.
///
/// # Errors
/// Code 6, naming the field.
pub fn string<'a>(object: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, CniError> {
    typed(object, name, "a string", Value::as_str)
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
    read(value).map(Some).ok_or_else(|| CniError::decode(format!("{name}: it must be {what}")))
}

/// The answer to VERSION of a plugin that speaks `since` and everything later.
pub fn version_answer(since: &str) -> String {
    let spoken: Vec<&str> = VERSIONS.into_iter().skip_while(|version| *version != since).collect();
    json!({ "cniVersion": "1.1.0", "supportedVersions": spoken }).to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(env: &[(&str, &str)], stdin: &str, want: Expect) {
        let env = Environment::from(|name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()));
        let got = match env.command().and_then(|command| Request::new(command.expect("a command"), &env, stdin)) {
            Ok(request) => format!("{:?} {} {} {}", request.command, request.name, request.version, request.container_id),
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
    fn what_is_wrong_is_named_with_the_specifications_code() {
        check(
            &[("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "")],
            "{}",
            expect!["4: required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing "],
        );
        check(&[("CNI_COMMAND", "GC")], "{}", expect!["4: required env variables [CNI_PATH] missing "]);
        check(&[("CNI_COMMAND", "FROB")], "{}", expect!["4: unknown CNI_COMMAND: FROB "]);
        check(&ADD, "garbage", expect!["6: the configuration on standard input is no JSON: expected value at line 1 column 1 "]);
        check(&ADD, "[]", expect!["6: the configuration on standard input is no JSON object "]);
        check(&ADD, r#"{"name":7}"#, expect!["6: name: it must be a string "]);
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
            expect![[r#"4: invalid CNI_IFNAME: "a/b" is not an interface name (1 to 15 bytes, no slash, colon or white space) "#]],
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
