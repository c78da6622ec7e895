"""Where the public module has its just-in-time compiler: empty, kernels here are compiled ahead of time."""
