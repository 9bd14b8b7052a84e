//! Builds the reference plugins' test suites: downloads them from the Go module proxy, patches a copy so that they can run our
//! programs, and puts the test programs into the cache.

use std::ffi::OsStr;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::{SHIM, SUITES};
use crate::go_module::{copy, download};
use crate::programs;
use crate::tools::{cache, step};

/// The module with the plugins and their suites.
const MODULE: &str = "github.com/containernetworking/plugins";
/// The last version of that module with the flannel plugin, and its checksum. The plugin has since moved to its own module,
/// which the proxy does not serve.
const FLANNEL: (&str, &str) = ("v0.9.1", "h1:FD1tADPls2EEi3flPc2OegIY1M9pUa9r2Quag7HMLV8=");

/// The plugins whose functions are replaced, and the files that define these.
const PLUGINS: [(&str, &str); 8] = [
    ("bridge", "plugins/main/bridge/bridge.go"),
    ("loopback", "plugins/main/loopback/loopback.go"),
    ("host-local", "plugins/ipam/host-local/main.go"),
    ("portmap", "plugins/meta/portmap/main.go"),
    ("bandwidth", "plugins/meta/bandwidth/main.go"),
    ("firewall", "plugins/meta/firewall/firewall.go"),
    ("tuning", "plugins/meta/tuning/tuning.go"),
    ("flannel", "plugins/meta/flannel/flannel.go"),
];

/// Programs that the suites run beside the plugins of [`programs::reference_plugins`].
const PROGRAMS: [(&str, &str); 3] =
    [("ptp", "./plugins/main/ptp"), ("server", "./pkg/testutils/echo/server"), ("client", "./pkg/testutils/echo/client")];
/// The module of cnitool, with which the integration suite calls plugins.
const CNI: &str = "github.com/containernetworking/cni";

/// The built suites.
pub(super) struct Built {
    /// The patched module. A suite runs in the directory of its package.
    pub(super) module: PathBuf,
    /// The test programs, `NAME.test` for each package.
    pub(super) tests: PathBuf,
    /// The reference's plugins and helper programs.
    pub(super) programs: PathBuf,
    /// Results of runs with the reference.
    pub(super) reference: PathBuf,
}

