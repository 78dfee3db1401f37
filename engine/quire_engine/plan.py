"""What a model needs, from its config alone: weights, pages of cache, and how many requests they hold."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, OutOfMemory
from quire_engine.models.spec import DecoderSpec

GIB = 1 << 30
_CPU_CACHE_BYTES = 560 << 20
_CPU_TOKENS_PER_STEP, _GPU_TOKENS_PER_STEP = 256, 8192


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Per worker, in bytes."""

    weight_bytes: int
    activation_bytes: int
    page_bytes: int
    num_pages: int
    block_size: int
    max_model_len: int

    @property
    def cache_bytes(self) -> int:
        """All pages."""
        return self.num_pages * self.page_bytes

    @property
    def full_length_requests(self) -> float:
        """How many requests of the full length the cache holds."""
        return self.num_pages * self.block_size / self.max_model_len


def resolve_device(config: EngineConfig) -> torch.device:
    """The device of `--device`. Raises InvalidParameter for a GPU that is not there."""
    if config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.device == "cuda":
        raise InvalidParameter(
            "device is 'cuda', but torch finds no GPU here; leave --device out, or give cpu", "device"
        )
    return torch.device("cpu")


def resolve_dtype(config: EngineConfig, checkpoint_dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype` (see its help for auto)."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16


def resolve_max_model_len(config: EngineConfig, spec: DecoderSpec) -> int:
    """The context length. Raises InvalidParameter for more than the model was made for."""
    if config.max_model_len is None:
        return spec.max_position
    if config.max_model_len > spec.max_position:
        raise InvalidParameter(
            f"max_model_len is {config.max_model_len}; the model's context is {spec.max_position}",
            "max_model_len",
        )
    return config.max_model_len


def tokens_per_step(config: EngineConfig, device: torch.device) -> int:
    """The scheduler's budget."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return _CPU_TOKENS_PER_STEP if device.type == "cpu" else _GPU_TOKENS_PER_STEP


def plan_memory(
    config: EngineConfig, spec: DecoderSpec, device: torch.device, dtype: torch.dtype, free_bytes: int
) -> MemoryPlan:
    """Divides `free_bytes` (what the worker may use, before anything is loaded).

    Raises OutOfMemory when the weights do not fit, or not one request of the full length beside them.
    """
    ranks = config.tensor_parallel_size
    max_model_len = resolve_max_model_len(config, spec)
    weights = spec.num_parameters * dtype.itemsize // ranks
    if device.type == "cpu" and spec.tie_embeddings:  # the output head is packed beside the embedding
        weights += spec.vocab_size * spec.hidden_size * dtype.itemsize // ranks
    tokens = tokens_per_step(config, device)
    widest = 2 * spec.intermediate_size // ranks + 4 * spec.hidden_size + (spec.num_heads * spec.head_dim) * 3 // ranks
    activations = tokens * widest * dtype.itemsize + 3 * config.max_num_seqs * spec.vocab_size * 4
    page = 2 * spec.num_layers * spec.num_kv_heads // ranks * config.block_size * spec.head_dim * dtype.itemsize
    one_request = -(-max_model_len // config.block_size)
    left = free_bytes - weights - activations
    if left <= 0:
        raise OutOfMemory(
            f"the weights take {weights / GIB:.2f} GiB and a step's buffers {activations / GIB:.2f} GiB of the "
            f"{free_bytes / GIB:.2f} GiB there are; use more ranks (-tp), a smaller dtype or a smaller model"
        )
    wanted = config.kv_cache_memory_bytes
    if wanted is None:
        wanted = min(max(_CPU_CACHE_BYTES, one_request * page), left) if device.type == "cpu" else left
    num_pages = min(wanted, left) // page
    if num_pages < one_request:
        fits = num_pages * config.block_size
        raise OutOfMemory(
            f"one request of {max_model_len} tokens takes {one_request * page / GIB:.2f} GiB of cache and "
            f"{num_pages * page / GIB:.2f} GiB are to be had; "
            + (f"set --max-model-len {fits} or less, or " if fits else "")
            + "raise --kv-cache-memory-bytes within what the machine has"
        )
    return MemoryPlan(
        weight_bytes=weights,
        activation_bytes=activations,
        page_bytes=page,
        num_pages=num_pages,
        block_size=config.block_size,
        max_model_len=max_model_len,
    )


def usable_bytes(config: EngineConfig, device: torch.device) -> int:
    """What one worker may use of its device now: a GPU's share, or 90 % of a CPU's available memory among the ranks."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, int(total * config.gpu_memory_utilization))
    return int(_available_memory() * 0.9) // config.tensor_parallel_size


def _available_memory() -> int:
    """Bytes that this machine, or the control group this process is in, can still give."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        pages = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        pages = min(pages, int(most) - int(used.read_text()))
    return pages
