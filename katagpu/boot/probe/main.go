// The part of the boot check that runs inside the guest.
//
// It is handed over on a disk of its own, copied to memory and started before the guest's init, which
// it then leaves alone. On a virtio-serial port named "katagpu" it takes one request a line, as JSON,
// and answers each with one line; requests run side by side. Every line of the kernel's log is sent
// unasked. It needs no library and no program of the guest but those that a request names.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const port = "katagpu"

// request is what the host asks for; bytes are base64 in JSON.
type request struct {
	ID      int      `json:"id"`
	Do      string   `json:"do"`
	Argv    []string `json:"argv"`    // run: a program and its arguments
	Env     []string `json:"env"`     // run: its whole environment
	Stdin   []byte   `json:"stdin"`   // run
	Seconds float64  `json:"seconds"` // run: how long it may take
	Path    string   `json:"path"`    // read, write, open, shell (a terminal)
	Data    []byte   `json:"data"`    // write
	Mode    uint32   `json:"mode"`    // write
	Rows    uint16   `json:"rows"`    // shell
	Columns uint16   `json:"columns"` // shell
}

// answer is what came of a request, or, without an id, a line of the kernel's log.
type answer struct {
	ID      int     `json:"id,omitempty"`
	Error   string  `json:"error,omitempty"`
	Errno   int     `json:"errno,omitempty"`
	Status  int     `json:"status"`
	Stdout  []byte  `json:"stdout,omitempty"`
	Stderr  []byte  `json:"stderr,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Kernel  string  `json:"kernel,omitempty"`
	Ready   bool    `json:"ready,omitempty"`
}

type channel struct {
	file *os.File
	lock sync.Mutex
}

func (c *channel) say(said answer) {
	line, err := json.Marshal(said)
	if err != nil {
		return
	}
	c.lock.Lock()
	defer c.lock.Unlock()
	c.file.Write(append(line, '\n'))
}

// wait opens the port as soon as sysfs and the device are there.
func wait() *os.File {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			text, err := os.ReadFile(name)
			if err != nil || strings.TrimSpace(string(text)) != port {
				continue
			}
			device := "/dev/" + filepath.Base(filepath.Dir(name))
			if file, err := os.OpenFile(device, os.O_RDWR, 0); err == nil {
				return file
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func main() {
	os.Remove(os.Args[0])
	c := &channel{file: wait()}
	c.say(answer{Ready: true})
	go kernelLog(c)
	lines := bufio.NewReaderSize(c.file, 1<<16)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			// The host's end is closed for now; reading says so at once.
			time.Sleep(50 * time.Millisecond)
			continue
		}
		var asked request
		if err := json.Unmarshal(line, &asked); err != nil {
			c.say(answer{Error: fmt.Sprintf("not a request: %v", err)})
			continue
		}
		go func() {
			start := time.Now()
			found := serve(asked)
			found.ID = asked.ID
			found.Seconds = time.Since(start).Seconds()
			c.say(found)
		}()
	}
}

func serve(asked request) answer {
	switch asked.Do {
	case "run":
		return run(asked)
	case "read":
		data, err := os.ReadFile(asked.Path)
		return failed(answer{Stdout: data}, err)
	case "write":
		mode := os.FileMode(asked.Mode)
		err := os.WriteFile(asked.Path, asked.Data, mode)
		if err == nil {
			err = os.Chmod(asked.Path, mode)
		}
		return failed(answer{}, err)
	case "open":
		file, err := os.OpenFile(asked.Path, os.O_RDWR, 0)
		if err == nil {
			file.Close()
		}
		return failed(answer{}, err)
	case "shell":
		return failed(answer{}, shell(asked))
	}
	return answer{Error: "unknown request " + asked.Do}
}

func failed(found answer, err error) answer {
	if err != nil {
		found.Error = err.Error()
		var errno syscall.Errno
		if errors.As(err, &errno) {
			found.Errno = int(errno)
		}
	}
	return found
}

// program is where the request's own PATH has it. This process was started without one.
func program(asked request) string {
	name := asked.Argv[0]
	path := "/usr/sbin:/usr/bin:/sbin:/bin"
	for _, variable := range asked.Env {
		if value, found := strings.CutPrefix(variable, "PATH="); found {
			path = value
		}
	}
	if strings.Contains(name, "/") {
		return name
	}
	for _, directory := range filepath.SplitList(path) {
		place := filepath.Join(directory, name)
		if found, err := os.Stat(place); err == nil && found.Mode()&0o111 != 0 && !found.IsDir() {
			return place
		}
	}
	return "/" + name // which is not there, as the answer will say
}

// run ends the program's whole group when its time is over.
func run(asked request) answer {
	if len(asked.Argv) == 0 {
		return answer{Error: "no program is named"}
	}
	ctx, cancel := context.WithTimeout(context.Background(),
		time.Duration(asked.Seconds*float64(time.Second)))
	defer cancel()
	var stdout, stderr bytes.Buffer
	command := exec.CommandContext(ctx, program(asked), asked.Argv[1:]...)
	command.Env = asked.Env
	if command.Env == nil {
		command.Env = []string{}
	}
	command.Dir = "/"
	command.Stdin = bytes.NewReader(asked.Stdin)
	command.Stdout = &stdout
	command.Stderr = &stderr
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = time.Second
	err := command.Run()
	found := answer{Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		found.Status = -1
		found.Error = fmt.Sprintf("did not end within %g s", asked.Seconds)
	case errors.As(err, &exit):
		status := exit.Sys().(syscall.WaitStatus)
		found.Status = status.ExitStatus()
		if status.Signaled() {
			found.Status = 128 + int(status.Signal())
		}
	case err != nil:
		found.Status = -1
		return failed(found, err)
	}
	return found
}

// kernelLog sends the kernel's log from its first line on.
func kernelLog(c *channel) {
	file, err := os.Open("/dev/kmsg")
	if err != nil {
		c.say(answer{Error: err.Error()})
		return
	}
	record := make([]byte, 8192)
	for {
		n, err := syscall.Read(int(file.Fd()), record)
		if err == syscall.EPIPE || err == syscall.EINTR {
			continue // the ring went around: what is left comes next
		}
		if err != nil || n == 0 {
			return
		}
		c.say(answer{Kernel: strings.TrimRight(string(record[:n]), "\n")})
	}
}
