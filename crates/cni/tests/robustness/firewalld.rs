//! The firewall plugin on a host with firewalld. A thread that serves a socket stands in for the message bus and firewalld.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::host::Host;
use super::{network, parse, shell};

// The D-Bus specification's "Message Format": types of messages, and codes of header fields.
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const SIGNATURE: u8 = 8;
const PROTOCOL_VERSION: u8 = 1;
/// The bytes of a header before its array of fields.
const FIXED_HEADER: usize = 16;
/// The client's last line of the authentication.
const BEGIN: &[u8] = b"BEGIN\r\n";
/// The serial number of every message of this bus; the plugin ignores it.
const SERIAL: u32 = 9;

/// The calls that the plugin made, each a method and its arguments.
type Calls = Arc<Mutex<Vec<String>>>;

/// A bus with a firewalld: adding to `internal` fails as already set, only `trusted` reports the source, zone `unknown` does
/// not exist.
fn firewalld(host: &Host) -> Calls {
    let listener = UnixListener::bind(host.root.join("bus")).unwrap();
    let calls = Calls::default();
    let seen = calls.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let seen = seen.clone();
            // The plugin ends a connection when it is done.
            std::thread::spawn(move || serve(stream, &seen));
        }
    });
    calls
}

fn serve(mut stream: UnixStream, calls: &Calls) -> std::io::Result<()> {
    let mut line = Vec::new();
    // The request to authenticate as user 0, `30` in hexadecimal digits.
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    assert_eq!(String::from_utf8_lossy(&line), "\0AUTH EXTERNAL 30\r\n");
    stream.write_all(b"OK 0123456789abcdef\r\n")?;
    stream.read_exact(&mut [0; BEGIN.len()])?;
    loop {
        let mut start = [0; FIXED_HEADER];
        stream.read_exact(&mut start)?;
        let number = |at: usize| u32::from_le_bytes(start[at..at + 4].try_into().unwrap());
        let (body, serial, fields) = (number(4) as usize, number(8), number(12) as usize);
        let mut rest = vec![0; fields.next_multiple_of(8) + body];
        stream.read_exact(&mut rest)?;
        let header = String::from_utf8_lossy(&rest[..fields]).into_owned();
        let arguments = strings(&rest[fields.next_multiple_of(8)..]);
        let method = ["Hello", "GetNameOwner", "addSource", "removeSource", "querySource"].into_iter().find(|name| header.contains(name));
        let method = method.expect("a method of the bus or of a zone");
        if method.ends_with("Source") {
            calls.lock().unwrap().push(format!("{method} {}", arguments.join(" ")));
        }
        // A signal that the caller did not ask for comes first, as on a real bus.
        stream.write_all(&message(SIGNAL, 0, "", &[]))?;
        let zone = arguments.first().map_or("", String::as_str);
        stream.write_all(&match (method, zone) {
            ("addSource", "internal") => message(ERROR, serial, "s", b"\x10\0\0\0ZONE_ALREADY_SET\0"),
            ("addSource", "unknown") => message(ERROR, serial, "s", b"\x0c\0\0\0INVALID_ZONE\0"),
            ("removeSource", "unknown") => message(ERROR, serial, "s", b"\x0e\0\0\0UNKNOWN_SOURCE\0"),
            ("querySource", _) => message(METHOD_RETURN, serial, "b", &[u8::from(zone == "trusted"), 0, 0, 0]),
            _ => message(METHOD_RETURN, serial, "s", b"\x01\0\0\0x\0"),
        })?;
    }
}

/// The strings of a body.
fn strings(mut body: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    while let Some(length) = body.get(..4) {
        let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
        found.push(String::from_utf8_lossy(&body[4..4 + length]).into_owned());
        body = body.get((4 + length + 1).next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Encodes a message of the bus, without the header fields that a caller ignores.
fn message(kind: u8, reply_serial: u32, signature: &str, body: &[u8]) -> Vec<u8> {
    let mut fields = vec![REPLY_SERIAL, 1, b'u', 0];
    fields.extend(reply_serial.to_le_bytes());
    if kind == ERROR {
        fields.extend([ERROR_NAME, 1, b's', 0, 3, 0, 0, 0, b'a', b'.', b'b', 0, 0, 0, 0, 0]);
    }
    fields.extend([SIGNATURE, 1, b'g', 0, u8::try_from(signature.len()).unwrap()]);
    fields.extend(signature.as_bytes());
    fields.push(0);
    let number = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
    let mut bytes = vec![b'l', kind, 0, PROTOCOL_VERSION];
    bytes.extend(number(body.len()));
    bytes.extend(SERIAL.to_le_bytes());
    bytes.extend(number(fields.len()));
    bytes.extend(fields);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(body);
    bytes
}

pub(super) fn firewalld_is_used_where_it_runs(host: &Host) {
    let _pod = host.pod("c1");
    let previous = parse(&host.call("bridge", "ADD", "c1", &network(host, 5)).unwrap());
    let address = previous["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    let conf = |more: Value| {
        let mut conf = json!({ "cniVersion": "1.0.0", "name": "net5", "type": "firewall", "prevResult": previous });
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        conf.to_string()
    };
    let bus = format!("unix:path=/absent;unix:path={},guid=1", host.root.join("bus").display());
    let call = |verb: &str, more: Value| host.call_with("firewall", verb, "c1", &conf(more), &[("DBUS_SYSTEM_BUS_ADDRESS", &bus)]);
    let rules = || shell(&host.netns, "iptables-save -t filter").matches(&address).count();

    let error = call("ADD", json!({ "backend": "firewalld" })).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("backend: cannot reach firewalld: "), "{error}");
    call("ADD", json!({})).unwrap();
    assert_eq!(rules(), 2, "iptables is used when firewalld does not run");
    let calls = firewalld(host);
    let take = || std::mem::take(&mut *calls.lock().unwrap());
    call("DEL", json!({})).unwrap();
    assert_eq!((rules(), take()), (0, vec![format!("removeSource trusted {address}/32")]), "DEL undoes both");

    call("ADD", json!({})).unwrap();
    call("CHECK", json!({})).unwrap();
    assert_eq!(take(), [format!("addSource trusted {address}/32"), format!("querySource trusted {address}/32")]);
    assert_eq!(rules(), 0);
    let internal = || json!({ "backend": "firewalld", "firewalldZone": "internal" });
    call("ADD", internal()).unwrap();
    let error = call("CHECK", internal()).unwrap_err();
    assert_eq!(error["msg"], format!("{address} is not a source of firewalld's zone \"internal\""));
    take();
    let error = call("ADD", json!({ "firewalldZone": "unknown" })).unwrap_err();
    assert_eq!(error["msg"], format!("cannot make {address} a source of firewalld's zone \"unknown\": a.b: INVALID_ZONE"));
    assert_eq!(take(), [format!("addSource unknown {address}/32"), format!("removeSource unknown {address}/32")]);
    call("ADD", json!({ "backend": "iptables" })).unwrap();
    call("DEL", json!({ "backend": "iptables" })).unwrap();
    assert!(take().is_empty());
    assert_eq!(rules(), 0);
}
