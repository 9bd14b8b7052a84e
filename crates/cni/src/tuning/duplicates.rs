//! Finds duplicate keys of a JSON object. A parsed object has only the last of them.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

/// The first duplicate key of the object in a field of a JSON text.
pub(super) fn first(text: &str, field: &str) -> Option<String> {
    let mut deserializer = serde_json::Deserializer::from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    // Text that is not JSON was refused earlier.
    deserializer.deserialize_map(Parent(field)).ok().flatten()
}

/// Visits the object with the field.
struct Parent<'a>(&'a str);

impl<'de> Visitor<'de> for Parent<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            if key.eq_ignore_ascii_case(self.0) {
                found = found.or(map.next_value::<Option<Object>>()?.and_then(|object| object.0));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// The first duplicate key of an object.
struct Object(Option<String>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let (mut known, mut found) = (BTreeSet::new(), None);
                while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
                    if !known.insert(key.clone()) {
                        found = found.or(Some(key));
                    }
                }
                Ok(Object(found))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

#[cfg(test)]
mod tests {
    use super::first;

    #[test]
    fn duplicate_key_is_found() {
        assert_eq!(first(r#"{"a":{"x":1,"x":2},"sysctl":{"x":"1","y":"1","x":"0"}}"#, "sysctl").as_deref(), Some("x"));
        assert_eq!(first(r#"{"a":{"x":1,"x":2},"sysctl":{"x":"1","y":{"y":1}}}"#, "sysctl"), None);
        for text in ["", "7", "{}", r#"{"sysctl":null}"#, r#"{"sysctl":[1]}"#] {
            assert_eq!(first(text, "sysctl"), None, "{text}");
        }
    }
}
