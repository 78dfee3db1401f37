"""How a worker comes by a model's weights."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from quire_kernels.backends import Backend

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.models.fallback import TransformersDecoder
from quire_engine.parallel import ParallelGroup
from quire_engine.spec import DecoderSpec
from quire_engine.weights.random import RandomWeights
from quire_engine.weights.resolve import ModelFiles
from quire_engine.weights.tensors import TensorReader, Weights

log = logging.getLogger(__name__)


def fallback_model(
    config: EngineConfig,
    spec: DecoderSpec,
    group: ParallelGroup,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    files: ModelFiles,
    max_model_len: int,
) -> TransformersDecoder:
    """Raises InvalidParameter for what transformers' code is not served with."""
    if config.quantization is not None:
        raise InvalidParameter(
            f"quantization is {config.quantization}, and transformers' code computes this family: leave it out",
            "quantization",
        )
    if config.deterministic:
        raise InvalidParameter(
            "deterministic is not to be had where transformers' code computes the family: leave it out", "deterministic"
        )
    if group.draws:
        log.warning(
            "%s is no family that Quire's decoder knows: transformers' code computes it, with Quire's attention over "
            "the paged cache; without fused kernels, graphs and quantization it is slower",
            spec.fallback and spec.fallback["architectures"][0],
        )
    folder = None
    if config.load_format != "dummy":
        files.checkpoint()  # says which file is broken, where transformers only says that something is
        folder = str(files.folder)
    return TransformersDecoder(
        spec, group, backend, dtype, device, folder, max_model_len, quantized_cache=config.kv_cache_dtype == "fp8"
    )


@contextmanager
def opened(
    config: EngineConfig, files: ModelFiles, dtype: torch.dtype, device: torch.device, bar: Callable[..., Any] | None
) -> Iterator[Weights]:
    """The weights, with a progress bar while they are read."""
    if config.load_format == "dummy":
        log.warning("--load-format dummy: the weights are random numbers")
        yield RandomWeights(dtype, device)
        return
    weights = TensorReader(files.checkpoint(), dtype, device)
    if bar is None:
        yield weights
        return
    shown = bar(total=len(weights), desc=f"Loading {files.name}")
    weights.progress = lambda: shown.update(1)
    yield weights
    shown.close()
