use expect_test::{Expect, expect};
use serde_json::{Value, json};

use super::*;

fn state() -> Value {
    let path = |verdict: &str, reason: Value| json!({ "family": "ipv4", "verdict": verdict, "reason": reason, "since_s": 240, "rtt_ms": 0.312, "probes": 20, "lost": 5 });
    let peer = |n: u8, path: Value| json!({ "subnet": format!("10.244.{n}.0/24"), "public_ip": format!("10.0.0.{n}"), "state": "programmed", "paths": [path] });
    let mtu = "the path carries packets of 1400 bytes, pods send up to 1450: lower the MTU by 50 bytes";
    json!({
        "schema": 1, "version": "0.2.0", "node": "h1", "uptime_s": 273_600, "ready": true, "pending": [],
        "backend": "vxlan", "vni": 1, "port": 8472, "rules": "nftables", "forwarding": true, "subnet": "10.244.1.0/24",
        "interface": "eth0", "public_ip": "10.0.0.1", "mtu": 1450, "findings": [],
        "store": { "connected": true, "complete": true, "leases": 5, "doubtful": 0, "endpoint": "https://10.0.0.5:2379", "last_event_s": 12, "renewal_s": 79_200 },
        "peers": { "list": [
            peer(2, path("reachable", Value::Null)),
            peer(17, path("overlay-broken", json!("the host answers, but its end of the pod network does not"))),
            peer(44, path("mtu-too-large", json!(mtu))),
            { "subnet": "10.244.45.0/24", "public_ip": "10.0.0.45", "state": "refused", "reasons": ["its VNI is 7"] },
            { "subnet": "10.244.46.0/24", "public_ip": "10.0.0.46", "state": "programmed" },
        ] },
        "objects": { "desired": 9, "failed": [], "repaired": 3, "overruns": 0, "conflicts": [], "repairs": [
            { "number": 1, "ago_s": 9000, "kind": "link", "action": "set link flannel.1" },
            { "number": 2, "ago_s": 100, "kind": "route", "action": "set route 10.244.2.0/24" },
            { "number": 3, "ago_s": 70, "kind": "route", "action": "set route 10.244.9.0/24", "by": "NetworkManager, process 712" },
        ] },
    })
}

fn pods() -> Row {
    Row { name: "Pods", level: Level::Ok, text: "37 addresses in use of 253, 0 leaked".to_owned() }
}

fn well() -> Value {
    let mut state = state();
    state["peers"]["list"].as_array_mut().unwrap().truncate(1);
    state
}

#[track_caller]
fn check(state: Value, style: Style, all: bool, level: Level, want: Expect) {
    let found = of_daemon(state, pods(), Screen { style, all }, false).unwrap();
    want.assert_eq(&found.text);
    assert_eq!(found.level, level);
}

