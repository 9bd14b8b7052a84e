//! Parses JSON objects as Go's `encoding/json` does: field names match case-insensitively, unknown fields are ignored, the last
//! duplicate wins (specification, section 0, point 1). All wire formats use it, so they are equally lenient.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// A JSON object with unparsed values. An object has few fields, but a list of leases has ten thousand objects: so lookup is a linear
/// search, and text is borrowed where possible.
#[derive(Debug, Default)]
pub(crate) struct Fields<'a>(Vec<(Name<'a>, &'a RawValue)>);

/// A field name. Non-ASCII letters are lower-cased here; lookup ignores the case of ASCII letters.
#[derive(Debug)]
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(if text.is_ascii() { Cow::Borrowed(text) } else { Cow::Owned(text.to_lowercase()) }))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(text.to_lowercase())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::with_capacity(4);
                while let Some(field) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl<'a> Fields<'a> {
    /// Parses one object; trailing text is an error.
    pub(crate) fn parse(text: &'a str) -> Result<Fields<'a>, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// The unparsed value of a field. `name` is in lower case.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        debug_assert_eq!(name, name.to_lowercase());
        // The names of a lease differ in their length or at their end.
        let is_it = |field: &str| {
            field.len() == name.len() && field.bytes().rev().zip(name.bytes().rev()).all(|(a, b)| a.to_ascii_lowercase() == b)
        };
        self.0.iter().rev().find(|(field, _)| is_it(&field.0)).map(|(_, value)| *value)
    }

    /// The value of a field, which must have type `T` if present. JSON `null` counts as absent.
    pub(crate) fn get<T: Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, serde_json::Error> {
        match self.raw(name) {
            None => Ok(None),
            Some(raw) => serde_json::from_str::<Option<T>>(raw.get()),
        }
    }

    /// The value of a string field. Like [`Fields::get`], but text without escapes is not copied.
    pub(crate) fn text(&self, name: &str) -> Result<Option<Cow<'a, str>>, serde_json::Error> {
        let Some(raw) = self.raw(name).map(RawValue::get) else { return Ok(None) };
        let plain = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).filter(|text| !text.contains('\\'));
        match plain {
            Some(text) => Ok(Some(Cow::Borrowed(text))),
            None if raw == "null" => Ok(None),
            None => Ok(serde_json::from_str::<Option<String>>(raw)?.map(Cow::Owned)),
        }
    }

    /// Whether the field is present with the value `null`.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.raw(name).is_some_and(|raw| raw.get().trim() == "null")
    }
}

/// Removes white space between JSON tokens; unique object keys keep their order.
pub(crate) fn compact(raw: &RawValue) -> Option<Box<str>> {
    // Every flanneld writes compact values, which need no change.
    let text = raw.get();
    if !text.contains([' ', '\t', '\n', '\r']) {
        return Some(text.into());
    }
    let value: Value = serde_json::from_str(text).ok()?;
    serde_json::to_string(&value).ok().map(Into::into)
}
