"""Layers that remember a request in states of fixed size instead of keys and values: a short causal convolution, and
attention whose memory is one matrix per head (Mamba-2, Dao and Gu 2024; gated DeltaNet, Yang et al. 2024).

T tokens of R requests lie flat as in `paged_attention`. Of S pages of state a request starts from page `reads[r]`
(below 0: from zeros) and leaves its state in page `writes[r]`, which may be the same; no page is written for one
request and read for another. A request without tokens in the batch has its state copied.

`short_convolution(x [T, C], weight [K, C], bias [C] or None, silu, states [S, K - 1, C], batch)` → [T, C]: each
channel of a token is the weighted sum of the last K, its own last, plus the bias, through SiLU where asked for. A state
is a request's last K - 1 inputs.

`recurrence(q [T, G, D], k [T, G, D], v [T, H, P], dt [T, H], beta [T, H] or None, gates, states [S, H, D, P] fp32,
batch)` → [T, H, P]: H / G heads share a query and a key. With s = softplus(dt + dt_bias) within `limits`, a token
first lets the state fade by exp(decay * s). Without `beta` (Mamba-2) it adds k times s v and reads with q; `skip` times
v comes on top. With `beta` (the delta rule) q and k are scaled to length 1, q by D ** -0.5 besides, and what is added
is k times sigmoid(beta) (v - what the faded state gives for k).
"""

from dataclasses import dataclass

from torch import Tensor

NORM_EPS = 1e-6  # beneath the squared length of a query or key


@dataclass(frozen=True, kw_only=True)
class StateBatch:
    """Where the states of a batch's requests are."""

    reads: Tensor  # [R] int32
    writes: Tensor  # [R] int32
    query_starts: Tensor  # [R + 1] int32
    requests: Tensor  # [T] int32, each token's
    longest_query: int  # new tokens of the request that has most


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How fast a layer's heads forget. All fp32 [H]."""

    decay: Tensor  # below 0
    dt_bias: Tensor
    skip: Tensor | None = None
    limits: tuple[float, float] = (0.0, float("inf"))
