"""Low-rank adapters in plain torch."""

from torch import Tensor


def add_lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, offset: int = 0) -> None:
    """See the package's contract; adapters [T] in place of an alignment."""
    for adapter in adapters.unique().tolist():
        if adapter >= a.shape[0]:
            continue
        mine = adapters == adapter
        delta = x[mine].float() @ a[adapter].float().T @ b[adapter].float().T
        out[mine, offset : offset + b.shape[1]] = (out[mine, offset : offset + b.shape[1]].float() + delta).to(
            out.dtype
        )
