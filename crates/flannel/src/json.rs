//! JSON as Go's `encoding/json` reads it: field names match case-insensitively, unknown fields are ignored, the last
//! duplicate wins (specification, section 0, point 1). One place, so that every wire form is equally tolerant.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// A JSON object whose field names are lower-cased, each value kept as it was written.
#[derive(Debug, Default)]
pub(crate) struct Fields(BTreeMap<String, Box<RawValue>>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    fields.insert(name.to_lowercase(), value);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    /// Parses one object; trailing text is an error.
    pub(crate) fn parse(text: &str) -> Result<Fields, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The value of a field named in lower case, as it was written.
    pub(crate) fn raw(&self, name: &str) -> Option<&RawValue> {
        debug_assert_eq!(name, name.to_lowercase());
        self.0.get(name).map(Box::as_ref)
    }

    /// A field that must have type `T` when it is there. JSON `null` counts as absent.
    pub(crate) fn get<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Result<Option<T>, serde_json::Error> {
        match self.raw(name) {
            None => Ok(None),
            Some(raw) => serde_json::from_str::<Option<T>>(raw.get()),
        }
    }

    /// Is the field there with the value `null`?
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|raw| raw.get().trim() == "null")
    }
}

/// The same JSON without white space between its tokens; object keys keep their order as far as they are unique.
pub(crate) fn compact(raw: &RawValue) -> Option<Box<str>> {
    // A value that is already compact (what every flanneld writes) is taken as it stands.
    let text = raw.get();
    if !text.contains([' ', '\t', '\n', '\r']) {
        return Some(text.into());
    }
    let value: Value = serde_json::from_str(text).ok()?;
    serde_json::to_string(&value).ok().map(Into::into)
}
