//! Where leases are kept. One store so far, [`etcd`] (which the embedded server speaks as well), so there is no trait:
//! it comes with the second one.

mod connect;
pub mod etcd;

pub use self::connect::Access;
pub use self::etcd::{Entry, Snapshot, Store, StoreError};