/// Builds the suites, unless they are in the cache.
pub(super) fn suites() -> anyhow::Result<Built> {
    let list = std::env::current_dir()?.join("tests/cni-plugins");
    let version = programs::go_version(&list, MODULE)?;
    let mut hasher = std::hash::DefaultHasher::new();
    for text in [SHIM, include_str!("source.rs"), FLANNEL.1] {
        hasher.write(text.as_bytes());
    }
    let folder = cache()?.join(format!("cni-suite-{version}-{:08x}", hasher.finish() >> 32));
    let built = |folder: &Path| Built {
        module: folder.join("module"),
        tests: folder.join("tests"),
        programs: folder.join("programs"),
        reference: folder.join("reference"),
    };
    if folder.is_dir() {
        return Ok(built(&folder));
    }
    let unfinished = cache()?.join(format!(".cni-suite.{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&unfinished);
    let made = built(&unfinished);
    for folder in [&made.tests, &made.programs, &made.reference] {
        std::fs::create_dir_all(folder)?;
    }
    copy(&download(&list, MODULE, &version, None)?, &made.module)?;
    let caller = unfinished.join("cni");
    copy(&download(&list, CNI, &programs::go_version(&list, CNI)?, None)?, &caller)?;
    let flannel = Path::new("plugins/meta/flannel");
    copy(&download(&list, MODULE, FLANNEL.0, Some(FLANNEL.1))?.join(flannel), &made.module.join(flannel))?;
    patch(&made.module).context("the patches do not fit these sources")?;
    build(&made)?;
    step("building cnitool with Go", &mut go(&["build", "-ldflags=-s -w"], &made.programs.join("cnitool"), "./cnitool", &caller)?)?;
    std::fs::remove_dir_all(&caller)?;
    for program in std::fs::read_dir(programs::reference_plugins()?)? {
        let program = program?;
        std::fs::copy(program.path(), made.programs.join(program.file_name()))?;
    }
    std::fs::rename(&unfinished, &folder)?;
    Ok(built(&folder))
}

fn build(built: &Built) -> anyhow::Result<()> {
    for (name, package) in PROGRAMS {
        step(
            format!("building {name} with Go"),
            &mut go(&["build", "-ldflags=-s -w"], &built.programs.join(name), package, &built.module)?,
        )?;
    }
    for suite in SUITES {
        let file = built.tests.join(suite.program());
        if !file.is_file() {
            let (name, package) = (format!("building the suite {} with Go", suite.name), format!("./{}", suite.package));
            step(name, &mut go(&["test", "-c", "-vet=off", "-ldflags=-s -w"], &file, &package, &built.module)?)?;
        }
    }
    Ok(())
}

/// A Go command that builds a package of a module.
fn go(args: &[&str], file: &Path, package: &str, module: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(programs::go()?);
    command.args(args).arg("-o").arg(file).arg(package).current_dir(module).env("GOFLAGS", "-trimpath").env("CGO_ENABLED", "0");
    Ok(command)
}

/// Changes a file of the module. Fails if nothing changes.
fn edit(module: &Path, file: &str, change: impl FnOnce(String) -> String) -> anyhow::Result<()> {
    let path = module.join(file);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
    let changed = change(text.clone());
    ensure!(changed != text, "nothing to change in {file}");
    std::fs::write(&path, changed).with_context(|| format!("cannot write {file}"))
}

/// Adds an import to a Go file.
fn import(text: &str) -> String {
    text.replacen("import (\n", &format!("import (\n\t\"{MODULE}/pkg/shim\"\n"), 1)
}

fn patch(module: &Path) -> anyhow::Result<()> {
    let shim = module.join("pkg/shim");
    std::fs::create_dir(&shim)?;
    std::fs::write(shim.join("shim.go"), SHIM)?;
    for (plugin, file) in PLUGINS {
        edit(module, file, |text| divert(plugin, &text))?;
    }
    // Suites that build programs use the built ones instead.
    for suite in
        ["plugins/main/loopback/loopback", "plugins/meta/portmap/portmap", "plugins/meta/bandwidth/bandwidth", "integration/integration"]
    {
        edit(module, &format!("{suite}_suite_test.go"), |text| import(&text).replace("gexec.Build(", "shim.Build("))?;
    }
    // These tests work with any kind of link. Unlike dummy, veth exists on every host that runs these tests.
    for file in ["plugins/meta/tuning/tuning_test.go", "plugins/meta/firewall/firewall_iptables_test.go"] {
        edit(module, file, |text| {
            text.replace("&netlink.Dummy{", "&netlink.Veth{")
                .replace("LinkAttrs: linkAttrs,\n", "LinkAttrs: linkAttrs, PeerName: \"peer0\",\n")
        })?;
    }
    edit(module, "plugins/meta/portmap/portmap_integ_test.go", |text| {
        import(&text).replace("\"type\": \"portmap\",\n", "\"type\": \"portmap\",\n` + shim.Backend() + `")
    })?;
    // Use this run's directories for addresses and plugins.
    edit(module, "integration/integration_linux_test.go", |text| {
        import(&text).replace("/tmp/", "/run/tmp/").replace("filepath.Abs(\"../bin\")", "filepath.Abs(shim.Programs())")
    })?;
    for file in [
        "basic-ptp.json",
        "chained-ptp-bandwidth.conflist",
        "basic-bridge/network-chain-test.json",
        "chained-bridge-bandwidth/network-chain-test.conflist",
    ] {
        edit(module, &format!("integration/testdata/{file}"), |text| text.replace("/tmp/", "/run/tmp/"))?;
    }
    // Programs use the test's message bus as the system bus.
    edit(module, "plugins/meta/firewall/firewall_firewalld_test.go", |text| {
        import(&text).replace("testConn = conn\n", "testConn = conn\n\t\tshim.SystemBus(busAddr)\n")
    })?;
    // Our errors begin with the field, before the reference's text.
    for file in [
        "plugins/main/bridge/bridge_test.go",
        "plugins/ipam/host-local/host_local_test.go",
        "plugins/meta/bandwidth/bandwidth_linux_test.go",
    ] {
        edit(module, file, |text| containing(&text))?;
    }
    modernize_flannel(module)
}

/// Makes tests search for the expected text anywhere in an error: a plain `MatchError(text)` compares the whole text.
fn containing(text: &str) -> String {
    let line = |line: &str| {
        let found = line.trim_start().starts_with("Expect(").then(|| line.split_once(".To(MatchError(")).flatten();
        match found.and_then(|(start, rest)| Some((start, rest.strip_suffix("))")?))) {
            Some((start, wanted)) if !wanted.contains("expectedError") => format!("{start}.To(MatchError(ContainSubstring({wanted})))"),
            _ => line.to_owned(),
        }
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n") + "\n"
}

/// Makes a plugin's functions run our program if the shim is on.
fn divert(plugin: &str, text: &str) -> String {
    let mut lines = Vec::new();
    for line in import(text).lines() {
        let name = line.strip_prefix("func cmd").and_then(|rest| rest.strip_suffix("(args *skel.CmdArgs) error {"));
        if let Some(name) = name {
            let verb = name.to_uppercase();
            lines.push(format!("func cmd{name}(args *skel.CmdArgs) error {{"));
            lines.push(format!("\tif shim.On() {{\n\t\treturn shim.Run(\"{plugin}\", \"{verb}\", args)\n\t}}"));
            lines.push(format!("\treturn reference{name}(args)\n}}\n\nfunc reference{name}(args *skel.CmdArgs) error {{"));
        } else {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n") + "\n"
}

/// Updates the imports of the flannel plugin, which is of an older version than the module that it is built in.
fn modernize_flannel(module: &Path) -> anyhow::Result<()> {
    let folder = module.join("plugins/meta/flannel");
    for file in std::fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()? {
        let name = file.file_name();
        if Path::new(&name).extension() == Some(OsStr::new("go")) && name.to_string_lossy().ends_with("_test.go") {
            edit(module, &format!("plugins/meta/flannel/{}", name.to_string_lossy()), |text| {
                text.replace("\"github.com/onsi/ginkgo\"", "\"github.com/onsi/ginkgo/v2\"").replace(
                    "\"github.com/containernetworking/cni/pkg/types/current\"",
                    "current \"github.com/containernetworking/cni/pkg/types/100\"",
                )
            })?;
        }
    }
    Ok(())
}
