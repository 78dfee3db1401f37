"""Small cases for the rehearsal of gpu-check: some right, one wrong, one that fails, one that ends its process."""

import os
from collections.abc import Callable

import torch
from case import Built, Case, normal
from quire_kernels.matmul.reference import matmul as expected_product
from quire_kernels.matmul.triton import matmul
from torch import Tensor

Build = Callable[[torch.device, torch.dtype], Built]


def _product(off_by: float = 0.0) -> Build:
    """A kernel whose last number is off."""

    def build(device: torch.device, fp8: torch.dtype) -> Built:
        a, w = (normal(device, rows, 48, dtype=torch.float32) for rows in (5, 33))

        def run() -> Tensor:
            out = matmul(a, w)
            out[-1, -1] += off_by
            return out

        return Built(run=run, expected=lambda: expected_product(a, w), bytes=1.0, operations=1.0, peers={"it": run})

    return build


def _failing(device: torch.device, fp8: torch.dtype) -> Built:
    raise ValueError("there is no such kernel")


def _dying(device: torch.device, fp8: torch.dtype) -> Built:
    os._exit(3)


CASES = [
    Case(name="a right product", build=_product()),
    Case(name="a wrong product", build=_product(1e-3)),
    Case(name="a kernel that fails", build=_failing),
    Case(name="a kernel that ends its process", build=_dying),
    Case(name="the product after it", build=_product(), timed=False),
]
