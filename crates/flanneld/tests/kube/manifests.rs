//! Deployment: our manifest over upstream's, the kustomization, the chart, and the image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use flannel::Config;
use lab::{Lab, PodFamily};
use serde_json::{Value, json};

use crate::cluster::{PROGRAM, eventually};
use crate::containers::Sandbox;
use crate::{Version, plan, tool};

const UPSTREAM: &str = include_str!("upstream.yml");

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").canonicalize().unwrap()
}

fn lab(root: &Path) -> Lab {
    let mut lab = Lab::wire(plan(1, "vxlan", PodFamily::V4, Version::Current), root).unwrap();
    lab.start_store().unwrap();
    lab
}

/// Objects by kind and name, without what the server adds for each by itself.
fn objects(lab: &Lab, names: &[&str]) -> BTreeMap<String, Value> {
    let mut args = vec!["-n", "kube-flannel", "get", "-o", "json"];
    args.extend(names);
    let list: Value = serde_json::from_str(&lab.kubectl(&args, "").unwrap()).unwrap();
    let items = list["items"].as_array().cloned().unwrap_or_else(|| vec![list.clone()]);
    items
        .into_iter()
        .map(|item| (format!("{}/{}", item["kind"].as_str().unwrap(), item["metadata"]["name"].as_str().unwrap()), item))
        .collect()
}

/// What the server would make of objects, by kind and name.
fn dry(lab: &Lab, text: &str) -> BTreeMap<String, Value> {
    let args = ["-n", "kube-flannel", "apply", "--dry-run=server", "--validate=strict", "-o", "json", "-f", "-"];
    let list: Value = serde_json::from_str(&lab.kubectl(&args, text).unwrap()).unwrap();
    let mut objects = BTreeMap::new();
    for item in list["items"].as_array().unwrap() {
        let name = format!("{}/{}", item["kind"].as_str().unwrap(), item["metadata"]["name"].as_str().unwrap());
        let mut kept = item.clone();
        for field in ["metadata", "status"] {
            kept.as_object_mut().unwrap().remove(field);
        }
        kept["labels"] = item["metadata"]["labels"].clone();
        objects.insert(name, kept);
    }
    objects
}

