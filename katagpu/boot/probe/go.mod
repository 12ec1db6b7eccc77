module katagpu/probe

go 1.22
