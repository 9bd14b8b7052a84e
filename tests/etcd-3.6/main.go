// An etcd 3.6 for the tests: there is no package of it for Debian 12 or in PyPI.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
