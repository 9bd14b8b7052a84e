//! The README's first quarter of an hour, line by line as written, on two hosts. Where a line needs something that a namespace
//! lacks, `PATH` and mounts provide it: the built program in `target/dist`, and a `systemctl` that starts what a unit says.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kernel::process::die_with_parent;
use lab::{Host, Lab, StoreKind};

use crate::cluster::{PROGRAM, eventually};
use crate::plan;

/// Starts and ends the program of a unit file, with its environment.
const SYSTEMCTL: &str = r#"#!/bin/bash
set -e
unit=/etc/systemd/system/$3.service pid=/run/$3.pid
case "$1" in
daemon-reload) ;;
enable)
  while IFS= read -r line; do
    case "$line" in
    Environment=*) eval "export ${line#Environment=}" ;;
    EnvironmentFile=-*) file=${line#EnvironmentFile=-}; set -a; if test -e $file; then . $file; fi; set +a ;;
    ExecStart=*) command=$(sed 's/\${[A-Z_]*}/"&"/g' <<< "${line#ExecStart=}") ;;
    esac
  done < $unit
  eval "exec $command" > /run/$3.log 2>&1 &
  echo $! > $pid ;;
disable) kill $(cat $pid); while kill -0 $(cat $pid) 2> /dev/null; do sleep 0.05; done; rm $pid ;;
*) echo "systemctl $1: not known here" >&2; exit 1 ;;
esac
"#;

/// Copies to the folder that the other host has as its `/etc`: hosts of a lab have no ssh.
const SCP: &str = r#"#!/bin/bash
set -e
test "$#:$1:$3" = 3:-pr:10.0.0.2:/etc/
cp -pr "$2" HOST2/etc/
"#;

/// A block of lines to paste, and the sentence that says where.
struct Block {
    place: String,
    lines: String,
}

/// The blocks between two headings. A block belongs to the last `**…**` sentence before it.
fn blocks(readme: &str, from: &str, to: &str) -> Vec<Block> {
    let begin = readme.find(from).unwrap_or_else(|| panic!("README has no section {from:?}"));
    let section = &readme[begin..begin + readme[begin..].find(to).unwrap()];
    let (mut blocks, mut place, mut prose): (Vec<Block>, _, _) = (Vec::new(), String::new(), true);
    for line in section.lines() {
        match line.strip_prefix("    ") {
            Some(code) if prose => {
                blocks.push(Block { place: place.clone(), lines: format!("{code}\n") });
                prose = false;
            }
            Some(code) => blocks.last_mut().unwrap().lines.push_str(&format!("{code}\n")),
            None if line.trim().is_empty() => {}
            None => {
                prose = true;
                let bold: Vec<&str> = line.split("**").collect();
                if bold.len() > 2 {
                    place = bold[bold.len() - 2].to_owned();
                }
            }
        }
    }
    blocks
}

/// A root shell on a host, in the checkout.
struct Shell {
    bash: Child,
    log: PathBuf,
    turn: usize,
}

