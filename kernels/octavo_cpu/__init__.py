"""Kernels for CPUs: C with vector extensions, compiled when Octavo is installed and called through ctypes."""
