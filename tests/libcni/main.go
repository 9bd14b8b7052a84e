// A container runtime as far as CNI is concerned, for the tests: each call of libcni that containerd, CRI-O and podman make,
// by a request in JSON on standard input. With the first argument "cnitool" it is that program.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/containernetworking/cni/cnitool/cmd"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

// What to call, for which attachment.
type request struct {
	Call         string               `json:"call"`
	List         string               `json:"list"`
	Cache        string               `json:"cache"`
	Path         []string             `json:"path"`
	ID           string               `json:"id"`
	Netns        string               `json:"netns"`
	Ifname       string               `json:"ifname"`
	Args         [][2]string          `json:"args"`
	Capabilities map[string]any       `json:"capabilities"`
	Valid        []types.GCAttachment `json:"valid"`
}

// What came of it.
type answer struct {
	Result  any    `json:"result,omitempty"`
	Version string `json:"version,omitempty"`
	Error   string `json:"error,omitempty"`
	Code    uint   `json:"code,omitempty"`
}

func call(r request) (any, string, error) {
	list, err := libcni.ConfListFromFile(r.List)
	if err != nil {
		return nil, "", err
	}
	cni := libcni.NewCNIConfigWithCacheDir(r.Path, r.Cache, nil)
	rt := &libcni.RuntimeConf{
		ContainerID: r.ID, NetNS: r.Netns, IfName: r.Ifname, Args: r.Args, CapabilityArgs: r.Capabilities,
	}
	ctx := context.Background()
	var result any
	switch r.Call {
	case "add":
		result, err = cni.AddNetworkList(ctx, list, rt)
	case "check":
		err = cni.CheckNetworkList(ctx, list, rt)
	case "del":
		err = cni.DelNetworkList(ctx, list, rt)
	case "cached":
		var cached types.Result
		if cached, err = cni.GetNetworkListCachedResult(list, rt); cached != nil {
			result = cached
		}
	case "attachments":
		result, err = cni.GetCachedAttachments(r.ID)
	case "gc":
		err = cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: r.Valid})
	case "status":
		err = cni.GetStatusNetworkList(ctx, list)
	case "validate":
		result, err = cni.ValidateNetworkList(ctx, list)
	default:
		err = fmt.Errorf("unknown call %q", r.Call)
	}
	if err != nil {
		result = nil
	}
	return result, list.CNIVersion, err
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "cnitool" {
		os.Args = os.Args[1:]
		if err := cmd.Execute(); err != nil {
			os.Exit(1)
		}
		return
	}
	var r request
	if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	result, version, err := call(r)
	a := answer{Result: result, Version: version}
	if err != nil {
		a.Error = err.Error()
		var plain *types.Error
		if errors.As(err, &plain) {
			a.Code = plain.Code
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		panic(err)
	}
}
