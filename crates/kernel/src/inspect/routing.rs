//! Routes of every program, and policy rules (`linux/rtnetlink.h`, `linux/fib_rules.h`).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use flannel::check::{DefaultRoute, Expected, PolicyAction, PolicyRule, RouteKind, SeenRoute};
use flannel::{Family, IfName, PerFamily, Subnet};

use crate::addr::family_number;
use crate::netlink::{NetlinkError, Socket, attrs, ip_in, str_in, u32_at};
use crate::route;

const RTM_GETRULE: u16 = 34;
const MAIN: u32 = 254;
const LOCAL: u32 = 255;
/// A host has few tables; more are not looked into.
const TABLES: usize = 16;

/// Routes and rules.
#[derive(Debug, Default)]
pub(super) struct Routing {
    pub(super) routes: Vec<SeenRoute>,
    pub(super) defaults: Vec<DefaultRoute>,
    pub(super) rules: PerFamily<Vec<PolicyRule>>,
    pub(super) tables: BTreeMap<(Family, u32), Vec<SeenRoute>>,
}

pub(super) fn read(socket: &mut Socket, expected: &Expected, names: &BTreeMap<u32, IfName>) -> Result<Routing, NetlinkError> {
    let mut found = Routing::default();
    for (family, network) in expected.networks.iter() {
        let mut inside = Vec::new();
        for route in route::dump_table(socket, family, MAIN, |body| decode(body, MAIN, names, |dst| is_relevant(dst, *network)))? {
            match (route.dst.prefix_len(), route.kind, route.dev) {
                (0, RouteKind::Unicast, Some(dev)) => found.defaults.push(DefaultRoute { family, metric: route.metric, dev }),
                (0, ..) => {}
                _ if network.covers(route.dst) => inside.push(route),
                _ => {}
            }
        }
        found.routes.extend(without_lonely(inside));
        let rules = rules(socket, family)?;
        let named = rules.iter().filter_map(|rule| match rule.action {
            PolicyAction::Lookup(table, _) if table != MAIN && !rule.is_special => Some(table),
            _ => None,
        });
        for table in named.take(TABLES) {
            let Entry::Vacant(place) = found.tables.entry((family, table)) else { continue };
            place.insert(route::dump_table(socket, family, table, |body| decode(body, table, names, |dst| dst.overlaps(*network)))?);
        }
        found.rules.set(family, Some(rules));
    }
    Ok(found)
}

fn is_relevant(dst: Subnet, network: Subnet) -> bool {
    dst.prefix_len() == 0 || network.covers(dst)
}

/// Ten thousand routes of the daemon are not carried about: only those are kept that share addresses with another program's.
fn without_lonely(routes: Vec<SeenRoute>) -> Vec<SeenRoute> {
    use flannel::object::ROUTE_PROTOCOL;
    let foreign: Vec<Subnet> = routes.iter().filter(|route| route.protocol != ROUTE_PROTOCOL).map(|route| route.dst).collect();
    let meets = |route: &SeenRoute| route.protocol != ROUTE_PROTOCOL || foreign.iter().any(|dst| dst.overlaps(route.dst));
    routes.into_iter().filter(meets).collect()
}

fn decode(body: &[u8], table: u32, names: &BTreeMap<u32, IfName>, wanted: impl Fn(Subnet) -> bool) -> Option<SeenRoute> {
    let found = route::decode_any(body).filter(|found| found.table == table && wanted(found.dst))?;
    let kind = match found.kind {
        1 => RouteKind::Unicast,
        6 => RouteKind::Blackhole,
        7 => RouteKind::Unreachable,
        8 => RouteKind::Prohibit,
        9 => RouteKind::Throw,
        _ => RouteKind::Other,
    };
    let dev = names.get(&found.oif).copied();
    Some(SeenRoute { dst: found.dst, kind, metric: found.metric, via: found.via, dev, protocol: found.protocol })
}

/// The rules up to the one that every packet for a pod obeys, which is that of the main table as a rule.
fn rules(socket: &mut Socket, family: Family) -> Result<Vec<PolicyRule>, NetlinkError> {
    let mut header = [0; 12];
    header[0] = family_number(family);
    let dump = socket.dump(
        RTM_GETRULE,
        |body| {
            body.bytes(&header);
        },
        decode_rule,
    );
    let mut rules = match dump {
        Ok(rules) => rules,
        // A family or a feature that the kernel lacks.
        Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::ENOENT)) => Vec::new(),
        Err(error) => return Err(error),
    };
    rules.sort_by_key(|(rule, _)| rule.priority);
    let mut ordered = Vec::new();
    for (rule, leads_on) in rules {
        if leads_on {
            // A goto skips rules; those behind it are not judged.
            break;
        }
        if rule.action != PolicyAction::Lookup(LOCAL, None) {
            ordered.push(rule);
        }
    }
    Ok(ordered)
}

/// Decodes a rule, and whether it is a goto.
fn decode_rule(body: &[u8]) -> Option<(PolicyRule, bool)> {
    const INVERT: u32 = 2;
    const ACTIONS: [(u8, &str); 3] = [(6, "discards"), (7, "refuses"), (8, "prohibits")];
    let [family, dst_len, src_len, tos, table, _, _, action] = *body.first_chunk::<8>()?;
    let flags = u32_at(body, 8)?;
    Family::ALL.into_iter().find(|known| family_number(*known) == family)?;
    let (mut from, mut to) = (None, None);
    let (mut priority, mut table, mut iif, mut suppressed) = (0, u32::from(table), None, None);
    let (mut has_mark, mut has_more) = (false, tos != 0);
    for (kind, value) in attrs(body.get(12..)?) {
        match kind {
            1 => to = Subnet::new(ip_in(value)?, dst_len).ok(),
            2 => from = Subnet::new(ip_in(value)?, src_len).ok(),
            3 => iif = Some(str_in(value)?.parse().ok()?),
            6 => priority = u32_at(value, 0)?,
            10 | 16 => has_mark = true,
            14 => suppressed = u8::try_from(u32_at(value, 0)?).ok(),
            15 => table = u32_at(value, 0)?,
            // The target of a goto, the realm, padding, and the program that added the rule.
            4 | 11 | 18 | 21 => {}
            _ => has_more = true,
        }
    }
    // "not from all fwmark 1": every packet without the mark.
    let is_special = match flags & INVERT != 0 {
        true => !has_mark || has_more || from.is_some() || to.is_some() || iif.is_some(),
        false => has_mark || has_more,
    };
    let refused = ACTIONS.iter().find(|(number, _)| *number == action).map(|(_, verb)| *verb);
    let action_of = match (action, refused) {
        (1, _) => PolicyAction::Lookup(table, suppressed),
        (_, Some(verb)) => PolicyAction::Refuse(verb),
        _ => PolicyAction::Other,
    };
    Some((PolicyRule { priority, from, to, iif, is_special, action: action_of }, action == 2))
}
