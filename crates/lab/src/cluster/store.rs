//! The store of a lab.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use daemon::settings::Secret;
use daemon::store::{Access, Etcd};
use rustix::process::{Pid, Signal, kill_process};

use super::{Lab, START_TIMEOUT, STORE, members, outside};
use crate::plan::{Secure, StoreKind};
use crate::process::{spawn, tail};

impl Lab {
    /// Starts the store; a store that was killed continues with its data.
    ///
    /// # Errors
    /// When it does not come up; the text has the last lines of its log.
    pub fn start_store(&mut self) -> anyhow::Result<()> {
        let data = self.root.join("store");
        let log = self.root.join("store.log");
        let mut command = match &self.plan.store {
            StoreKind::Embedded => {
                let mut command = Command::new(&self.plan.program);
                command.arg("store").arg(format!("--listen={STORE}")).arg("--data-dir").arg(&data);
                match &self.plan.secure {
                    Some(secure) => Self::certificate_flags(&mut command, secure),
                    None => drop(command.arg("--insecure")),
                }
                command
            }
            StoreKind::Etcd(program) => self.etcd_command(program, &data),
            StoreKind::Members(program) => {
                let program = program.clone();
                for member in 0..members::MEMBERS {
                    let child = self.start_member(&program, member)?;
                    self.store.push(child);
                }
                return self.await_members();
            }
            StoreKind::Outside(target) => {
                outside::forward(&self.middle, target)?;
                return Ok(());
            }
            StoreKind::Kubernetes(program) => return self.start_kubernetes(&program.clone()),
        };
        let child = self.middle.run(|| spawn(&mut command, &log))?.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        self.store.push(child);
        let end = Instant::now() + START_TIMEOUT;
        while self.middle.run(|| TcpStream::connect(STORE))?.is_err() {
            if let Some(status) = self.store.last_mut().map(Child::try_wait).transpose()?.flatten() {
                bail!("the store ended with {status}:\n{}", tail(&log));
            }
            ensure!(Instant::now() < end, "the store does not listen on {STORE}:\n{}", tail(&log));
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn etcd_command(&self, program: &Path, data: &Path) -> Command {
        let url = self.store_url();
        let mut command = Command::new(program);
        if let Some(secure) = &self.plan.secure {
            Self::certificate_flags(&mut command, secure);
        }
        command.arg("--data-dir").arg(data).args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380", "--max-txn-ops", "10000", "--max-request-bytes", "10485760"]);
        command.args(["--log-outputs", "stderr"]);
        command
    }

    /// The embedded store has etcd's flags.
    fn certificate_flags(command: &mut Command, secure: &Secure) {
        if let Some((cert, key)) = &secure.server {
            command.arg("--trusted-ca-file").arg(&secure.ca).arg("--client-cert-auth");
            command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
        }
    }

    pub(super) fn store_url(&self) -> String {
        if matches!(self.plan.store, StoreKind::Members(_)) {
            return members::endpoints();
        }
        format!("{}://{STORE}", if self.plan.secure.is_some() { "https" } else { "http" })
    }

    /// How the lab itself and the daemons reach the store.
    pub fn access(&self) -> Access {
        let mut access = Access { endpoints: self.store_url(), prefix: self.plan.prefix.clone(), ..Access::default() };
        access.login = self.plan.login.clone().map(|(name, password)| (name, Secret(password)));
        if let Some(secure) = &self.plan.secure {
            access.ca = Some(secure.ca.clone());
            (access.cert, access.key) = (Some(secure.client.0.clone()), Some(secure.client.1.clone()));
            access.login = secure.login.clone().map(|(name, password)| (name, Secret(password)));
        }
        access
    }

    /// Sets the user and password of daemons that are started from now on.
    pub fn set_login(&mut self, name: &str, password: &str) {
        if let Some(secure) = &mut self.plan.secure {
            secure.login = Some((name.to_owned(), password.to_owned()));
        }
    }

    /// The store's process, while it runs.
    pub fn store_pid(&self) -> Option<u32> {
        self.store.first().map(Child::id)
    }

    /// Kills the store, as a power cut would.
    ///
    /// # Errors
    /// When its end cannot be awaited.
    pub fn kill_store(&mut self) -> anyhow::Result<()> {
        for mut store in self.store.drain(..) {
            store.kill()?;
            store.wait()?;
        }
        Ok(())
    }

    /// Stops the store's processes for a while, as an overloaded machine would.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn pause_store(&self, time: Duration) -> anyhow::Result<()> {
        let signal = |signal| self.store.iter().try_for_each(|store| kill_process(Pid::from_child(store), signal));
        signal(Signal::STOP)?;
        std::thread::sleep(time);
        Ok(signal(Signal::CONT)?)
    }

    /// Writes the plan's network configuration to the store.
    ///
    /// # Errors
    /// When the store refuses.
    pub fn put_config(&self) -> anyhow::Result<()> {
        let text = self.plan.config.to_string();
        if matches!(self.plan.store, StoreKind::Kubernetes(_)) {
            return Ok(kernel::file::write(&self.net_conf(), &text)?);
        }
        self.with_store(async |store| store.put_config(&text).await)?;
        Ok(())
    }

    /// Runs a function with a client of the store, in the store's namespace.
    ///
    /// # Errors
    /// The function's last error, after the store had time to come up.
    pub fn with_store<T, E: Into<anyhow::Error>>(&self, f: impl AsyncFn(&Etcd) -> Result<T, E>) -> anyhow::Result<T> {
        let work = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let store = Etcd::new(&self.access())?;
                let end = Instant::now() + START_TIMEOUT;
                loop {
                    match f(&store).await {
                        Ok(value) => return Ok(value),
                        Err(error) if Instant::now() > end => return Err(error.into()),
                        // A store that has just begun to listen may not serve yet.
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            })
        };
        self.middle.run(work)?
    }
}
