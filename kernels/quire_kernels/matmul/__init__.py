"""Batch-invariant matrix multiplication.

Contract of `matmul`: a [M, K] times w [N, K] transposed, plus bias [N] where given → [M, N], summed in fp32. A row of
the result has the same bits whatever other rows stand beside it and however many: the tiles, and into how many parts K
is split, depend on N, K and the chip, never on M (as He et al., "Defeating Nondeterminism in LLM Inference", 2025).
"""
