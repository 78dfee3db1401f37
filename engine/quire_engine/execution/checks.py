"""What a device, a model and an engine's options must agree on, known before anything is loaded."""

import os

import torch
from quire_kernels import flash
from quire_kernels.native.backend import MAX_DIM, MAX_TAPS

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.memory.plan import Target
from quire_engine.quantization.config import Quantization
from quire_engine.spec import DecoderSpec, DeltaNetSpec, MambaSpec


def check_served(
    config: EngineConfig, spec: DecoderSpec, target: Target, dtype: torch.dtype, quantization: Quantization
) -> None:
    """Raises InvalidParameter for an option that this model or this device does not have."""
    if spec.latent is not None:
        _check_latent(config)
    if config.kv_cache_dtype != "auto" and not spec.attending:
        raise InvalidParameter(
            f"kv_cache_dtype is {config.kv_cache_dtype}, and this family keeps no keys and values: leave it out",
            "kv_cache_dtype",
        )
    pooling = spec.pooling
    if config.deterministic and pooling is not None and pooling.kind == "mean" and target.kind != "cpu":
        raise InvalidParameter(
            "deterministic is not to be had with a mean of states on a GPU, which adds them up in any order: leave it "
            "out",
            "deterministic",
        )
    if config.deterministic:
        _check_deterministic(config, spec, target, dtype, quantization)
    _check_backend(config, spec, target, dtype)


def no_native(config: EngineConfig, spec: DecoderSpec, target: Target, dtype: torch.dtype) -> str:
    """Why the C kernels cannot compute this, if so."""
    if target.kind != "cpu" or dtype != torch.float32 or config.kv_cache_dtype != "auto":
        return f"they are for float32 on a CPU, not {dtype} with a cache in {config.kv_cache_dtype} on {target.kind}"
    widest = spec.head_dim if spec.attending and spec.latent is None else 0
    taps = 0 if spec.recurrent is None else spec.recurrent.taps
    if isinstance(spec.recurrent, DeltaNetSpec):
        widest = max(widest, spec.recurrent.key_dim, spec.recurrent.value_dim)
    elif isinstance(spec.recurrent, MambaSpec):
        widest = max(widest, spec.recurrent.head_dim, spec.recurrent.state)
    if widest > MAX_DIM:
        return f"they take heads and states of at most {MAX_DIM} dimensions, and this model has {widest}"
    if taps > MAX_TAPS:
        return f"they take convolutions over at most {MAX_TAPS} tokens, and this model has one over {taps}"
    return ""


def no_flash(config: EngineConfig, target: Target, dtype: torch.dtype) -> str:
    """Why FlashAttention 3 would compute nothing, if so."""
    if config.deterministic:
        return "its bits depend on how a prompt is cut up, and deterministic is asked for"
    if dtype.itemsize != 2 or config.kv_cache_dtype != "auto":
        return f"it is used with 16 bits, not with {dtype} and a cache in {config.kv_cache_dtype}"
    if target.chip is None or target.chip.target not in flash.CHIPS:
        return f"it runs on {', '.join(flash.CHIPS)}, not here"
    return ""


def no_flash_error(why: str) -> InvalidParameter:
    """Of `--attention-backend flash`."""
    return InvalidParameter(f"attention_backend is flash, FlashAttention 3: {why}; leave it out", "attention_backend")


def _check_backend(config: EngineConfig, spec: DecoderSpec, target: Target, dtype: torch.dtype) -> None:
    wanted = config.attention_backend
    if wanted == "native" and (why := no_native(config, spec, target, dtype)):
        raise InvalidParameter(f"attention_backend is native, the C kernels: {why}; leave it out", "attention_backend")
    if wanted == "flash" and (why := no_flash(config, target, dtype)):
        raise no_flash_error(why)
    if wanted == "triton" and target.kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidParameter(
            "attention_backend is triton, whose kernels need a GPU; on a CPU leave it out", "attention_backend"
        )


def _check_latent(config: EngineConfig) -> None:
    if config.kv_cache_dtype == "fp8":
        raise InvalidParameter(
            "kv_cache_dtype is fp8; the latents of this family are kept in the model's dtype: leave it out",
            "kv_cache_dtype",
        )
    if config.deterministic:
        raise InvalidParameter(
            "deterministic is not to be had with latent attention, whose kernels depend on the batch: leave it out",
            "deterministic",
        )


def _check_deterministic(
    config: EngineConfig, spec: DecoderSpec, target: Target, dtype: torch.dtype, quantization: Quantization
) -> None:
    """Where bits would depend on the batch."""
    if target.kind == "cpu" and config.attention_backend != "triton":
        why = no_native(config, spec, target, dtype)
        if why or config.attention_backend == "torch":
            raise InvalidParameter(
                "deterministic on a CPU takes --dtype float32, the cache's own dtype and the native kernels"
                + (f": {why}" if why else ""),
                "deterministic",
            )
    elif quantization.name != "none":
        raise InvalidParameter(
            "deterministic on a GPU takes unquantized weights: the tiles of quantized products depend on the batch",
            "deterministic",
        )
