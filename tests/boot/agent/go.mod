module katagpu/tests/boot/agent

go 1.22

require (
	github.com/containerd/ttrpc v1.2.7
	golang.org/x/sys v0.28.0
	google.golang.org/protobuf v1.36.5
)

require (
	github.com/containerd/log v0.1.0 // indirect
	github.com/golang/protobuf v1.5.3 // indirect
	github.com/sirupsen/logrus v1.9.3 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20230731190214-cbb8c96f2d6d // indirect
	google.golang.org/grpc v1.57.1 // indirect
)
