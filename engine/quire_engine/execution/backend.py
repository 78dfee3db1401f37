"""Which kernels a worker calls: decided once, at start."""

import logging
from collections.abc import Callable

import torch
from quire_kernels import flash
from quire_kernels.backends import Backend
from quire_kernels.hardware import hardware
from quire_kernels.native.backend import NativeBackend
from quire_kernels.native.build import NativeBuildError
from quire_kernels.torch_backend import TorchBackend
from torch import Tensor

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter

log = logging.getLogger(__name__)


def choose_backend(config: EngineConfig, device: torch.device, dtype: torch.dtype, quantized: bool) -> Backend:
    """The kernels of `--attention-backend`, once. Says so where it falls back to something slower."""
    wanted = config.attention_backend
    if config.deterministic:
        _check_deterministic(config, device, dtype, quantized)
    native_fits = device.type == "cpu" and dtype == torch.float32 and config.kv_cache_dtype == "auto"
    if wanted == "auto":
        if not _no_flash(config, device, dtype) and (function := flash.load()) is not None:
            return _flash(device, function)
        wanted = "triton" if device.type == "cuda" else "native" if native_fits else "torch"
        if wanted == "native":
            try:
                return NativeBackend(deterministic=config.deterministic)
            except NativeBuildError as error:
                if config.deterministic:
                    raise
                log.warning("the C kernels cannot be built, attention will be slower: %s", error)
                return TorchBackend()
        if wanted == "torch":
            log.warning(
                "%s with a cache in %s runs on torch's own operators on a CPU: slow; the C kernels take float32",
                dtype,
                config.kv_cache_dtype,
            )
    if wanted == "native":
        if not native_fits:
            raise InvalidParameter(
                f"attention_backend native is for float32 on a CPU, not {dtype} with a cache in "
                f"{config.kv_cache_dtype} on {device.type}",
                "attention_backend",
            )
        return NativeBackend(deterministic=config.deterministic)
    if wanted == "triton":
        from quire_kernels.triton_backend import TritonBackend

        return TritonBackend(device, deterministic=config.deterministic)
    if wanted == "flash":
        return _flash(device, _installed(config, device, dtype))
    if device.type == "cuda":
        log.warning("the torch kernels are references: every step waits for the host, and none is captured; slow")
    return TorchBackend()


def _flash(device: torch.device, function: Callable[..., Tensor]) -> Backend:
    from quire_kernels.flash_backend import FlashBackend

    log.info(
        "FlashAttention 3 for prompts of %d tokens and more where attention has no sinks, slopes or spans; else Triton",
        flash.LEAST_TOKENS,
    )
    return FlashBackend(device, function)


def _no_flash(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why FlashAttention 3 would compute nothing, if so."""
    if config.deterministic:
        return "its bits depend on how a prompt is cut up, and deterministic is asked for"
    if dtype.itemsize != 2 or config.kv_cache_dtype != "auto":
        return f"it is used with 16 bits, not with {dtype} and a cache in {config.kv_cache_dtype}"
    if device.type != "cuda" or hardware(device).target not in flash.CHIPS:
        return f"it runs on {', '.join(flash.CHIPS)}, not here"
    return ""


def _installed(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The library's function. Raises InvalidParameter where it cannot be had."""
    why = _no_flash(config, device, dtype)
    if not why and (function := flash.load()) is not None:
        return function
    why = why or f"it is not installed (no module {flash.MODULE})"
    raise InvalidParameter(f"attention_backend is flash, FlashAttention 3: {why}; leave it out", "attention_backend")


def _check_deterministic(config: EngineConfig, device: torch.device, dtype: torch.dtype, quantized: bool) -> None:
    """Raises InvalidParameter where bits would depend on the batch."""
    if device.type == "cpu" and config.attention_backend != "triton":
        plain = dtype == torch.float32 and config.kv_cache_dtype == "auto" and config.attention_backend != "torch"
        if not plain:
            raise InvalidParameter(
                "deterministic on a CPU takes --dtype float32, the cache's own dtype and the native kernels",
                "deterministic",
            )
    elif quantized:
        raise InvalidParameter(
            "deterministic on a GPU takes unquantized weights: the tiles of quantized products depend on the batch",
            "deterministic",
        )