pub(crate) fn our_manifest_upgrades_go_flannels(root: &Path) {
    let lab = lab(root);
    // The lab has applied ours already.
    lab.kubectl(&["delete", "namespace", "kube-flannel", "--wait=false"], "").unwrap();
    lab.kubectl(&["delete", "clusterrole,clusterrolebinding", "flannel"], "").unwrap();
    // No controller finalizes namespaces here.
    lab.kubectl(
        &["replace", "--raw", "/api/v1/namespaces/kube-flannel/finalize", "-f", "-"],
        r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"kube-flannel"},"spec":{"finalizers":[]}}"#,
    )
    .unwrap();
    for object in ["daemonset/kube-flannel-ds", "configmap/kube-flannel-cfg", "serviceaccount/flannel"] {
        let _ = lab.kubectl(&["-n", "kube-flannel", "delete", object], "");
    }
    eventually("the namespace is gone", || lab.kubectl(&["get", "namespace", "kube-flannel"], "").is_err());
    lab.kubectl(&["apply", "--validate=strict", "-f", "-"], UPSTREAM).unwrap();
    let kinds = ["daemonset,configmap,serviceaccount,clusterrole/flannel,clusterrolebinding/flannel"];
    let kinds: Vec<&str> = kinds[0].split(',').collect();
    let get = |kind: &str| objects(&lab, &[kind]);
    let before: Vec<BTreeMap<String, Value>> = kinds.iter().map(|kind| get(kind)).collect();
    let manifest = std::fs::read_to_string(deploy().join("kubernetes/kube-flannel.yml")).unwrap();
    let said = lab.kubectl(&["apply", "--validate=strict", "-f", "-"], &manifest).unwrap();
    assert!(!said.contains("created"), "{said}");
    let after: Vec<BTreeMap<String, Value>> = kinds.iter().map(|kind| get(kind)).collect();
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, object) in after {
            assert_eq!(object["metadata"]["uid"], before[name]["metadata"]["uid"], "{name} is the same one");
        }
    }
    assert_eq!(after[0].keys().collect::<Vec<_>>(), ["DaemonSet/kube-flannel-ds"]);
    let spec = &after[0]["DaemonSet/kube-flannel-ds"]["spec"]["template"]["spec"];
    let names = |list: &Value| list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&spec["initContainers"]), ["install-cni"], "upstream's are gone");
    assert_eq!(names(&spec["containers"][0]["env"]), ["NODE_NAME", "POD_NAME", "POD_NAMESPACE"]);
    assert!(!spec.to_string().contains("example.invalid"), "{spec}");
    assert_eq!(spec["containers"][0]["securityContext"]["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"] }));
    // What an operator has around it is the same; what is ours is what the README says.
    let theirs = &before[0]["DaemonSet/kube-flannel-ds"]["spec"]["template"]["spec"];
    for field in ["affinity", "hostNetwork", "priorityClassName", "tolerations", "serviceAccountName"] {
        assert_eq!(spec[field], theirs[field], "{field}");
    }
    // The health server is for the kubelet on the same host only.
    let mut theirs_here = theirs["containers"][0].clone();
    theirs_here["args"].as_array_mut().unwrap().insert(0, json!("--healthz-ip=127.0.0.1"));
    for probe in ["livenessProbe", "readinessProbe"] {
        theirs_here[probe]["httpGet"]["host"] = json!("127.0.0.1");
    }
    for field in ["ports", "livenessProbe", "readinessProbe", "resources", "volumeMounts", "args"] {
        assert_eq!(spec["containers"][0][field], theirs_here[field], "{field}");
    }
    let paths = |spec: &Value| -> Vec<(String, Value)> {
        let one = |volume: &Value| (volume["name"].as_str().unwrap().to_owned(), volume["hostPath"]["path"].clone());
        spec["volumes"].as_array().unwrap().iter().map(one).collect()
    };
    // One more is ours: an empty folder in place of the token.
    let (ours, empty): (Vec<_>, Vec<_>) = paths(spec).into_iter().partition(|(name, _)| name != "no-token");
    assert_eq!((ours, empty.len()), (paths(theirs), 1));
    let mounts = spec["initContainers"][0]["volumeMounts"].as_array().unwrap();
    let token = mounts.iter().find(|mount| mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(token.map(|mount| &mount["name"]), Some(&json!("no-token")));
    assert_eq!(spec["securityContext"], json!({ "seccompProfile": { "type": "RuntimeDefault" } }));
    for container in [&spec["containers"][0], &spec["initContainers"][0]] {
        let context = &container["securityContext"];
        assert_eq!((&context["readOnlyRootFilesystem"], &context["allowPrivilegeEscalation"]), (&json!(true), &json!(false)));
        assert!(context["privileged"] != true, "{context}");
    }
    let config = after[1]["ConfigMap/kube-flannel-cfg"]["data"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(config, ["cni-conf.json", "net-conf.json"]);
    // The kustomization is the same, and there is a way back.
    let said = lab.kubectl(&["apply", "-k", deploy().join("kubernetes").to_str().unwrap()], "").unwrap();
    assert!(said.lines().all(|line| line.ends_with("unchanged")), "{said}");
    lab.kubectl(&["apply", "--validate=strict", "-f", "-"], UPSTREAM).unwrap();
    let back = get("daemonset");
    assert_eq!(
        names(&back["DaemonSet/kube-flannel-ds"]["spec"]["template"]["spec"]["initContainers"]),
        ["install-cni-plugin", "install-cni"]
    );
}

const DAEMONSET: &str = "DaemonSet/kube-flannel-ds";

/// The chart, rendered by helm.
struct Chart<'a> {
    root: &'a Path,
    lab: &'a Lab,
}

impl Chart<'_> {
    /// Whether it can be rendered with these values, and its text or the error.
    fn render(&self, sets: &[&str]) -> (bool, String) {
        let mut command = Command::new(tool("FLANNEL_HELM"));
        command.args(["template", "flannel", "-n", "kube-flannel"]).arg(deploy().join("helm/flannel"));
        for set in sets {
            // A value that is a file of ours is that file's text.
            let is_file = set.split_once('=').is_some_and(|(_, value)| value.starts_with(&*self.root.to_string_lossy()));
            command.args([if is_file { "--set-file" } else { "--set" }, set]);
        }
        for folder in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(folder, self.root.join("helm"));
        }
        let output = command.output().unwrap();
        let said = if output.status.success() { output.stdout } else { output.stderr };
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    fn objects(&self, sets: &[&str]) -> BTreeMap<String, Value> {
        let (done, text) = self.render(sets);
        assert!(done, "{text}");
        dry(self.lab, &text)
    }
}

