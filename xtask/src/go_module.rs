//! Go modules that are built from a changed copy: downloads them through the module proxy, and copies them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::programs::{go, go_version};
use crate::tools::{Step, cache, output, step};

/// Downloads a version of a module and returns its directory. Go verifies it by `go.sum`; a module that is not listed there is
/// verified by the checksum.
pub(crate) fn download(list: &Path, module: &str, version: &str, sum: Option<&str>) -> anyhow::Result<PathBuf> {
    let _step = Step::begin(format!("downloading {module} {version}"));
    let module = format!("{module}@{version}");
    let mut command = Command::new(go()?);
    let answer = output(command.args(["mod", "download", "-json", &module]).current_dir(list))?;
    let answer: Value = serde_json::from_slice(&answer.stdout).with_context(|| format!("go mod download {module} printed no JSON"))?;
    let folder = answer["Dir"].as_str().with_context(|| format!("cannot download {module}: {}", answer["Error"]))?;
    ensure!(sum.is_none_or(|sum| answer["Sum"] == sum), "{module} has the checksum {} and not {sum:?}", answer["Sum"]);
    Ok(folder.into())
}

/// Copies a directory, and makes the files writable.
pub(crate) fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &target)?,
            false => std::fs::write(target, std::fs::read(entry.path())?)?,
        }
    }
    Ok(())
}

/// The module of Go flannel.
const FLANNEL: &str = "github.com/flannel-io/flannel";

/// Go flannel's daemon, built on first use. The backend tencent-vpc is left out: the proxy does not serve the module that it needs.
/// The udp backend is written in C, so a C compiler is needed, which Rust needs for its linker.
pub(crate) fn flannel() -> anyhow::Result<PathBuf> {
    let list = std::env::current_dir()?.join("tests/go-flannel");
    let version = go_version(&list, FLANNEL)?;
    let program = cache()?.join(format!("go-flannel-{version}"));
    if program.is_file() {
        return Ok(program);
    }
    let module = cache()?.join(format!(".go-flannel.{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&module);
    copy(&download(&list, FLANNEL, &version, None)?, &module)?;
    let main = module.join("main.go");
    let text = std::fs::read_to_string(&main)?;
    let kept: Vec<&str> = text.lines().filter(|line| !line.contains("/backend/tencentvpc")).collect();
    ensure!(kept.len() + 1 == text.lines().count(), "main.go of {FLANNEL} {version} does not import the backend tencentvpc as expected");
    std::fs::write(&main, kept.join("\n") + "\n")?;
    let mut command = Command::new(go()?);
    command.args(["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", "flanneld.built", "."]);
    command.env("CGO_ENABLED", "1").current_dir(&module);
    step(format!("building flannel {version} with Go"), &mut command).context("cannot build Go flannel")?;
    std::fs::rename(module.join("flanneld.built"), &program)?;
    std::fs::remove_dir_all(&module)?;
    Ok(program)
}
