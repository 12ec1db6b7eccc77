package main

import (
	"os"
	"os/exec"
	"syscall"
	"unsafe"
)

// shell runs an interactive shell on a terminal, and returns when it ends.
func shell(asked request) error {
	terminal, err := os.OpenFile(asked.Path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer terminal.Close()
	size := [4]uint16{asked.Rows, asked.Columns}
	syscall.Syscall(syscall.SYS_IOCTL, terminal.Fd(), syscall.TIOCSWINSZ,
		uintptr(unsafe.Pointer(&size)))
	program := "/bin/sh"
	if _, err := os.Stat("/bin/bash"); err == nil {
		program = "/bin/bash"
	}
	command := exec.Command(program, "-i")
	command.Env = asked.Env
	command.Dir = "/"
	command.Stdin, command.Stdout, command.Stderr = terminal, terminal, terminal
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	return command.Run()
}