pub(crate) fn chart_renders_the_same_objects(root: &Path) {
    let lab = lab(root);
    let chart = Chart { root, lab: &lab };
    default_values_give_the_manifest(&chart);
    values_reach_the_configuration(&chart);
    values_reach_the_daemonset(&chart);
    lists_and_errors(&chart);
}

fn default_values_give_the_manifest(chart: &Chart<'_>) {
    // As the values are, it is the manifest: but for one toleration, which upstream's chart has too, and spaces in JSON.
    let mut ours = dry(chart.lab, &std::fs::read_to_string(deploy().join("kubernetes/kube-flannel.yml")).unwrap());
    // The chart's selector is another, and a selector cannot be changed.
    chart.lab.kubectl(&["-n", "kube-flannel", "delete", "daemonset", "kube-flannel-ds"], "").unwrap();
    let mut rendered = chart.objects(&[]);
    ours.remove("Namespace/kube-flannel");
    let tolerations = &mut rendered.get_mut(DAEMONSET).unwrap()["spec"]["template"]["spec"]["tolerations"];
    assert_eq!(tolerations.as_array_mut().unwrap().pop().unwrap(), json!({ "effect": "NoExecute", "operator": "Exists" }));
    for set in [&mut ours, &mut rendered] {
        let data = &mut set.get_mut("ConfigMap/kube-flannel-cfg").unwrap()["data"];
        for key in ["cni-conf.json", "net-conf.json"] {
            data[key] = serde_json::from_str(data[key].as_str().unwrap()).unwrap();
        }
    }
    // Go flannel's chart selects by one label, its release manifest by two; a selector cannot be changed later.
    let selectors = [&mut rendered, &mut ours].map(|set| set.get_mut(DAEMONSET).unwrap()["spec"]["selector"]["matchLabels"].take());
    assert_eq!(selectors, [json!({ "app": "flannel" }), json!({ "app": "flannel", "k8s-app": "flannel" })]);
    assert_eq!(rendered, ours);
}

fn values_reach_the_configuration(chart: &Chart<'_>) {
    let net_conf = |sets: &[&str]| chart.objects(sets)["ConfigMap/kube-flannel-cfg"]["data"]["net-conf.json"].as_str().unwrap().to_owned();
    let all = [
        "podCidrv6=fd00:244::/48",
        "flannel.backendPort=4789",
        "flannel.mtu=1400",
        "flannel.vni=7",
        "flannel.GBP=true",
        "flannel.directRouting=true",
        "flannel.enableNFTables=false",
    ];
    let want = json!({ "Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "EnableNFTables": false,
        "Backend": { "Type": "vxlan", "Port": 4789, "MTU": 1400, "VNI": 7, "GBP": true, "DirectRouting": true } });
    let text = net_conf(&all);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), want);
    assert!(Config::parse_assigned(&text).is_ok());
    let psk = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    let wireguard = net_conf(&[
        "flannel.backend=wireguard",
        "flannel.backendPort=7",
        "flannel.backendPortv6=8",
        "flannel.mtu=1400",
        "flannel.keepaliveInterval=25",
        "flannel.tunnelMode=auto",
        &format!("flannel.psk={psk}"),
    ]);
    let want = json!({ "Type": "wireguard", "ListenPort": 7, "ListenPortV6": 8, "MTU": 1400, "PersistentKeepaliveInterval": 25,
        "Mode": "auto", "PSK": psk });
    assert_eq!(serde_json::from_str::<Value>(&wireguard).unwrap()["Backend"], want);
    assert!(Config::parse_assigned(&wireguard).is_ok());
    let only_v6 = net_conf(&["podCidr=", "podCidrv6=fd00:244::/48", "flannel.backend=host-gw"]);
    assert!(Config::parse_assigned(&only_v6).unwrap().networks.v4.is_none(), "{only_v6}");
}

