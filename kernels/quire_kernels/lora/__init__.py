"""Low-rank adapters (LoRA, Hu et al. 2021), many in one batch (Punica, Chen et al. 2023).

`add_lora(out, x, a, b, alignment, offset)`: out [T, N'], columns offset .. offset + N, grows in place by
x [T, K] times a[i] [r, K] transposed, times b[i] [N, r] transposed, where i is the token's adapter. Adapters stand in
a [L, r, K] and b [L, N, r] with their scale (alpha / r) multiplied into b, and zeros up to the common rank r. The
tokens come sorted by adapter: `moe.align` of adapters [T, 1]; a token without an adapter has one that holds zeros, or
L, which no tile gets.
"""
