"""katagpu: from a recipe to the guest kernel and guest image with which Kata runs NVIDIA GPUs."""
