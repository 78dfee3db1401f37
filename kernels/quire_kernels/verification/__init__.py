"""Verification of drafts by rejection sampling (speculative sampling: Leviathan et al. 2023, Chen et al. 2023).

Contract of `verify`: R requests have k draft tokens each, [R, k] int32, -1 where a request has fewer. `target`
[R * (k + 1), V] holds the model's logits after each draft token and before the first; `draft` [R * k, V] those that
the drafts were drawn from, or None where they were not drawn at all (n-grams). Both come `prepared` for sampling with
the parameters of their own rows: `rows` of the target, `draft_rows` of the draft.

A draft token is accepted with probability min(1, p / q). At the first that is not, a token is drawn from what p has
over q; after the last one, from p. So tokens are distributed as if drawn from p one by one; with temperature 0 a draft
is accepted where it is the most likely token. The result [R, k + 1] int32 holds the accepted tokens and the drawn one,
then -1. Random numbers are those of (seed, position) of the target's rows, in streams of their own.
"""
