"""Which kernels a worker calls: decided once, at start."""

import logging
from collections.abc import Callable

import torch
from quire_kernels import flash
from quire_kernels.backends import Backend
from quire_kernels.native.backend import NativeBackend
from quire_kernels.native.build import NativeBuildError
from quire_kernels.torch_backend import TorchBackend
from torch import Tensor

from quire_engine.config import EngineConfig
from quire_engine.execution.checks import no_flash, no_flash_error, no_native
from quire_engine.memory.plan import Target
from quire_engine.spec import DecoderSpec

log = logging.getLogger(__name__)


def choose_backend(
    config: EngineConfig, spec: DecoderSpec, target: Target, device: torch.device, dtype: torch.dtype
) -> Backend:
    """The kernels of `--attention-backend`, once, for what `check_served` let through. Says so where it falls back to
    something slower; raises InvalidParameter where FlashAttention 3 is asked for and not installed."""
    wanted = config.attention_backend
    if wanted == "auto":
        if not no_flash(config, target, dtype) and (function := flash.load()) is not None:
            return _flash(device, function)
        unfit = no_native(config, spec, target, dtype)
        wanted = "triton" if target.kind == "cuda" else "torch" if unfit else "native"
        if wanted == "native":
            try:
                return NativeBackend(deterministic=config.deterministic)
            except NativeBuildError as error:
                if config.deterministic:
                    raise
                log.warning("the C kernels cannot be built, attention will be slower: %s", error)
                return TorchBackend()
        if wanted == "torch":
            log.warning("this runs on torch's own operators: slow. Of the C kernels: %s", unfit)
    if wanted == "native":
        return NativeBackend(deterministic=config.deterministic)
    if wanted == "triton":
        from quire_kernels.triton_backend import TritonBackend

        return TritonBackend(device, deterministic=config.deterministic)
    if wanted == "flash":
        if (function := flash.load()) is None:
            raise no_flash_error(f"it is not installed (no module {flash.MODULE})")
        return _flash(device, function)
    if target.kind == "cuda":
        log.warning("the torch kernels are references: every step waits for the host, and none is captured; slow")
    return TorchBackend()


def _flash(device: torch.device, function: Callable[..., Tensor]) -> Backend:
    from quire_kernels.flash_backend import FlashBackend

    log.info(
        "FlashAttention 3 for prompts of %d tokens and more where attention has no sinks, slopes or spans; else Triton",
        flash.LEAST_TOKENS,
    )
    return FlashBackend(device, function)
