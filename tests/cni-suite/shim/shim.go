// Package shim replaces the reference plugins in their own test suites. With SUITE_OURS set, a plugin's function runs the
// program of that name in SUITE_PROGRAMS; without it, the reference's own code. The programs that a suite would build are
// taken from the same folder.
package shim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/onsi/ginkgo/v2"
)

// On reports whether our programs replace the reference's code.
func On() bool { return os.Getenv("SUITE_OURS") != "" }

// Programs is the folder of the plugins under test.
func Programs() string { return os.Getenv("SUITE_PROGRAMS") }

// Build returns the program of a package, which was built before.
func Build(pkg string, _ ...string) (string, error) {
	program := filepath.Join(Programs(), filepath.Base(pkg))
	_, err := os.Stat(program)
	return program, err
}

// SystemBus makes an address that of the system's message bus, for the programs that are started from now on.
func SystemBus(address string) { _ = os.Setenv("DBUS_SYSTEM_BUS_ADDRESS", strings.TrimSpace(address)) }

// Backend is the portmap backend that the suite's configuration asks for: the field and a comma, or nothing.
func Backend() string {
	if backend := os.Getenv("SUITE_PORTMAP_BACKEND"); backend != "" {
		return fmt.Sprintf("%q: %q,", "backend", backend)
	}
	return ""
}

// note records that the current spec ran a plugin.
func note() {
	file, err := os.OpenFile(os.Getenv("SUITE_CALLS"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return
	}
	defer file.Close()
	report := ginkgo.CurrentSpecReport()
	name, _ := json.Marshal(append(report.ContainerHierarchyTexts, report.LeafNodeText))
	_, _ = file.Write(append(name, '\n'))
}

// Run executes a command of a plugin in the network namespace of the calling thread, and prints its result as the
// reference's function does.
func Run(plugin, command string, args *skel.CmdArgs) error {
	// A child has the namespace of the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	note()

	var env []string
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); !strings.HasPrefix(name, "CNI_") {
			env = append(env, variable)
		}
	}
	// The reference's functions find delegates by the environment, not by args.Path.
	path := os.Getenv("CNI_PATH")
	if path == "" {
		path = args.Path
	}
	if path == "" {
		path = os.Getenv("PATH")
	}
	env = append(env, "CNI_COMMAND="+command, "CNI_PATH="+path)
	if command != "GC" && command != "STATUS" {
		env = append(env, "CNI_CONTAINERID="+args.ContainerID, "CNI_NETNS="+args.Netns, "CNI_IFNAME="+args.IfName, "CNI_ARGS="+args.Args)
	}
	// The check for the host's own namespace is the caller's, which the suites leave out.
	env = append(env, "CNI_NETNS_OVERRIDE=1")

	cmd := exec.Command(filepath.Join(Programs(), plugin))
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, bytes.NewReader(args.StdinData), &stdout, &stderr
	err := cmd.Run()
	fmt.Fprintf(ginkgo.GinkgoWriter, "%s %s\n  stdin: %s\n  stdout: %s\n  stderr: %s\n", plugin, command, args.StdinData, stdout.String(), stderr.String())
	if err != nil {
		answer := types.Error{}
		if json.Unmarshal(stdout.Bytes(), &answer) == nil && answer.Msg != "" {
			return &answer
		}
		return fmt.Errorf("%s %s: %w without an error object: stdout %q, stderr %q", plugin, command, err, stdout.String(), stderr.String())
	}
	_, err = os.Stdout.Write(stdout.Bytes())
	return err
}
