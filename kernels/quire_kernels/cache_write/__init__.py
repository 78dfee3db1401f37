"""Rotary embedding (Su et al. 2021), optional per-head RMSNorm, and the write of keys and values to their pages.

Contract: `qkv` [T, (H + 2K) * D] is changed in place (q and k normalized and rotated); token t's k and v go to slot
`slots[t]` = page * block size + offset, or nowhere where it is negative. `cos_sin` [positions, 2, rotary dim / 2].
"""
