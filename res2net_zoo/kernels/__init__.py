"""Native kernels for inference and training: C++ for CPUs, Triton for GPUs."""
