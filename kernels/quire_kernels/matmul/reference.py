"""Matrix multiplication in plain torch. Batch-invariant only as far as the BLAS beneath is."""

from torch import Tensor


def matmul(a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the package's contract."""
    wide = a.float() @ w.float().T
    return (wide if bias is None else wide + bias.float()).to(a.dtype)
