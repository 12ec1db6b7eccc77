"""The boot check: a finished guest in a virtual machine, with an emulated GPU."""