fn values_reach_the_daemonset(chart: &Chart<'_>) {
    let bare = chart.objects(&[
        "flannel.healthz.port=0",
        "flannel.skipCNIConfigInstallation=true",
        "flannel.replacePlugins=true",
        "flannel.nodeSelector.pool=a",
        "flannel.image.tag=9",
        "flannel.cniBinDir=/x/bin",
    ]);
    let spec = &bare[DAEMONSET]["spec"]["template"]["spec"];
    let container = &spec["containers"][0];
    assert!(
        container["args"] == json!(["--ip-masq", "--kube-subnet-mgr"])
            && container["livenessProbe"].is_null()
            && container["ports"].is_null(),
        "{container}"
    );
    assert_eq!(spec["initContainers"][0]["command"], json!(["/opt/bin/flanneld", "install-cni", "--skip-conf", "--replace"]));
    assert_eq!((&spec["nodeSelector"], &container["image"]), (&json!({ "pool": "a" }), &json!("localhost/flannel:9")));
    assert!(!spec.to_string().contains("/etc/cni/net.d") && spec.to_string().contains("/x/bin"));
    let policies: Vec<String> = chart.objects(&["flannel.ownNodeOnly=true"]).into_keys().filter(|name| name.contains("Policy")).collect();
    assert_eq!(policies, ["ValidatingAdmissionPolicy/flannel-own-node-only", "ValidatingAdmissionPolicyBinding/flannel-own-node-only"]);
    let udp = chart.objects(&["flannel.backend=udp", "flannel.healthz.livenessProbe=null"]);
    assert_eq!(udp[DAEMONSET]["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"], true);
}

fn lists_and_errors(chart: &Chart<'_>) {
    // As upstream's values file has it: a text.
    let list = chart.root.join("cni.json");
    std::fs::write(&list, r#"{"name":"cbr0","plugins":[{"type":"flannel"}]}"#).unwrap();
    let text = &chart.objects(&[&format!("flannel.cniConf={}", list.display())])["ConfigMap/kube-flannel-cfg"]["data"]["cni-conf.json"];
    assert_eq!(serde_json::from_str::<Value>(text.as_str().unwrap()).unwrap()["plugins"][0]["type"], "flannel");
    for (set, want) in [
        ("netpol.enabled=true", "this chart has no network policies yet"),
        ("flannel.backend=ipsec", "is none of vxlan, host-gw, wireguard, ipip, udp and alloc"),
        ("flannel.image.repository=ghcr.io/flannel-io/flannel", "is upstream's image"),
    ] {
        let (done, text) = chart.render(&[set]);
        assert!(!done && text.contains(want), "{text}");
    }
}

/// A folder with the image's files.
fn unpacked(root: &Path) -> PathBuf {
    let (archive, files) = (root.join("archive"), root.join("files"));
    std::fs::create_dir_all(&archive).unwrap();
    std::fs::create_dir_all(&files).unwrap();
    let untar =
        |file: &Path, folder: &Path| assert!(Command::new("tar").arg("-xf").arg(file).arg("-C").arg(folder).status().unwrap().success());
    untar(&tool("FLANNEL_IMAGE"), &archive);
    let manifest: Value = serde_json::from_str(&std::fs::read_to_string(archive.join("manifest.json")).unwrap()).unwrap();
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        untar(&archive.join(layer.as_str().unwrap()), &files);
    }
    files
}

