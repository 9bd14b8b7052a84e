// The control plane of the oldest Kubernetes that builds as a Go module, for the tests: see ../kubernetes.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

func main() {
	commands := map[string]func() *cobra.Command{
		"kube-apiserver":          apiserver.NewAPIServerCommand,
		"kube-controller-manager": controllers.NewControllerManagerCommand,
		"kubectl":                 kubectl.NewDefaultKubectlCommand,
	}
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: kubernetes PROGRAM ARGUMENTS")
		os.Exit(2)
	}
	os.Args = os.Args[1:]
	switch command := commands[os.Args[0]]; {
	case command != nil:
		os.Exit(cli.Run(command()))
	case os.Args[0] == "etcd":
		etcdmain.Main(os.Args)
	case os.Args[0] == "certificates":
		if err := certificates(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "kubernetes certificates:", err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, "kubernetes: there is no program", os.Args[0])
		os.Exit(2)
	}
}
