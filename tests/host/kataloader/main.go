// What Kata's own loader makes of a configuration file and its drop-ins, as JSON.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/kata-containers/kata-containers/src/runtime/pkg/katautils"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/utils"
)

func main() {
	// The loader asks whether the host has vsock: this one need not.
	utils.VHostVSockDevicePath = "/dev/null"
	path, config, err := katautils.LoadConfiguration(os.Args[1], true)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	out, err := json.Marshal(map[string]interface{}{"path": path, "runtime": config})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(string(out))
}