#[test]
fn peers_that_are_not_well_are_listed_with_the_reason() {
    check(
        state(),
        Style::PLAIN,
        false,
        Level::Warn,
        expect![[r#"
            flannel 0.2.0  vxlan (VNI 1, UDP 8472)  subnet 10.244.1.0/24  node h1  up 3d4h
            Store    OK    https://10.0.0.5:2379, last event 12s ago, lease renews in 22h
            Node     OK    eth0 10.0.0.1, MTU 1450 for pods, rules nftables, forwarding on
            Peers    WARN  1 of 5 reachable, 2 broken, 1 refused, 1 not measured
            Pods     OK    37 addresses in use of 253, 0 leaked
            Repairs  OK    2 in the last hour (2 routes); last 1m10s ago: set route 10.244.9.0/24, changed by NetworkManager, process 712

            SUBNET          VIA        PATH  REACH           RTT ms  LOSS  SINCE
            10.244.17.0/24  10.0.0.17  ipv4  overlay-broken  0.3     25%   4m     the host answers, but its end of the pod network does not
            10.244.44.0/24  10.0.0.44  ipv4  mtu-too-large   0.3     25%   4m     the path carries packets of 1400 bytes, pods send up to 1450: lower the MTU by 50 bytes
            10.244.45.0/24  10.0.0.45  –     refused         –       –     –      its VNI is 7
            … 2 more are well or not measured (--all)
        "#]],
    );
}

#[test]
fn all_peers_are_listed_on_request() {
    check(
        well(),
        Style::PLAIN,
        true,
        Level::Ok,
        expect![[r#"
            flannel 0.2.0  vxlan (VNI 1, UDP 8472)  subnet 10.244.1.0/24  node h1  up 3d4h
            Store    OK    https://10.0.0.5:2379, last event 12s ago, lease renews in 22h
            Node     OK    eth0 10.0.0.1, MTU 1450 for pods, rules nftables, forwarding on
            Peers    OK    1 of 1 reachable
            Pods     OK    37 addresses in use of 253, 0 leaked
            Repairs  OK    2 in the last hour (2 routes); last 1m10s ago: set route 10.244.9.0/24, changed by NetworkManager, process 712

            SUBNET         VIA       PATH  REACH      RTT ms  LOSS  SINCE
            10.244.2.0/24  10.0.0.2  ipv4  reachable  0.3     25%   4m
        "#]],
    );
}

#[test]
fn long_lines_are_broken_at_the_width_and_coloured() {
    let style = Style { color: true, width: Some(60) };
    let mut state = state();
    state["findings"] = json!([{ "severity": "error", "code": "forward-drop", "text": "chain FORWARD of table filter drops packets between pods", "fix": "iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT; iptables -I FORWARD -d 10.244.0.0/16 -j ACCEPT" }]);
    check(
        state,
        style,
        false,
        Level::Fail,
        expect![[r#"
            flannel 0.2.0  vxlan (VNI 1, UDP 8472)  subnet 10.244.1.0/24
              node h1  up 3d4h
            Store    [32mOK[0m    https://10.0.0.5:2379, last event 12s ago,
                           lease renews in 22h
            Node     [31mFAIL[0m  1 error, eth0 10.0.0.1, MTU 1450 for pods,
                           rules nftables, forwarding on
            Peers    [33mWARN[0m  1 of 5 reachable, 2 broken, 1 refused, 1 not
                           measured
            Pods     [32mOK[0m    37 addresses in use of 253, 0 leaked
            Repairs  [32mOK[0m    2 in the last hour (2 routes); last 1m10s
                           ago: set route 10.244.9.0/24, changed by
                           NetworkManager, process 712

            [31merror forward-drop[0m: chain FORWARD of table filter drops
              packets between pods
              fix: iptables -I FORWARD -s 10.244.0.0/16 -j ACCEPT;
                   iptables -I FORWARD -d 10.244.0.0/16 -j ACCEPT

            SUBNET          VIA        PATH  REACH           RTT ms  LOSS  SINCE
            10.244.17.0/24  10.0.0.17  ipv4  [31moverlay-broken[0m  0.3     25%   4m
              the host answers, but its end of the pod network does not
            10.244.44.0/24  10.0.0.44  ipv4  [31mmtu-too-large[0m   0.3     25%   4m
              the path carries packets of 1400 bytes, pods send up to
              1450: lower the MTU by 50 bytes
            10.244.45.0/24  10.0.0.45  –     [31mrefused[0m         –       –     –
              its VNI is 7
            … 2 more are well or not measured (--all)
        "#]],
    );
}

#[test]
fn troubles_of_the_store_and_the_node_are_named() {
    let mut state = well();
    state["store"]["connected"] = false.into();
    state["store"]["doubtful"] = 2.into();
    state["objects"]["failed"] = json!([{ "object": "link flannel.1", "error": "File exists (errno 17)", "attempts": 3 }]);
    state["objects"]["conflicts"] = json!([{ "object": "route 10.244.9.0/24", "by": "bird, process 7", "times": 40 }]);
    state["forwarding"] = false.into();
    check(
        state.clone(),
        Style::PLAIN,
        false,
        Level::Warn,
        expect![[r#"
            flannel 0.2.0  vxlan (VNI 1, UDP 8472)  subnet 10.244.1.0/24  node h1  up 3d4h
            Store    WARN  https://10.0.0.5:2379, does not answer; routes stay as they are, lost data: 2 of its former leases are in doubt, last event 12s ago, lease renews in 22h
            Node     WARN  not applied: link flannel.1: File exists (errno 17), forwarding is off, eth0 10.0.0.1, MTU 1450 for pods, rules nftables
            Peers    OK    1 of 1 reachable
            Pods     OK    37 addresses in use of 253, 0 leaked
            Repairs  WARN  bird, process 7 keeps changing route 10.244.9.0/24; 2 in the last hour (2 routes); last 1m10s ago: set route 10.244.9.0/24, changed by NetworkManager, process 712
        "#]],
    );
    state["pending"] = json!(["the store (it does not answer)"]);
    assert_eq!(of_daemon(state, pods(), Screen { style: Style::PLAIN, all: false }, false).unwrap().level, Level::Fail);
}

#[test]
fn no_text_of_a_peer_reaches_the_terminal_unescaped() {
    fn poison(value: &mut Value) {
        match value {
            Value::String(text) => text.push_str("\u{1b}]0;owned\u{7}\u{9b}2J\n\u{202e}"),
            Value::Array(list) => list.iter_mut().for_each(poison),
            Value::Object(map) => map.values_mut().for_each(poison),
            _ => {}
        }
    }
    let mut hostile = state();
    hostile["findings"] = json!([{ "severity": "warning", "code": "x", "text": "a", "fix": "b" }]);
    let states = ["programmed", "refused", "failed", "doubtful", "other"];
    for state in states {
        let mut hostile = hostile.clone();
        poison(&mut hostile);
        // Words that the screen knows keep their meaning.
        hostile["peers"]["list"].as_array_mut().unwrap().iter_mut().for_each(|peer| peer["state"] = state.into());
        let found = of_daemon(hostile, pods(), Screen { style: Style::PLAIN, all: true }, false).unwrap();
        assert!(found.text.contains("\\u{1b}]0;owned") && found.text.chars().all(|c| c == '\n' || !c.is_control()), "{:?}", found.text);
        assert!(!found.text.contains('\u{202e}'));
    }
}

#[test]
fn an_unknown_document_is_shown_as_far_as_it_goes() {
    let found =
        of_daemon(json!({ "schema": 99, "version": "9.0", "new": {} }), pods(), Screen { style: Style::PLAIN, all: false }, false).unwrap();
    assert!(found.level > Level::Ok && found.text.contains("is newer than this program"), "{}", found.text);
}

#[test]
fn document_has_the_level_and_the_whole_state() {
    let found = of_daemon(state(), pods(), Screen { style: Style::PLAIN, all: false }, true).unwrap();
    let value: Value = serde_json::from_str(&found.text).unwrap();
    assert_eq!((&value["schema"], &value["status"], &value["rows"][2]["level"]), (&1.into(), &"degraded".into(), &"warn".into()));
    assert_eq!(value["state"], state());
    let mut value = value;
    value["state"] = Value::Null;
    assert_eq!(crate::state::fields(&value), crate::state::documented("flanneld status --json"));
}

#[test]
fn times_are_seconds_or_minutes() {
    assert_eq!(["30s", "2m", "7"].map(|text| time(text).unwrap().as_secs()), [30, 120, 7]);
    assert!(time("soon").is_err());
}