pub(crate) fn image_has_everything_it_needs(root: &Path) {
    assert!(std::fs::metadata(tool("FLANNEL_IMAGE")).unwrap().len() < 20_000_000);
    let files = unpacked(root);
    let bin = files.join("opt/bin");
    // It starts where there is nothing else.
    let sandbox = Sandbox::new();
    let middle = PathBuf::from("/proc/self/ns/net");
    let said = sandbox.run(
        &middle,
        &format!(
            "chroot {} /opt/bin/flanneld --version 2>&1; chroot {} /opt/bin/flanneld install-cni --help",
            files.display(),
            files.display()
        ),
    );
    assert!(said.starts_with("flanneld ") && said.contains("--bin-dir"), "{said}");
    let said = Command::new(bin.join("install-conf")).output().unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("usage: install-conf SOURCE TARGET"));
    std::fs::write(root.join("subnet.env"), "FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n").unwrap();
    let options = root.join("docker_opts.env");
    let made = Command::new(bin.join("mk-docker-opts.sh")).arg("-f").arg(root.join("subnet.env")).arg("-d").arg(&options).status().unwrap();
    assert!(made.success() && std::fs::read_to_string(&options).unwrap().contains("--bip=10.244.1.1/24"));
    let (source, target) = (root.join("source"), root.join("target"));
    std::fs::write(&source, "{}").unwrap();
    assert!(Command::new(bin.join("install-conf")).args([&source, &target]).status().unwrap().success());
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "{}");
    // And what it installs is a plugin.
    let plugins = root.join("plugins");
    let install = ["install-cni", "--skip-conf", "--bin-dir"];
    assert!(Command::new(bin.join("flanneld")).args(install).arg(&plugins).status().unwrap().success());
    let version = Command::new(plugins.join("bridge")).env("CNI_COMMAND", "VERSION").output().unwrap();
    assert!(String::from_utf8_lossy(&version.stdout).contains("supportedVersions"));
}

/// The image depends on its sources alone: nothing in it names the machine, the folder or the time of the build.
pub(crate) fn image_names_no_machine_and_no_time(root: &Path) {
    let files = unpacked(root);
    let home = std::env::var("CARGO_HOME").ok().or_else(|| std::env::var("HOME").ok()).unwrap();
    let here = deploy().parent().unwrap().to_string_lossy().into_owned();
    for program in ["flanneld", "flannel-cni"] {
        let bytes = std::fs::read(files.join("opt/bin").join(program)).unwrap();
        for path in [&format!("{home}/"), &format!("{here}/"), "/.cargo/registry", "/.rustup/"] {
            assert!(!bytes.windows(path.len()).any(|part| part == path.as_bytes()), "{program} has {path}");
        }
        // An ELF file of type ET_DYN without PT_INTERP (elf(5)): static, and at a random address.
        assert_eq!(bytes[16..18], [3, 0], "{program} is position-independent");
        let number = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let (table, size, count) = (number(32), number(54), number(56));
        assert!((0..count).all(|header| number(table + header * size) != 3), "{program} needs no interpreter");
    }
    let archive = root.join("archive");
    let manifest: Value = serde_json::from_str(&std::fs::read_to_string(archive.join("manifest.json")).unwrap()).unwrap();
    let config = std::fs::read_to_string(archive.join(manifest[0]["Config"].as_str().unwrap())).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["created"], "1970-01-01T00:00:00Z");
    for layer in manifest[0]["Layers"].as_array().unwrap() {
        let list = Command::new("tar").env("TZ", "UTC").arg("-tvf").arg(archive.join(layer.as_str().unwrap())).output().unwrap();
        let list = String::from_utf8(list.stdout).unwrap();
        assert!(list.lines().count() > 3 && list.lines().all(|line| line.contains(" 1970-01-01 00:00 ")), "{list}");
    }
}

/// The files of `install-cni`: what it is given, and what it makes of that.
struct Installed {
    plugin: PathBuf,
    bin: PathBuf,
    conf: PathBuf,
    target: PathBuf,
}

impl Installed {
    fn install(&self, more: &[&str]) -> (bool, String) {
        let output = Command::new(PROGRAM)
            .arg("install-cni")
            .arg("--plugin")
            .arg(&self.plugin)
            .arg("--bin-dir")
            .arg(&self.bin)
            .arg("--conf")
            .arg(&self.conf)
            .arg("--conf-target")
            .arg(&self.target)
            .args(more)
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    }
}

/// Installs two versions in turn, and reads the files meanwhile: each is whole. Returns how many files were read.
fn read_while_versions_alternate(files: &Installed, versions: &[(Vec<u8>, String)]) -> usize {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                for entry in std::fs::read_dir(files.target.parent().unwrap()).into_iter().flatten().flatten() {
                    // As libcni looks: by the end of the name.
                    if entry.path().extension().is_some_and(|end| end == "conflist" || end == "conf" || end == "json") {
                        let text = std::fs::read_to_string(entry.path()).unwrap();
                        assert!(serde_json::from_str::<Value>(&text).is_ok(), "half a list of {} bytes", text.len());
                        seen += 1;
                    }
                }
                if let Ok(bytes) = std::fs::read(files.bin.join("host-local")) {
                    assert!(bytes.len() == 3_000_000 && bytes.iter().all(|byte| *byte == bytes[0]), "half a program");
                    seen += 1;
                }
            }
            seen
        });
        for round in 0..40 {
            let (program, text) = &versions[round % 2];
            std::fs::write(&files.plugin, program).unwrap();
            std::fs::write(&files.conf, text).unwrap();
            let (done, said) = files.install(&[]);
            assert!(done, "{said}");
            assert!(said.contains("kept plugins of others (use --replace to replace them): bridge tuning"), "{said}");
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    })
}

