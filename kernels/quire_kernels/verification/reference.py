"""Verification of drafts in plain torch, one request at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.sampling import ACCEPT, RESIDUAL, Rows
from quire_kernels.sampling.reference import invert, uniform


def verify(target: Tensor, draft: Tensor | None, draft_tokens: Tensor, rows: Rows) -> Tensor:
    """One request: probabilities target [k + 1, V] and draft [k, V] (None: all on its token), draft_tokens [k], its one
    row of parameters → tokens [k + 1], -1 after the one that was drawn."""
    tokens = torch.full((len(draft_tokens) + 1,), -1, dtype=torch.int32)
    for i, token in enumerate(draft_tokens.tolist()):
        p = target[i]
        q = F.one_hot(torch.tensor(token), len(p)).double() if draft is None else draft[i]
        if float(uniform(rows, ACCEPT, i)[0]) * q[token] < p[token]:
            tokens[i] = token
            continue
        tokens[i] = invert((p - q).clamp(min=0)[None], uniform(rows, RESIDUAL, i))[0]
        return tokens
    tokens[-1] = invert(target[-1:], uniform(rows, RESIDUAL, len(draft_tokens)))[0]
    return tokens
