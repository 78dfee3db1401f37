"""Kernel tests run on Triton's interpreter, mended first, with new memory full of NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What torch.empty gives is NaN (or the largest integer): what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
