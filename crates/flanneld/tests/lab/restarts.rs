//! A hundred restarts of a daemon, by SIGTERM and SIGKILL in turn, under a ping a millisecond and a TCP stream.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use flannel::object::{Key, Object};
use flannel::scope::Scope;
use kernel::netns::Netns;
use kernel::{Changed, Monitor};
use lab::{Pod, StoreKind};

use crate::{ping_all_from, ping_during, start};

pub(crate) fn hundred_restarts_lose_nothing(root: &Path) {
    for backend in ["host-gw", "vxlan"] {
        let mut lab = start(&root.join(backend), 2, backend, StoreKind::Embedded);
        let pods: Vec<Pod> = [0, 1].map(|host| lab.add_pod(host).unwrap()).into();
        ping_all_from(&pods[0].netns, &[pods[1].address]);
        // What anybody changes in the host's kernel from now on.
        let scope =
            Scope { links: vec!["flannel.1".parse().unwrap()], networks: vec!["10.244.0.0/16".parse().unwrap()], ..Scope::default() };
        let mut monitor = lab.hosts[0].netns.run(|| Monitor::open(scope, "eth0".parse().unwrap(), 0).unwrap()).unwrap();
        let listener = Netns::open(&pods[1].path).unwrap().run(|| TcpListener::bind(SocketAddr::new(pods[1].address, 7))).unwrap().unwrap();
        let stream = Netns::open(&pods[0].path).unwrap().run(|| TcpStream::connect(SocketAddr::new(pods[1].address, 7))).unwrap().unwrap();
        let (stop, echoed) = (AtomicBool::new(false), AtomicU64::new(0));
        let (sent, lost) = std::thread::scope(|scope| {
            scope.spawn(move || echo(&listener));
            let talking = scope.spawn(|| talk(stream, &stop, &echoed));
            let from = Netns::open(&pods[0].path).unwrap();
            let outcome = ping_during(&from, pods[1].address, || {
                for i in 0..100 {
                    lab.stop_daemon(0, i % 2 == 1).unwrap();
                    lab.start_daemon(0, &[]).unwrap();
                    lab.wait_state(0, "its peer", |state| state["peers"]["programmed"] == 1).unwrap();
                }
            });
            stop.store(true, Ordering::Relaxed);
            talking.join().unwrap().expect("the stream goes on to its end");
            outcome
        });
        assert_eq!(lost, 0, "{backend}: of {sent} pings");
        assert!(echoed.load(Ordering::Relaxed) > 1_000_000, "{backend}: the stream carried {echoed:?} bytes");
        let touched = |change: &Changed| match change {
            Changed::Set(object) => matches!(object, Object::Route(_) | Object::Neigh(_) | Object::Fdb(_)),
            Changed::Gone(key) => matches!(key, Key::Route(..) | Key::Neigh(..) | Key::Fdb(..)),
            Changed::Everything => true,
            _ => false,
        };
        let flaps: Vec<Changed> = monitor.drain().unwrap().into_iter().map(|event| event.change).filter(touched).collect();
        assert!(flaps.is_empty(), "{backend}: {flaps:?}");
    }
}

fn echo(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut buffer = [0; 65_536];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        stream.write_all(&buffer[..length]).unwrap();
    }
}

/// Sends and receives until asked to stop; returns the first error of the connection.
fn talk(mut stream: TcpStream, stop: &AtomicBool, echoed: &AtomicU64) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (out, mut back) = ([0x55; 32_768], [0; 32_768]);
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&out)?;
        stream.read_exact(&mut back)?;
        assert_eq!(out, back);
        echoed.fetch_add(out.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}
