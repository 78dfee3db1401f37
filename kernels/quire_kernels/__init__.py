"""Quire's kernels: one folder per operation with its plain reference beside each fast version."""
