"""A checkpoint is read once, straight into each rank's slices."""

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from families import FAMILIES
from quire_engine.layers.linear import Builder
from quire_engine.memory.dry_run import DryGroup
from quire_engine.models.decoder import Decoder
from quire_engine.models.families import spec_of
from quire_engine.quantization.config import Quantization
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import LazyTensor, SafetensorsCheckpoint, TensorReader
from quire_kernels.torch_backend import TorchBackend


class Counting(SafetensorsCheckpoint):
    """Counts the numbers that are read of each tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}

    def tensor(self, name: str) -> LazyTensor:
        found = super().tensor(name)
        self.sizes[name] = math.prod(found.shape)

        def part(slices: tuple[slice, ...]) -> torch.Tensor:
            taken = found.read(*slices)
            self.read[name] += taken.numel()
            return taken

        return LazyTensor(name, found.shape, part)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_read_once(checkpoint: Callable[[str], Path], family: str, size: int) -> None:
    """By one rank; and by two each its part, but for norms, latents and what else both need whole."""
    folder = checkpoint(family)
    spec = spec_of(ModelFiles(family, folder).config)
    total: Counter[str] = Counter()
    for rank in range(size):
        files = Counting(folder)
        reader = TensorReader(files, torch.float32, torch.device("cpu"))
        Decoder(Builder(reader, DryGroup(rank, size), TorchBackend(), Quantization()), spec, spec.max_position)
        total += files.read
        for name, count in files.read.items():
            assert count <= files.sizes[name], f"rank {rank} reads {name} twice"
    if size == 1:
        assert dict(total) == files.sizes
    else:
        assert sum(total.values()) < 1.4 * sum(files.sizes.values())


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}),
        ("qwen3_moe", {"moe_intermediate_size": 256, "num_experts": 12, "mlp_only_layers": []}),
    ],
)
def test_the_peak_is_within_a_tenth_of_the_weights(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    warm = make_checkpoint(tmp_path / "warm", family)
    folder = make_checkpoint(tmp_path / "model", family, hidden_size=512, num_hidden_layers=16, **sizes)
    weights = (folder / "model.safetensors").stat().st_size
    assert weights > 200e6
    command = [sys.executable, str(Path(__file__).parents[1] / "load_peak.py"), str(warm), str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    most, after = int(output[0]), int(output[1])
    assert most < 1.1 * weights
    assert 0.95 * weights < after
