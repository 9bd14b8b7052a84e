//! The observed state of the kernel: the objects within [`crate::scope::Scope`].

use std::collections::BTreeMap;

use crate::net::IfName;
use crate::object::bridge::{Bridge, Port};
use crate::object::{Key, Object};

/// The set of objects that the kernel holds, limited to those that the daemon manages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    objects: BTreeMap<Key, Object>,
}

impl Observed {
    /// Adds or replaces an object.
    pub fn insert(&mut self, object: Object) {
        self.objects.insert(object.key(), object);
    }

    /// Removes an object, and with a link all objects that depend on it.
    pub fn remove(&mut self, key: &Key) {
        self.objects.remove(key);
        if let Key::Link(name) = key {
            self.objects.retain(|_, object| !object.depends_on(*name));
        }
    }

    /// The object at this key.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.objects.get(key)
    }

    /// The bridge of this host's pods.
    pub fn bridge(&self) -> Option<&Bridge> {
        // Only links and addresses come before it in order.
        let first = self.objects.values().find(|object| !matches!(object, Object::Link(_) | Object::Addr(..)));
        match first {
            Some(Object::Bridge(bridge)) => Some(bridge),
            _ => None,
        }
    }

    /// Records that a link became a bridge port. Returns whether this changed the pods' bridge.
    pub fn add_port(&mut self, bridge: IfName, name: IfName, port: Port) -> bool {
        let Some(Object::Bridge(known)) = self.objects.get_mut(&Key::Bridge(bridge)) else { return false };
        known.loose.remove(&name);
        known.ports.insert(name, port) != Some(port)
    }

    /// Records that a link was deleted. Returns whether it was a port of the pods' bridge, or one that had lost it.
    pub fn remove_port(&mut self, name: IfName) -> bool {
        let Some(key) = self.bridge().map(|bridge| Key::Bridge(bridge.name)) else { return false };
        let Some(Object::Bridge(known)) = self.objects.get_mut(&key) else { return false };
        known.loose.remove(&name) | known.ports.remove(&name).is_some()
    }

    /// All objects, in apply order.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.objects.iter()
    }

    /// All objects, in apply order, by value.
    pub fn into_objects(self) -> impl Iterator<Item = Object> {
        self.objects.into_values()
    }

    /// Packs the map: a map that was filled in parts is half empty.
    pub fn pack(&mut self) {
        self.objects = std::mem::take(&mut self.objects).into_iter().collect();
    }

    /// The number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there is no object.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl Extend<Object> for Observed {
    /// Adds or replaces many objects.
    fn extend<I: IntoIterator<Item = Object>>(&mut self, objects: I) {
        let new: Vec<(Key, Object)> = objects.into_iter().map(|object| (object.key(), object)).collect();
        put(&mut self.objects, new);
    }
}

impl FromIterator<Object> for Observed {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> Observed {
        Observed { objects: objects.into_iter().map(|object| (object.key(), object)).collect() }
    }
}

/// Adds or replaces entries of a map. If they outnumber the existing ones, the map is rebuilt: that takes half the time of single
/// insertions, and fills the nodes of the map twice as densely.
pub(crate) fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, entries: Vec<(K, V)>) {
    if entries.len() <= map.len() {
        return map.extend(entries);
    }
    let few = std::mem::replace(map, entries.into_iter().collect());
    for (key, value) in few {
        map.entry(key).or_insert(value);
    }
}
