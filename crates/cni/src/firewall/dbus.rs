//! A minimal D-Bus client for calls of firewalld: a connection to the system bus, and method calls with strings (D-Bus
//! specification 0.43, "Message Protocol").

use std::io::{Error, ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::Duration;

/// The timeout of an answer, the same as in D-Bus' own programs.
const TIMEOUT: Duration = Duration::from_secs(25);
/// The maximum length of a received message, in bytes.
const MAX_MESSAGE: usize = 1 << 20;
const SYSTEM_BUS: &str = "unix:path=/run/dbus/system_bus_socket";

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// A connection to a bus.
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
}

/// A method of a service.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    pub(super) service: &'static str,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
    pub(super) name: &'static str,
}

/// The reason why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    /// The bus cannot be reached, or does not speak D-Bus.
    Bus(Error),
    /// The service answered with an error: its name and text.
    Refused(String),
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CallError::Bus(error) => error.fmt(f),
            CallError::Refused(text) => f.write_str(text),
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> CallError {
        CallError::Bus(error)
    }
}

fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("the message bus sent {what}"))
}

impl Bus {
    /// Connects to the system bus and registers there.
    pub(super) fn system() -> Result<Bus, CallError> {
        let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_default();
        let mut bus = Bus { stream: connect(if address.is_empty() { SYSTEM_BUS } else { &address })?, serial: 0 };
        bus.stream.set_read_timeout(Some(TIMEOUT))?;
        bus.stream.set_write_timeout(Some(TIMEOUT))?;
        bus.authenticate()?;
        let hello =
            Method { service: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", interface: "org.freedesktop.DBus", name: "Hello" };
        bus.call(hello, &[])?;
        Ok(bus)
    }

    /// Authenticates this process by its user ID, which the bus reads from the socket.
    fn authenticate(&mut self) -> Result<(), Error> {
        let user = std::fs::metadata("/proc/self")?.uid().to_string();
        let user: String = user.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.stream.write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
            if line.len() > 512 {
                return Err(malformed("a line without end"));
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(Error::new(ErrorKind::PermissionDenied, "the message bus refused this process"));
        }
        self.stream.write_all(b"BEGIN\r\n")
    }

    /// Calls a method with strings, and returns the first value of its answer; false if that is not a boolean.
    pub(super) fn call(&mut self, method: Method, arguments: &[&str]) -> Result<bool, CallError> {
        self.serial += 1;
        self.stream.write_all(&encode(method, arguments, self.serial))?;
        loop {
            let mut message = self.receive()?;
            // A signal, or the answer to another call.
            if message.reply_serial != Some(self.serial) {
                continue;
            }
            return match message.kind {
                METHOD_RETURN if message.signature.starts_with('b') => Ok(message.body.number()? != 0),
                METHOD_RETURN => Ok(false),
                ERROR => {
                    let text = if message.signature.starts_with('s') { message.body.string()? } else { String::new() };
                    Err(CallError::Refused(format!("{}: {text}", message.error)))
                }
                _ => Err(malformed("an answer of an unknown type").into()),
            };
        }
    }

    fn receive(&mut self) -> Result<Message, Error> {
        let mut start = [0; 16];
        self.stream.read_exact(&mut start)?;
        let is_big = match start[0] {
            b'l' => false,
            b'B' => true,
            _ => return Err(malformed("no D-Bus message")),
        };
        let mut header = Reader { bytes: start.to_vec(), at: 4, is_big };
        let (body, _serial, fields) = (header.number()? as usize, header.number()?, header.number()? as usize);
        if body > MAX_MESSAGE || fields > MAX_MESSAGE {
            return Err(malformed("a message that is too long"));
        }
        // The fields begin at offset 16, a multiple of 8, so that a reader of its own aligns them as in the whole message.
        let mut bytes = vec![0; fields.next_multiple_of(8) + body];
        self.stream.read_exact(&mut bytes)?;
        let body = bytes.split_off(fields.next_multiple_of(8));
        bytes.truncate(fields);
        let mut message = Message {
            kind: start[1],
            reply_serial: None,
            error: String::new(),
            signature: String::new(),
            body: Reader { bytes: body, at: 0, is_big },
        };
        let mut fields = Reader { bytes, at: 0, is_big };
        while fields.at < fields.bytes.len() {
            fields.align(8);
            let code = fields.byte()?;
            match (code, fields.signature()?.as_str()) {
                (REPLY_SERIAL, "u") => message.reply_serial = Some(fields.number()?),
                (ERROR_NAME, "s") => message.error = fields.string()?,
                (SIGNATURE, "g") => message.signature = fields.signature()?,
                (_, "u") => drop(fields.number()?),
                (_, "s" | "o") => drop(fields.string()?),
                (_, "g") => drop(fields.signature()?),
                _ => return Err(malformed("a header field of an unknown type")),
            }
        }
        Ok(message)
    }
}

/// Connects to the first reachable address of a list.
fn connect(list: &str) -> Result<UnixStream, Error> {
    let mut failed = Error::new(ErrorKind::InvalidInput, format!("{list:?} has no unix address"));
    for address in list.split(';').filter_map(|address| address.strip_prefix("unix:")) {
        let value = |key: &str| address.split(',').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')).map(unescape);
        let connected = match (value("path"), value("abstract")) {
            (Some(path), _) => UnixStream::connect(std::ffi::OsString::from(String::from_utf8_lossy(&path).into_owned())),
            (None, Some(name)) => SocketAddr::from_abstract_name(name).and_then(|address| UnixStream::connect_addr(&address)),
            (None, None) => continue,
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Decodes a value of an address, in which `%` and two hexadecimal digits stand for a byte.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.bytes().next() {
        let escaped = rest.strip_prefix('%').and_then(|digits| u8::from_str_radix(digits.get(..2)?, 16).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = rest.get(if escaped.is_some() { 3 } else { 1 }..).unwrap_or_default();
    }
    bytes
}

/// The parts of a received message that a call needs.
struct Message {
    kind: u8,
    reply_serial: Option<u32>,
    error: String,
    signature: String,
    body: Reader,
}

/// Decodes values, each aligned to its size.
struct Reader {
    bytes: Vec<u8>,
    at: usize,
    is_big: bool,
}

impl Reader {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Result<&[u8], Error> {
        let end = self.at.checked_add(length).ok_or_else(|| malformed("a message that is too short"))?;
        let taken = self.bytes.get(self.at..end).ok_or_else(|| malformed("a message that is too short"))?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u32, Error> {
        self.align(4);
        let is_big = self.is_big;
        let bytes: [u8; 4] = self.take(4)?.try_into().expect("four were taken");
        Ok(if is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    fn string(&mut self) -> Result<String, Error> {
        let length = self.number()? as usize;
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte().map(|_| text)
    }

    fn signature(&mut self) -> Result<String, Error> {
        let length = self.byte()?.into();
        let text = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.byte().map(|_| text)
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes.push(0);
}

/// Encodes a method call with strings.
fn encode(method: Method, arguments: &[&str], serial: u32) -> Vec<u8> {
    let mut body = Vec::new();
    arguments.iter().for_each(|argument| put_string(&mut body, argument));
    let mut fields = Vec::new();
    for (code, kind, text) in
        [(PATH, b'o', method.path), (INTERFACE, b's', method.interface), (MEMBER, b's', method.name), (DESTINATION, b's', method.service)]
    {
        fields.resize(fields.len().next_multiple_of(8), 0);
        fields.extend([code, 1, kind, 0]);
        put_string(&mut fields, text);
    }
    if !arguments.is_empty() {
        fields.resize(fields.len().next_multiple_of(8), 0);
        fields.extend([SIGNATURE, 1, b'g', 0, u8::try_from(arguments.len()).unwrap_or(u8::MAX)]);
        fields.extend("s".repeat(arguments.len()).into_bytes());
        fields.push(0);
    }
    let number = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    let mut message = vec![b'l', METHOD_CALL, 0, 1];
    message.extend(number(body.len()));
    message.extend(serial.to_le_bytes());
    message.extend(number(fields.len()));
    message.extend(&fields);
    message.resize(message.len().next_multiple_of(8), 0);
    message.extend(body);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_addresses_are_unescaped() {
        assert_eq!(unescape("/tmp/a%20b%"), b"/tmp/a b%");
        assert!(connect("tcp:host=x").unwrap_err().to_string().contains("no unix address"));
        assert_eq!(connect("unix:path=/absent,guid=1;unix:abstract=absent").unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }

    #[test]
    fn calls_are_aligned() {
        let method = Method { service: "a.b", path: "/a", interface: "a.b", name: "C" };
        let message = encode(method, &["x", "y"], 7);
        assert_eq!(&message[..8], [b'l', 1, 0, 1, 14, 0, 0, 0]);
        assert_eq!((message.len() - 14) % 8, 0);
        assert_eq!(&message[message.len() - 14..], b"\x01\0\0\0x\0\0\0\x01\0\0\0y\0");
    }

    #[test]
    fn truncated_messages_are_errors() {
        for bytes in [vec![], vec![9, 0, 0, 0, b'x'], vec![255; 8]] {
            assert!(Reader { bytes, at: 0, is_big: false }.string().is_err());
        }
    }
}
