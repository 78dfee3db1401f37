"""Multi-head latent attention over a compressed cache (MLA, DeepSeek-V2 2024), with absorbed weights.

The cache [P, B, L + E] holds for each token one latent of L = 512 values and E = 64 rotated ones that all heads share.
`q` [T, H, L + E] comes multiplied by the keys' up-projection, the rotated part behind it; the result [T, H, L] is still
to be multiplied by the values' one. A score is q times the whole entry; the value is its first L. Requests, lengths
and pages are as in `paged_attention`, and so is the log-sum-exp [T, H] where asked for. A batch mixes decode and
prefill.

`latent_cache_write(latent [T, L + E], q_rope [T, H, E], cache, positions, slots, cos_sin, weight, eps)` normalizes the
latents (RMSNorm), rotates the rest of them and `q_rope` in place (neighbours are pairs), and writes the entries; a slot
below 0 is left out.
"""
