"""What the boot check is made of: the guest's machine, and the functions plugged into it."""
