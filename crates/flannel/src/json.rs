//! JSON as Go's `encoding/json` reads it: field names match case-insensitively, unknown fields are ignored, the last
//! duplicate wins (specification, section 0, point 1). One place, so that every wire form is equally tolerant.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// A JSON object, each value kept as it was written. There are few fields in one, and ten thousand objects in a list of leases: so
/// they are looked for one after the other, and nothing is copied that need not be.
#[derive(Debug, Default)]
pub(crate) struct Fields<'a>(Vec<(Name<'a>, &'a RawValue)>);

/// A field's name, lower-cased but for ASCII letters, whose case is ignored when it is looked for.
#[derive(Debug)]
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
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

    /// The value of a field named in lower case, as it was written.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a RawValue> {
        debug_assert_eq!(name, name.to_lowercase());
        self.0.iter().rev().find(|(field, _)| field.0.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// A field that must have type `T` when it is there. JSON `null` counts as absent.
    pub(crate) fn get<T: Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, serde_json::Error> {
        match self.raw(name) {
            None => Ok(None),
            Some(raw) => serde_json::from_str::<Option<T>>(raw.get()),
        }
    }

    /// A field that must be a text when it is there; the same as [`Fields::get`], without a copy of what has no escapes.
    pub(crate) fn text(&self, name: &str) -> Result<Option<Cow<'a, str>>, serde_json::Error> {
        let Some(raw) = self.raw(name).map(RawValue::get) else { return Ok(None) };
        let plain = raw.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).filter(|text| !text.contains('\\'));
        match plain {
            Some(text) => Ok(Some(Cow::Borrowed(text))),
            None => Ok(serde_json::from_str::<Option<String>>(raw)?.map(Cow::Owned)),
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
