//! The interface between decisions and the kernel: every change is an [`Op`], and its result an [`Outcome`].

use std::fmt;

use crate::object::Object;
use crate::observed::Observed;

/// A change to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Create the object, or replace the one with its key.
    Set(Object),
    /// Delete the object. It is no error if it does not exist.
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

/// The reason why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpError {
    /// The error number of `errno.h`.
    pub errno: i32,
    /// The operation and the kernel's message (its extended ack, if any).
    pub text: String,
}

impl fmt::Display for OpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for OpError {}

/// The result of one operation.
pub type Outcome = Result<(), OpError>;

impl Observed {
    /// Like [`Observed::apply`] for each operation, but faster for many.
    pub fn apply_all(&mut self, ops: Vec<Op>) {
        let mut set = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                // A list may set and then delete the same object.
                Op::Delete(object) => {
                    self.extend(set.drain(..));
                    self.remove(&object.key());
                }
                Op::Set(object) => set.push(object),
            }
        }
        self.extend(set);
    }

    /// Changes the observed state as the operation changes the kernel. The daemon updates its view of the kernel with it, and property
    /// tests use it as a model of the kernel.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Set(object) => self.insert(object.clone()),
            Op::Delete(object) => self.remove(&object.key()),
        }
    }
}
