"""The CPU's kernels, written in C and built on first use."""
