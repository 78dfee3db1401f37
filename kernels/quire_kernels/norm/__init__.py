"""RMSNorm (Zhang & Sennrich 2019) with the residual addition before it.

Contract: `residual` [T, N] grows by `delta` [T, N] (where given) in place; the result is its RMSNorm times `weight`
[N].
"""
