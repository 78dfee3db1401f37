"""Cases that gpu-check must not call right, and one after them that it must."""

import os

import torch
from case import Built, Case
from cases_rehearsed import product


def _failing(device: torch.device, fp8: torch.dtype) -> Built:
    raise ValueError("there is no such kernel")


def _dying(device: torch.device, fp8: torch.dtype) -> Built:
    os._exit(3)


CASES = [
    Case(name="a right product", build=product()),
    Case(name="a wrong product", build=product(1e-3)),
    Case(name="a kernel that fails", build=_failing),
    Case(name="a kernel that ends its process", build=_dying),
    Case(name="the product after it", build=product(), timed=False),
]
