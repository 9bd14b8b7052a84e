//! The store's file: a crash-safe database in which every batch of changes is one transaction, on disk before it is
//! acknowledged.

use std::path::Path;

use anyhow::Context;
use prost::Message;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use super::limits;
use super::state::{Change, Saved, revision_of};
use crate::etcd::event::EventType;
use crate::etcd::{Event, KeyValue};

const KVS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("kvs");
/// By revision and place within it.
const HISTORY: TableDefinition<'_, (i64, u64), &[u8]> = TableDefinition::new("history");
const LEASES: TableDefinition<'_, i64, i64> = TableDefinition::new("leases");
const META: TableDefinition<'_, &str, i64> = TableDefinition::new("meta");

#[derive(Debug)]
pub(super) struct Disk {
    database: Database,
    /// Counts events, so that those of one revision keep their order.
    sequence: u64,
}

impl Disk {
    /// Opens or creates the file `flannel.redb` in the directory, which is created where it is missing.
    pub(super) fn open(directory: &Path, cluster: u64) -> anyhow::Result<Disk> {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot create --data-dir {}", directory.display()))?;
        let path = directory.join("flannel.redb");
        let database = Database::builder()
            .set_cache_size(limits::FILE_CACHE)
            .create(&path)
            .with_context(|| format!("cannot open the store's file {} (is another flanneld store using it?)", path.display()))?;
        let write = database.begin_write()?;
        {
            write.open_table(KVS)?;
            write.open_table(HISTORY)?;
            write.open_table(LEASES)?;
            let mut meta = write.open_table(META)?;
            if meta.get("cluster")?.is_none() {
                meta.insert("cluster", cluster.cast_signed())?;
            }
        }
        write.commit()?;
        Ok(Disk { database, sequence: 0 })
    }

    pub(super) fn load(&mut self) -> anyhow::Result<Saved> {
        let read = self.database.begin_read()?;
        let meta = read.open_table(META)?;
        let number = |name: &str| anyhow::Ok(meta.get(name)?.map_or(0, |value| value.value()));
        let mut saved = Saved {
            cluster: number("cluster")?.cast_unsigned(),
            revision: number("revision")?,
            compacted: number("compacted")?,
            ..Saved::default()
        };
        for entry in read.open_table(KVS)?.iter()? {
            saved.kvs.push(KeyValue::decode(entry?.1.value())?);
        }
        for entry in read.open_table(LEASES)?.iter()? {
            let (id, ttl) = entry?;
            saved.leases.push((id.value(), ttl.value()));
        }
        for entry in read.open_table(HISTORY)?.iter()? {
            let (key, event) = entry?;
            self.sequence = self.sequence.max(key.value().1);
            saved.history.push(Event::decode(event.value())?);
        }
        Ok(saved)
    }

    /// Writes the changes in one transaction; when this returns they are on disk.
    pub(super) fn write(&mut self, changes: &[Change], revision: i64) -> anyhow::Result<()> {
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut kvs = write.open_table(KVS)?;
            let mut history = write.open_table(HISTORY)?;
            let mut leases = write.open_table(LEASES)?;
            let mut meta = write.open_table(META)?;
            for change in changes {
                match change {
                    Change::Event(event) => {
                        let Some(kv) = &event.kv else { continue };
                        match event.r#type() {
                            EventType::Put => drop(kvs.insert(kv.key.as_slice(), kv.encode_to_vec().as_slice())?),
                            EventType::Delete => drop(kvs.remove(kv.key.as_slice())?),
                        }
                        self.sequence += 1;
                        history.insert((revision_of(event), self.sequence), event.encode_to_vec().as_slice())?;
                    }
                    Change::Lease(id, Some(ttl)) => drop(leases.insert(id, ttl)?),
                    Change::Lease(id, None) => drop(leases.remove(id)?),
                    Change::Compacted(revision) => {
                        history.retain_in(..(*revision, 0), |_, _| false)?;
                        meta.insert("compacted", revision)?;
                    }
                }
            }
            meta.insert("revision", revision)?;
        }
        write.commit()?;
        Ok(())
    }
}