impl Shell {
    fn new(host: &Host, checkout: &Path) -> Shell {
        let log = host.directory.join("shell.log");
        let mut command = Command::new("bash");
        let file = std::fs::File::create(&log).unwrap();
        command.current_dir("/").stdin(Stdio::piped()).stdout(file.try_clone().unwrap()).stderr(file);
        host.mounts.enter(&mut command).unwrap();
        die_with_parent(&mut command);
        let bash = host.netns.run(|| command.spawn()).unwrap().unwrap();
        let mut shell = Shell { bash, log, turn: 0 };
        // Folders that the lines write to are this host's own.
        let prepare = format!(
            "cd {0}; cp -a /etc {1}; mount --bind {1} /etc; for d in /usr/local/bin /var/lib /opt; do mount -t tmpfs none $d; done
             mkdir -p /etc/systemd/system /etc/default; cp {0}/systemctl {0}/scp /usr/local/bin/; PATH=/usr/local/bin:$PATH",
            checkout.display(),
            host.directory.join("etc").display()
        );
        shell.paste(&prepare);
        shell
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Pastes lines and waits for the end of the last; each line must succeed. Returns what they printed.
    #[track_caller]
    fn paste(&mut self, lines: &str) -> String {
        self.turn += 1;
        let (before, mark) = (self.text().len(), format!("turn {} ended", self.turn));
        let script = format!("trap 'echo FAILED: $BASH_COMMAND' ERR\n{lines}\ntrap - ERR\necho {mark}\n");
        self.bash.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
        eventually(&format!("the shell is through with\n{lines}"), || self.text()[before..].contains(&mark));
        let text = self.text()[before..].to_owned();
        assert!(!text.contains("FAILED: "), "{lines}\n{text}");
        text
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.bash.kill();
        let _ = self.bash.wait();
    }
}

pub(crate) fn first_quarter_works_as_written(root: &Path) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let readme = std::fs::read_to_string(repository.join("README.md")).unwrap();
    let lab = Lab::wire(plan(2, "vxlan", StoreKind::Embedded), root).unwrap();
    // The subnets are drawn at random, as on new hosts.
    lab.hosts.iter().for_each(|host| std::fs::remove_file(host.subnet_file()).unwrap());
    let checkout = root.join("checkout");
    std::fs::create_dir_all(checkout.join("target/dist")).unwrap();
    std::os::unix::fs::symlink(repository.join("deploy"), checkout.join("deploy")).unwrap();
    for name in ["flanneld", "flannel-cni"] {
        std::fs::copy(PROGRAM, checkout.join("target/dist").join(name)).unwrap();
    }
    let scp = SCP.replace("HOST2", &lab.hosts[1].directory.display().to_string());
    for (name, text) in [("systemctl", SYSTEMCTL), ("scp", &scp)] {
        std::fs::write(checkout.join(name), text).unwrap();
        std::fs::set_permissions(checkout.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut shells: Vec<Shell> = lab.hosts.iter().map(|host| Shell::new(host, &checkout)).collect();
    // What stays in the foreground gets a terminal of its own.
    let mut terminals: Vec<Child> = Vec::new();
    let (mut pasted, mut printed) = (0, String::new());
    let ready = || lab.hosts.iter().all(|host| host.get("/readyz").is_ok_and(|(status, _)| status == 200));
    for block in blocks(&readme, "## The first quarter of an hour", "## When something is wrong") {
        let hosts: &[usize] = match block.place.as_str() {
            place if place.contains("on each host") => &[0, 1],
            place if place.contains("on host 1") => &[0],
            // The build: this test has its own.
            place if place.contains("a machine like the hosts") => continue,
            place => panic!("{place:?} does not say on which host\n{}", block.lines),
        };
        pasted += 1;
        if block.lines.contains("systemctl enable --now flanneld-store") {
            assert_eq!(terminals.len(), 3, "the store and two daemons");
            for mut terminal in terminals.drain(..).rev() {
                rustix::process::kill_process(rustix::process::Pid::from_child(&terminal), rustix::process::Signal::INT).unwrap();
                assert!(terminal.wait().unwrap().success());
            }
        }
        for host in hosts {
            if block.lines.starts_with("flanneld store") || block.lines.starts_with("flanneld --") {
                let mut command = Command::new("bash");
                command
                    .args(["-c", &format!("exec {}", block.lines)])
                    .env("PATH", format!("/usr/local/bin:{}", std::env::var("PATH").unwrap()));
                lab.hosts[*host].mounts.enter(&mut command).unwrap();
                die_with_parent(&mut command);
                let log = std::fs::File::create(root.join(format!("terminal{}.log", terminals.len()))).unwrap();
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
                terminals.push(lab.hosts[*host].netns.run(|| command.spawn()).unwrap().unwrap());
                std::thread::sleep(Duration::from_millis(300));
            } else {
                printed.push_str(&shells[*host].paste(&block.lines));
            }
        }
        if block.lines.starts_with("flanneld --") || block.lines.contains("systemctl enable --now flanneld\n") {
            eventually("the daemons are ready", ready);
        }
    }
    assert!(pasted >= 14, "{pasted} blocks");
    let store = std::fs::read_to_string(root.join("terminal0.log")).unwrap();
    assert!(store.contains("tls=true") && !store.contains("client refused"), "{store}");
    assert_eq!(printed.matches(" 0% packet loss").count(), 3, "{printed}");
    assert_eq!(printed.matches("nothing of flannel's is left on this host").count(), 2, "{printed}");
    assert!(
        printed.contains("removed bridge cni0\n") && printed.contains("removed file /etc/cni/net.d/10-flannel.conflist\n"),
        "{printed}"
    );
}
