"""The boot check: what a virtual machine shows about a finished guest, with no GPU at hand."""
