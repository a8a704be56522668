"""Sources of kernels: in C++ for CPUs (NAME.cpp), in Triton for GPUs (NAME.py)."""
