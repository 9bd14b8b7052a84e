//! Rate limits by queueing disciplines, as the bandwidth plugin needs them: a token bucket on a link, and a redirection of
//! a link's received packets to another link (`linux/pkt_sched.h`, `linux/pkt_cls.h`).

use crate::netlink::{Body, CREATE, EXCL, NetlinkError, REPLACE, Socket, attrs, str_in, u32_at};

const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;

const TC_H_ROOT: u32 = 0xffff_ffff;
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// `ffff:`, the handle of an ingress qdisc.
const INGRESS: u32 = 0xffff_0000;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
const ETH_P_ALL: u16 = 3;
/// `TC_LINKLAYER_ETHERNET`
const ETHERNET: u8 = 1;

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes of the largest burst.
    pub burst: u32,
    /// Bytes that may wait; further packets are dropped.
    pub limit: u32,
}

/// `struct tcmsg`
fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut header = [0; 20];
    for (at, value) in [(4, index), (8, handle), (12, parent), (16, info)] {
        header[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    header
}

/// Microseconds as the ticks that the kernel counts bursts in (`/proc/net/psched`).
fn ticks(microseconds: u64) -> u32 {
    let text = std::fs::read_to_string("/proc/net/psched").unwrap_or_default();
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| u64::from_str_radix(word, 16).ok()).collect();
    // Since 2.6.32 a tick is 64 ns on every kernel.
    let (t2us, us2t) = match numbers.as_slice() {
        [t2us, us2t, ..] if *us2t > 0 => (*t2us, *us2t),
        _ => (1000, 64),
    };
    u32::try_from(microseconds.saturating_mul(t2us) / us2t).unwrap_or(u32::MAX)
}

/// Limits a link's transmission.
///
/// # Errors
/// What the kernel answers.
pub fn limit(socket: &mut Socket, index: u32, bucket: Bucket) -> Result<(), NetlinkError> {
    let buffer = ticks(u64::from(bucket.burst) * 1_000_000 / bucket.rate.max(1));
    socket.request(RTM_NEWQDISC, CREATE | REPLACE, |body| {
        body.bytes(&tcmsg(index, 0x0001_0000, TC_H_ROOT, 0)).attr_str(TCA_KIND, "tbf").nest(TCA_OPTIONS, |options| {
            // struct tc_tbf_qopt: rate, peakrate (none), limit, buffer, mtu.
            let mut parms = Vec::with_capacity(36);
            parms.extend([0, ETHERNET, 0, 0, 0, 0, 0, 0]);
            parms.extend(u32::try_from(bucket.rate).unwrap_or(u32::MAX).to_ne_bytes());
            parms.extend([0; 12]);
            parms.extend(bucket.limit.to_ne_bytes());
            parms.extend(buffer.to_ne_bytes());
            parms.extend([0; 4]);
            options.attr(TCA_TBF_PARMS, &parms).attr_u32(TCA_TBF_BURST, bucket.burst);
            if u32::try_from(bucket.rate).is_err() {
                options.attr(TCA_TBF_RATE64, &bucket.rate.to_ne_bytes());
            }
        });
    })
}

/// Redirects all packets that a link receives to another link, which sends them.
///
/// # Errors
/// What the kernel answers.
pub fn redirect(socket: &mut Socket, from: u32, to: u32) -> Result<(), NetlinkError> {
    let qdisc = socket.request(RTM_NEWQDISC, CREATE | EXCL, |body| {
        body.bytes(&tcmsg(from, INGRESS, TC_H_INGRESS, 0)).attr_str(TCA_KIND, "ingress");
    });
    match qdisc {
        Err(error) if !error.is_exists() => return Err(error),
        _ => {}
    }
    // Priority 1, all protocols.
    let info = 1 << 16 | u32::from(ETH_P_ALL.to_be());
    socket.request(RTM_NEWTFILTER, CREATE | EXCL, |body| {
        body.bytes(&tcmsg(from, 0, INGRESS, info)).attr_str(TCA_KIND, "u32").nest(TCA_OPTIONS, |options| {
            // struct tc_u32_sel with one key that matches everything.
            let mut selector = vec![1, 0, 1, 0];
            selector.extend([0; 12]);
            selector.extend([0; 16]);
            options.attr(TCA_U32_SEL, &selector);
            options.nest(TCA_U32_ACT, |actions| {
                actions.nest(1, |action| mirred(action, to));
            });
        });
    })
}

fn mirred(action: &mut Body<'_>, to: u32) {
    action.attr_str(TCA_ACT_KIND, "mirred").nest(TCA_ACT_OPTIONS, |options| {
        // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
        let mut parms = Vec::with_capacity(28);
        for value in [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to] {
            parms.extend(value.to_ne_bytes());
        }
        options.attr(TCA_MIRRED_PARMS, &parms);
    });
}

/// The limit on a link's transmission; `None` if it has none.
///
/// # Errors
/// What the kernel answers.
pub fn get(socket: &mut Socket, index: u32) -> Result<Option<Bucket>, NetlinkError> {
    let read = |body: &[u8]| {
        if u32_at(body, 4)? != index || u32_at(body, 12)? != TC_H_ROOT {
            return None;
        }
        let find = |bytes, wanted| attrs(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let attributes = body.get(20..)?;
        if find(attributes, TCA_KIND).and_then(str_in)? != "tbf" {
            return None;
        }
        let options = find(attributes, TCA_OPTIONS)?;
        let parms = find(options, TCA_TBF_PARMS)?;
        let rate = match find(options, TCA_TBF_RATE64) {
            Some(rate) => u64::from_ne_bytes(rate.try_into().ok()?),
            None => u64::from(u32_at(parms, 8)?),
        };
        let microseconds = u64::from(u32_at(parms, 28)?) * 64 / 1000;
        let burst = u32::try_from(microseconds * rate / 1_000_000).unwrap_or(u32::MAX);
        Some(Bucket { rate, burst, limit: u32_at(parms, 24)? })
    };
    let found = socket.dump(
        RTM_GETQDISC,
        |body| {
            body.bytes(&tcmsg(index, 0, 0, 0));
        },
        read,
    )?;
    Ok(found.into_iter().next())
}
