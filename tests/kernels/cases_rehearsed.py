"""Small cases for the rehearsal of gpu-check, on the CPU."""

from collections.abc import Callable

import torch
from case import Built, Case, normal
from quire_kernels.matmul.reference import matmul as expected_product
from quire_kernels.matmul.triton import matmul
from torch import Tensor

Build = Callable[[torch.device, torch.dtype], Built]


def product(off_by: float = 0.0) -> Build:
    """With a last number that is off."""

    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a, w = (normal(device, rows, 48, dtype=torch.float32) for rows in (5, 33))

        def run() -> Tensor:
            out = matmul(a, w)
            out[-1, -1] += off_by
            return out

        return Built(run=run, expected=lambda: expected_product(a, w), bytes=1.0, operations=1.0, peers={"it": run})

    return build


CASES = [Case(name="a product", build=product()), Case(name="a product, not timed", build=product(), timed=False)]