pub(crate) fn installed_files_are_never_seen_half_written(root: &Path) {
    use std::os::unix::fs::MetadataExt;
    let files = Installed {
        plugin: root.join("plugin"),
        bin: root.join("bin"),
        conf: root.join("conf"),
        target: root.join("net.d/10-flannel.conflist"),
    };
    let Installed { plugin, bin, conf, target } = &files;
    std::fs::create_dir_all(bin).unwrap();
    // Plugins of others, and an older flannel.
    std::fs::write(bin.join("bridge"), "another's").unwrap();
    std::fs::write(bin.join("flannel"), "upstream's").unwrap();
    std::os::unix::fs::symlink("/nowhere/tuning", bin.join("tuning")).unwrap();
    let list = |text: &str| format!(r#"{{"name":"cbr0","cniVersion":"1.0.0","plugins":[{{"type":"flannel","note":"{text}"}}]}}"#);
    let install = |more: &[&str]| files.install(more);
    let versions: Vec<(Vec<u8>, String)> =
        (0..2u8).map(|i| (vec![b'0' + i; 3_000_000], list(&char::from(b'0' + i).to_string().repeat(200_000)))).collect();
    let seen = read_while_versions_alternate(&files, &versions);
    assert!(seen > 10, "{seen}");
    assert_eq!(std::fs::read(bin.join("bridge")).unwrap(), b"another's");
    assert_eq!(std::fs::read(bin.join("flannel")).unwrap(), versions[1].0, "flannel is replaced in any case");
    assert!(
        std::fs::metadata(target).unwrap().mode() & 0o777 == 0o644
            && std::fs::metadata(bin.join("portmap")).unwrap().mode() & 0o777 == 0o755
    );
    // Nothing to do: nothing is written.
    let before = (std::fs::metadata(target).unwrap().ino(), std::fs::metadata(bin.join("portmap")).unwrap().ino());
    let (done, said) = install(&[]);
    assert!(done && said.contains("is up to date"), "{said}");
    assert_eq!(before, (std::fs::metadata(target).unwrap().ino(), std::fs::metadata(bin.join("portmap")).unwrap().ino()));
    // A broken list is refused, and the good one stands.
    std::fs::write(conf, r#"{"name":"cbr0","plugins":"#).unwrap();
    let (done, said) = install(&[]);
    assert!(!done && said.contains("key cni-conf.json of ConfigMap kube-flannel-cfg") && said.contains("it is not valid JSON"), "{said}");
    assert_eq!(std::fs::read_to_string(target).unwrap(), versions[1].1);
    // Killed before the last step: the next run still knows what of the rest is ours.
    std::fs::write(plugin, &versions[0].0).unwrap();
    std::fs::copy(plugin, bin.join("half")).unwrap();
    std::fs::rename(bin.join("half"), bin.join("host-local")).unwrap();
    let (done, said) = install(&["--skip-conf"]);
    assert!(done && !said.contains("portmap host-local") && std::fs::read(bin.join("portmap")).unwrap() == versions[0].0, "{said}");
    let file = |name: &str| std::fs::metadata(bin.join(name)).unwrap().ino();
    assert_eq!((file("host-local"), file("portmap")), (file("flannel-cni"), file("flannel-cni")), "one file, as the next version expects");
    std::fs::write(plugin, &versions[1].0).unwrap();
    assert!(install(&["--skip-conf", "--replace"]).0);
    assert_eq!(std::fs::read(bin.join("bridge")).unwrap(), versions[1].0);
    let names: Vec<String> =
        std::fs::read_dir(bin).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().all(|name| !name.starts_with('.')), "nothing temporary is left: {names:?}");
}
