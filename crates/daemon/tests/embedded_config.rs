//! What the embedded store logs at its start about the network config. In a process of its own: `tracing` remembers of each log line
//! whether any thread listens when it is first reached.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use daemon::embedded::{StoreArgs, TlsArgs, bind};

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn args(folder: &Path, net_config: Option<&str>) -> StoreArgs {
    StoreArgs {
        listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: folder.to_owned(),
        net_config: net_config.map(ToOwned::to_owned),
        etcd_prefix: "/coreos.com/network".to_owned(),
        tls: TlsArgs::default(),
    }
}

fn run(f: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f);
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn start_says_which_network_config_the_store_has() {
    let folder = Folder(std::env::temp_dir().join(format!("flannel-config-{}", std::process::id())));
    let said = |net_config: Option<&str>| {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            run(async {
                // The engine of the store that was dropped may still be closing its file.
                for _ in 0..100 {
                    if bind(&args(&folder.0, net_config)).await.is_ok() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                panic!("the store does not start");
            });
        });
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    };
    let [first, second] = [r#"{"Network":"10.1.0.0/16"}"#, r#"{"Network":"10.2.0.0/16"}"#];
    assert!(said(None).contains("store has no network config"));
    let written = said(Some(first));
    assert!(written.contains("network config written from --net-config") && written.contains("10.1.0.0/16"), "{written}");
    let same = said(Some(first));
    assert!(same.contains("store has a network config") && !same.contains("ignored"), "{same}");
    let ignored = said(Some(second));
    assert!(ignored.contains("--net-config ignored") && ignored.contains("10.1.0.0/16") && ignored.contains("etcdctl put"), "{ignored}");
}
