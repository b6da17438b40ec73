"""C++ for CPUs: what compiles it, and the networks and training steps that run on it."""
