// A guest's /init that answers as Kata's agent does: Check and GetGuestDetails over ttRPC on vsock
// port 1024. Port 1025 sends back what it gets, port 1026 closes at once.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

type address struct{}

func (address) Network() string { return "vsock" }
func (address) String() string  { return "guest" }

// stream is a connected vsock socket: os.File polls it, net has no such family.
type stream struct{ *os.File }

func (stream) LocalAddr() net.Addr  { return address{} }
func (stream) RemoteAddr() net.Addr { return address{} }

type listener struct{ descriptor int }

func listen(port uint32) listener {
	descriptor, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(err)
	check(unix.Bind(descriptor, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port}))
	check(unix.Listen(descriptor, 16))
	return listener{descriptor}
}

func (l listener) Accept() (net.Conn, error) {
	descriptor, _, err := unix.Accept4(l.descriptor, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return stream{os.NewFile(uintptr(descriptor), "vsock")}, nil
}

func (l listener) Close() error { return unix.Close(l.descriptor) }
func (listener) Addr() net.Addr { return address{} }

func check(err error) {
	if err != nil {
		fmt.Println("toy agent:", err)
		time.Sleep(time.Hour) // an init that ends is a panic, which hides the line
	}
}

// each serves every connection of a port by itself.
func each(port uint32, serve func(net.Conn)) {
	l := listen(port)
	for {
		connection, err := l.Accept()
		check(err)
		go serve(connection)
	}
}

// askHost is what a connection from the guest to the host's port 9 ends with.
func askHost() string {
	descriptor, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	check(err)
	defer unix.Close(descriptor)
	return fmt.Sprint(unix.Connect(descriptor, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 9}))
}

type kind = descriptorpb.FieldDescriptorProto_Type

const (
	text    = descriptorpb.FieldDescriptorProto_TYPE_STRING
	boolean = descriptorpb.FieldDescriptorProto_TYPE_BOOL
	number  = descriptorpb.FieldDescriptorProto_TYPE_UINT64
)

// message describes a protobuf type: names, numbers and types of its fields.
func message(name string, fields ...*descriptorpb.FieldDescriptorProto) *descriptorpb.DescriptorProto {
	return &descriptorpb.DescriptorProto{Name: &name, Field: fields}
}

func field(name string, at int32, of kind, repeated bool) *descriptorpb.FieldDescriptorProto {
	label := descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL
	if repeated {
		label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED
	}
	return &descriptorpb.FieldDescriptorProto{Name: &name, Number: &at, Type: &of, Label: &label}
}

// messages are the types of Kata's health.proto and agent.proto that are used here; an enumeration
// has an integer's encoding.
func messages() protoreflect.MessageDescriptors {
	name, syntax, package_ := "toy.proto", "proto3", "grpc"
	details := field("agent_details", 2, descriptorpb.FieldDescriptorProto_TYPE_MESSAGE, false)
	inner := ".grpc.AgentDetails"
	details.TypeName = &inner
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: &name, Syntax: &syntax, Package: &package_,
		MessageType: []*descriptorpb.DescriptorProto{
			message("CheckRequest", field("service", 1, text, false)),
			message("HealthCheckResponse", field("status", 1, number, false)),
			message("AgentDetails", field("version", 1, text, false),
				field("init_daemon", 2, boolean, false), field("device_handlers", 3, text, true),
				field("storage_handlers", 4, text, true),
				field("supports_seccomp", 5, boolean, false),
				field("extra_features", 6, text, true)),
			message("GuestDetailsRequest", field("mem_block_size", 1, boolean, false),
				field("mem_hotplug_probe", 2, boolean, false)),
			message("GuestDetailsResponse", field("mem_block_size_bytes", 1, number, false),
				details, field("support_mem_hotplug_probe", 3, boolean, false)),
		}}, nil)
	check(err)
	return file.Messages()
}

var types protoreflect.MessageDescriptors

func create(name string) *dynamicpb.Message {
	return dynamicpb.NewMessage(types.ByName(protoreflect.Name(name)))
}

func set(m *dynamicpb.Message, name string, value any) {
	about := m.Descriptor().Fields().ByName(protoreflect.Name(name))
	if values, ok := value.([]string); ok {
		list := m.Mutable(about).List()
		for _, one := range values {
			list.Append(protoreflect.ValueOf(one))
		}
		return
	}
	m.Set(about, protoreflect.ValueOf(value))
}

func isSet(m *dynamicpb.Message, name string) bool {
	return m.Get(m.Descriptor().Fields().ByName(protoreflect.Name(name))).Bool()
}

func health(_ context.Context, unmarshal func(any) error) (any, error) {
	if err := unmarshal(create("CheckRequest")); err != nil {
		return nil, err
	}
	answer := create("HealthCheckResponse")
	set(answer, "status", uint64(1))
	return answer, nil
}

func details(_ context.Context, unmarshal func(any) error) (any, error) {
	request := create("GuestDetailsRequest")
	if err := unmarshal(request); err != nil {
		return nil, err
	}
	agent := create("AgentDetails")
	set(agent, "version", "3.99.0-toy")
	set(agent, "init_daemon", os.Getpid() == 1)
	set(agent, "device_handlers", []string{"blk", "vfio-pci-gk"})
	set(agent, "storage_handlers", []string{"blk"})
	set(agent, "supports_seccomp", true)
	set(agent, "extra_features", []string{"host: " + askHost()})
	answer := create("GuestDetailsResponse")
	if isSet(request, "mem_block_size") {
		set(answer, "mem_block_size_bytes", uint64(128<<20))
	}
	set(answer, "agent_details", agent)
	set(answer, "support_mem_hotplug_probe", isSet(request, "mem_hotplug_probe"))
	return answer, nil
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("toy agent version 3.99.0-toy")
		return
	}
	types = messages()
	server, err := ttrpc.NewServer()
	check(err)
	server.Register("grpc.Health", map[string]ttrpc.Method{"Check": health})
	server.Register("grpc.AgentService", map[string]ttrpc.Method{"GetGuestDetails": details})
	go each(1025, func(connection net.Conn) {
		_, _ = io.Copy(connection, struct{ io.Reader }{connection})
		_ = connection.Close()
	})
	go each(1026, func(connection net.Conn) { _ = connection.Close() })
	fmt.Println("toy agent: listening")
	check(server.Serve(context.Background(), listen(1024)))
}
