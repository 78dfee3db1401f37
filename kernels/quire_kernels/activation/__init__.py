"""Gated activations of feed-forward layers. Contract: x [T, 2N] holds gate and up; the result is [T, N]."""
