//! Connection tracking: removal of entries that lead to the wrong place (`linux/netfilter/nfnetlink_conntrack.h`).

use flannel::Family;

use crate::addr::family_number;
use crate::netlink::{Batch, NetlinkError, Protocol, Socket, attrs};

/// `NFNL_SUBSYS_CTNETLINK`
const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const TUPLE_ORIG: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_DST_PORT: u16 = 3;
const UDP: u8 = 17;

/// Removes tracked UDP flows to some ports. While a flow is tracked its datagrams go where the first one went, whatever rules
/// were added or removed since.
///
/// # Errors
/// What the kernel answers.
pub fn forget_udp(family: Family, ports: &[u16]) -> Result<(), NetlinkError> {
    if ports.is_empty() {
        return Ok(());
    }
    let header = [family_number(family), 0, 0, 0];
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let read = |body: &[u8]| {
        let find = |bytes, wanted| attrs(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let tuple = find(body.get(4..)?, TUPLE_ORIG)?;
        let proto = find(tuple, TUPLE_PROTO)?;
        let port = u16::from_be_bytes(find(proto, PROTO_DST_PORT)?.try_into().ok()?);
        let ours = find(proto, PROTO_NUM)? == [UDP] && ports.contains(&port);
        ours.then(|| tuple.to_vec())
    };
    let found = socket.dump(
        SUBSYSTEM << 8 | GET,
        |body| {
            body.bytes(&header);
        },
        read,
    )?;
    let mut batch = Batch::new();
    for tuple in found {
        batch.message(SUBSYSTEM << 8 | DELETE, 0, |body| {
            body.bytes(&header).nest(TUPLE_ORIG, |inner| {
                inner.bytes(&tuple);
            });
        });
    }
    let outcomes = socket.execute(batch);
    outcomes.into_iter().filter(|outcome| !outcome.as_ref().is_err_and(NetlinkError::is_not_found)).collect()
}
