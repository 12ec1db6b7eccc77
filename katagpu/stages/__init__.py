"""The stages: each module describes one step of the build and has the function that does it."""
