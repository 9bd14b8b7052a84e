//! The firewall plugin on a host with firewalld, which a thread on a socket stands for.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::host::Host;
use super::{network, parse, shell};

/// What was called, each call a method and its arguments.
type Calls = Arc<Mutex<Vec<String>>>;

/// A message bus with a firewalld that knows the zones `trusted` and `internal`, and one address in the latter.
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
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    assert_eq!(String::from_utf8_lossy(&line), "\0AUTH EXTERNAL 30\r\n");
    stream.write_all(b"OK 0123456789abcdef\r\n")?;
    stream.read_exact(&mut [0; 7])?;
    loop {
        let mut start = [0; 16];
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
        stream.write_all(&message(4, 0, "", &[]))?;
        let zone = arguments.first().map_or("", String::as_str);
        stream.write_all(&match (method, zone) {
            ("addSource", "internal") => message(3, serial, "s", b"\x10\0\0\0ZONE_ALREADY_SET\0"),
            ("addSource", "unknown") => message(3, serial, "s", b"\x0c\0\0\0INVALID_ZONE\0"),
            ("removeSource", "unknown") => message(3, serial, "s", b"\x0e\0\0\0UNKNOWN_SOURCE\0"),
            ("querySource", _) => message(2, serial, "b", &[u8::from(zone == "trusted"), 0, 0, 0]),
            _ => message(2, serial, "s", b"\x01\0\0\0x\0"),
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

/// A message of the bus; fields that a caller ignores are left out.
fn message(kind: u8, reply_serial: u32, signature: &str, body: &[u8]) -> Vec<u8> {
    let mut fields = vec![5, 1, b'u', 0];
    fields.extend(reply_serial.to_le_bytes());
    if kind == 3 {
        fields.extend([4, 1, b's', 0, 3, 0, 0, 0, b'a', b'.', b'b', 0, 0, 0, 0, 0]);
    }
    fields.extend([8, 1, b'g', 0, u8::try_from(signature.len()).unwrap()]);
    fields.extend(signature.as_bytes());
    fields.push(0);
    let number = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
    let mut bytes = vec![b'l', kind, 0, 1];
    bytes.extend(number(body.len()));
    bytes.extend(9u32.to_le_bytes());
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
    assert_eq!(rules(), 2, "iptables where firewalld does not run");
    let calls = firewalld(host);
    let take = || std::mem::take(&mut *calls.lock().unwrap());
    call("DEL", json!({})).unwrap();
    assert_eq!((rules(), take()), (0, vec![format!("removeSource trusted {address}/32")]), "both are undone");

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
