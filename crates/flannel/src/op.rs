//! The narrow waist: every change to the kernel is an [`Op`], every answer an [`Outcome`].

use std::fmt;

use crate::object::Object;
use crate::observed::Observed;

/// A change to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Make the object be there, exactly so: create it or replace what is at its key.
    Set(Object),
    /// Make the object be gone. That it is gone already is success.
    Delete(Object),
}

impl Op {
    /// The object to set or delete.
    pub fn object(&self) -> &Object {
        match self {
            Op::Set(object) | Op::Delete(object) => object,
        }
    }

    /// The operation in one line, for logs.
    pub fn summary(&self) -> String {
        match self {
            Op::Set(object) => format!("set {}", object.summary()),
            Op::Delete(object) => format!("delete {}", object.summary()),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Set(object) => write!(f, "set {object}"),
            Op::Delete(object) => write!(f, "delete {object}"),
        }
    }
}

/// Why the kernel refused an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpError {
    /// The error number of `errno.h`.
    pub errno: i32,
    /// What was tried and what the kernel said (its extended ack, where it gave one).
    pub text: String,
}

impl fmt::Display for OpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for OpError {}

/// The answer to one operation.
pub type Outcome = Result<(), OpError>;

impl Observed {
    /// The same as [`Observed::apply`] for each, which for many at once is cheaper.
    pub fn apply_all(&mut self, ops: Vec<Op>) {
        let mut set = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                // An object that was set and is deleted by the same list is gone.
                Op::Delete(object) => {
                    self.extend(set.drain(..));
                    self.remove(&object.key());
                }
                Op::Set(object) => set.push(object),
            }
        }
        self.extend(set);
    }

    /// The model kernel: what would be there after the operation. Laws are checked against it, and the daemon keeps
    /// its memory of the kernel current with it.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Set(object) => self.insert(object.clone()),
            Op::Delete(object) => self.remove(&object.key()),
        }
    }
}
