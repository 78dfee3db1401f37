"""What a model needs, from its config alone: weights, pages of cache, and how many requests they hold.

Weights and activations are those of a dry run (memory/dry_run.py); the rest of the memory becomes pages.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from quire_kernels.hardware import CHIPS, Hardware, hardware

from quire_engine.config import EngineConfig, ImageLimits, SchedulerLimits
from quire_engine.errors import InvalidParameter, OutOfMemory
from quire_engine.layers.caches import page_bytes, state_bytes
from quire_engine.memory.dry_run import DryGroup, allocated
from quire_engine.memory.shapes import captured_shapes
from quire_engine.models.decoder import layers_of
from quire_engine.models.drafts import DraftSource
from quire_engine.models.vision import vision_tower
from quire_engine.parallel import ParallelGroup, group_bytes
from quire_engine.quantization.config import Quantization
from quire_engine.spec import DecoderSpec
from quire_engine.speculation.choice import choose

GIB = 1 << 30
_CPU_CACHE_BYTES = 560 << 20
_STATES_PER_REQUEST = 2  # its own, and one that it left at the end of a block for others to start from
_MOST_FOR_STATES = 0.5  # of the cache
_GPU_RESERVE = 640 << 20  # matrix libraries' workspaces, kernels, what the allocator rounds up
# 33 MB for 500 kernels, 63 for 1,000 (NVIDIA's developer forum, "Increasing memory footprint with large task graphs").
_GRAPH_NODE_BYTES = 64 << 10
_CPU_IMAGE_TOKENS, _GPU_IMAGE_TOKENS = 4096, 16384  # in most families of an image of 3 and 12 million pixels
_CPU_TOKENS_PER_STEP, _GPU_TOKENS_PER_STEP = 256, 8192


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan is for: this machine's device, or a GPU that is not here."""

    kind: str  # cpu or cuda
    name: str
    chip: Hardware | None = None  # of a GPU

    @staticmethod
    def of(device: torch.device) -> "Target":
        """The device itself."""
        if device.type == "cpu":
            return Target("cpu", "cpu")
        return Target("cuda", torch.cuda.get_device_name(device), hardware(device))


# Name → memory in MiB as its driver reports it, and the chip as the kernels know it.
GPUS = {
    "A100-40GB": (40960, "sm_80"),
    "A100-80GB": (81920, "sm_80"),
    "A10": (23028, "sm_86"),
    "RTX4090": (24564, "sm_89"),
    "L4": (23034, "sm_89"),
    "L40S": (46068, "sm_89"),
    "H100": (81559, "sm_90"),
    "H200": (143771, "sm_90"),
    "B200": (183359, "sm_100"),
    "MI250X": (65520, "gfx90a"),
    "MI300X": (196592, "gfx942"),
    "MI355X": (294896, "gfx950"),
}


def gpu_target(name: str) -> tuple[Target, int]:
    """A GPU of `GPUS`, and its bytes. Raises InvalidParameter for another."""
    found = {known.lower(): known for known in GPUS}.get(name.lower())
    if found is None:
        raise InvalidParameter(f"gpu is {name!r}; known are {', '.join(GPUS)}; or give --memory-gib", "gpu")
    mebibytes, chip = GPUS[found]
    return Target("cuda", found, CHIPS[chip]), mebibytes << 20


@dataclass(frozen=True, slots=True)
class ImagesMemory:
    """Of a worker, in bytes: the vision tower, and what encoding the largest image and the embeddings take."""

    weights: int = 0
    step: int = 0
    embeddings: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Per worker, in bytes."""

    weight_bytes: int
    activation_bytes: int
    page_bytes: int
    num_pages: int
    block_size: int
    max_model_len: int
    state_bytes: int = 0  # of one request
    num_states: int = 0
    images: ImagesMemory = ImagesMemory()  # within weights and activations

    @property
    def cache_bytes(self) -> int:
        """All pages, and all states with the one that padding writes."""
        return self.num_pages * self.page_bytes + (self.num_states + 1) * self.state_bytes

    @property
    def full_length_requests(self) -> float:
        """How many requests of the full length the cache holds."""
        return self.num_pages / -(-self.max_model_len // self.block_size)


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


def tokens_per_step(config: EngineConfig, spec: DecoderSpec, cpu: bool) -> int:
    """The scheduler's budget. Raises InvalidParameter where a text must be computed at once and can exceed it."""
    wanted = config.max_num_batched_tokens
    least = spec.served_context(config.max_model_len) if spec.bidirectional else 1
    if spec.images is not None and spec.images.bidirectional:  # beside all that decode
        least = spec.images.at_once + config.max_num_seqs
    if wanted is not None and wanted < least:
        raise InvalidParameter(
            f"max_num_batched_tokens is {wanted}; this model computes a text of up to {least} tokens at once: raise "
            "it, or lower max_model_len",
            "max_num_batched_tokens",
        )
    return max(least, wanted or (_CPU_TOKENS_PER_STEP if cpu else _GPU_TOKENS_PER_STEP))


def image_limits(config: EngineConfig, spec: DecoderSpec, dtype: torch.dtype, cpu: bool) -> ImageLimits | None:
    """How many embeddings of images are held. None: the model takes none. Raises InvalidParameter for too little."""
    if spec.images is None:
        return None
    size = embedding_bytes(spec, dtype)
    room = _CPU_IMAGE_TOKENS if cpu else _GPU_IMAGE_TOKENS
    if config.encoder_cache_memory_bytes is not None:
        room = config.encoder_cache_memory_bytes // size
    if room < spec.images.at_once:
        raise InvalidParameter(
            f"encoder_cache_memory_bytes is {config.encoder_cache_memory_bytes}; an image of this model takes "
            f"{spec.images.at_once * size}",
            "encoder_cache_memory_bytes",
        )
    return ImageLimits(token=spec.images.token, room=room, whole=spec.images.bidirectional)


def images_memory(
    config: EngineConfig, spec: DecoderSpec, group: ParallelGroup, dtype: torch.dtype, cpu: bool
) -> ImagesMemory:
    """Nothing on a rank that has none. Raises InvalidParameter as `image_limits`, ModelError for what is no tower."""
    limits = image_limits(config, spec, dtype, cpu)
    if limits is None or spec.images is None or not needs_images(spec, group):
        return ImagesMemory()
    tower = vision_tower(spec.images.config, None, dtype, torch.device("meta"))
    largest = min(limits.room, spec.served_context(config.max_model_len))
    return ImagesMemory(tower.weight_bytes, tower.activation_bytes(largest), limits.room * embedding_bytes(spec, dtype))


def needs_images(spec: DecoderSpec, group: ParallelGroup) -> bool:
    """Whether a rank's layers read embeddings of images: the first stage's, and those that deepstack reaches."""
    if spec.images is None:
        return False
    return group.first or layers_of(spec, group).start < spec.images.deepstack


def embedding_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Of a token of an image."""
    return spec.hidden_size * (1 + (spec.images.deepstack if spec.images is not None else 0)) * dtype.itemsize


def _kernels_per_layer(spec: DecoderSpec) -> int:
    """At most, as benchmarks/engine/kernels.md counts them."""
    return 20 if spec.experts is not None or spec.recurrent_layers or spec.latent is not None else 14


def dry_limits(config: EngineConfig, spec: DecoderSpec, cpu: bool) -> SchedulerLimits:
    """How large steps become, before it is known how many pages there are."""
    return SchedulerLimits(
        vocab_size=spec.vocab_size,
        num_pages=0,
        block_size=config.block_size,
        max_model_len=spec.served_context(config.max_model_len),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=tokens_per_step(config, spec, cpu),
        max_num_queued_reqs=0,
        num_states=1 if spec.recurrent_layers else 0,
        speculation=choose(config, spec),
    )


def captures_steps(config: EngineConfig, spec: DecoderSpec, cpu: bool) -> bool:
    """Whether steps are recorded as graphs: not where the host has its hands in a step."""
    whole = config.pipeline_parallel_size == 1 and config.attention_backend != "torch"
    return whole and not cpu and not config.enforce_eager and spec.fallback is None and spec.pooling is None


def plan_memory(
    config: EngineConfig,
    spec: DecoderSpec,
    quantization: Quantization,
    target: Target,
    dtype: torch.dtype,
    free_bytes: int,
    *,
    stage: int = 0,
    draft: DraftSource | None = None,
) -> MemoryPlan:
    """Divides `free_bytes` (what the worker may use, before anything is loaded) for a rank of `stage`. `draft`: what
    guesses beside the model.

    Raises OutOfMemory when the weights do not fit, or not one request of the full length beside them.
    """
    cpu = target.kind == "cpu"
    limits = dry_limits(config, spec, cpu)
    max_model_len = limits.max_model_len
    group = DryGroup(
        size=config.tensor_parallel_size,
        stage=stage,
        stages=config.pipeline_parallel_size,
        experts_apart=config.enable_expert_parallel,
        dtype=dtype,
    )
    _check_sizes(limits, spec, dtype, free_bytes)
    captured = captured_shapes(limits) if captures_steps(config, spec, cpu) else []
    try:
        found = allocated(
            spec,
            quantization,
            group,
            limits,
            chip=target.chip,
            dtype=dtype,
            captured=captured,
            quantized_cache=config.kv_cache_dtype == "fp8",
            draft=draft,
        )
    except MemoryError as error:
        raise OutOfMemory(
            "a step's tables take more memory than this machine has: lower --max-num-seqs or --max-num-batched-tokens"
        ) from error
    weights = found.weights
    activations = found.tables + found.step + found.graphs
    reserved = 0
    if not cpu:
        kernels = len(captured) * (spec.num_layers + 1) * _kernels_per_layer(spec)
        reserved = _GPU_RESERVE + kernels * _GRAPH_NODE_BYTES
        reserved += group_bytes(config.tensor_parallel_size, config.pipeline_parallel_size)
    cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype
    layers = layers_of(spec, group)
    page = page_bytes(spec, group, layers, config.block_size, cache_dtype)
    if draft is not None and group.last:
        page += page_bytes(draft.spec, group, draft.layers, config.block_size, cache_dtype)
    state = state_bytes(spec, group, layers, dtype)
    one_request = -(-max_model_len // config.block_size)
    images = images_memory(config, spec, group, dtype, cpu)
    weights += images.weights
    activations += images.step + images.embeddings
    left = free_bytes - weights - activations - reserved
    if left <= 0:
        options = ["--max-num-batched-tokens", "--max-num-seqs"]
        if images.embeddings:
            options.append("--encoder-cache-memory-bytes")
        smaller = f"lower {' or '.join(options)}, " if weights < free_bytes else ""
        raise OutOfMemory(
            f"the weights take {weights / GIB:.2f} GiB and a step's buffers {(activations + reserved) / GIB:.2f} GiB "
            f"of the {free_bytes / GIB:.2f} GiB there are; {smaller}use more ranks (-tp), --quantization fp8 or a "
            "smaller model"
        )
    wanted = config.kv_cache_memory_bytes
    states_wanted = _STATES_PER_REQUEST * config.max_num_seqs * state
    if wanted is None:
        for_states = min(_CPU_CACHE_BYTES, states_wanted)
        wanted = min(max(_CPU_CACHE_BYTES, one_request * page) + for_states, left) if cpu else left
    for_cache = min(wanted, left)
    num_states = _num_states(config, state, for_cache, one_request * page) if spec.recurrent_layers else 0
    for_pages = for_cache - (num_states + 1) * state
    num_pages = for_pages // page if page else config.max_num_seqs * one_request
    if num_pages < one_request:
        fits = num_pages * config.block_size
        raise OutOfMemory(
            f"one request of {max_model_len} tokens takes {one_request * page / GIB:.2f} GiB of cache and "
            f"{num_pages * page / GIB:.2f} GiB are to be had; "
            + (f"set --max-model-len {fits} or less, or " if fits else "")
            + ("raise --kv-cache-memory-bytes" if wanted < left else "use more ranks (-tp), or --kv-cache-dtype fp8")
        )
    return MemoryPlan(
        weight_bytes=weights,
        activation_bytes=activations + reserved,
        page_bytes=page,
        num_pages=num_pages,
        block_size=config.block_size,
        max_model_len=max_model_len,
        state_bytes=state,
        num_states=num_states,
        images=images,
    )


def _check_sizes(limits: SchedulerLimits, spec: DecoderSpec, dtype: torch.dtype, free_bytes: int) -> None:
    """Raises OutOfMemory where one of a step's largest buffers alone does not fit.

    A dry run would show it as well, but its tables and rows are real ones. Small ones are left to it: it says more.
    """
    for size, mend in (
        (limits.most_tokens * spec.hidden_size * dtype.itemsize, "--max-num-batched-tokens"),
        (limits.most_draws * spec.vocab_size * 4, "--max-num-seqs"),
        (limits.max_num_seqs * -(-limits.max_model_len // limits.block_size) * 4, "--max-num-seqs or --max-model-len"),
    ):
        if size > max(free_bytes, GIB):
            raise OutOfMemory(
                f"a step's buffers take {size / GIB:.2f} GiB and more of the {free_bytes / GIB:.2f} GiB there are; "
                f"lower {mend}"
            )


def _num_states(config: EngineConfig, state: int, for_cache: int, longest: int) -> int:
    """How many requests' recurrent states are kept. Raises OutOfMemory where there is no room for one."""
    if not state:  # of this stage's layers
        return _STATES_PER_REQUEST * config.max_num_seqs
    share = min(int(for_cache * _MOST_FOR_STATES), for_cache - longest) if longest else for_cache
    most = max(share, min(for_cache, 2 * state)) // state - 1
    if most < 1:
        raise OutOfMemory(
            f"the recurrent states of a request take {state / GIB:.3f} GiB and {for_cache / GIB:.3f} GiB are to be had "
            "for states and cache; raise --kv-cache-memory-bytes, or use more ranks (-tp)"
        )
    return min(most, _STATES_PER_REQUEST * config.max_num_seqs)


def usable_bytes(config: EngineConfig, device: torch.device) -> int:
    """What one worker may use of its device now: a GPU's share, or 90 % of a CPU's available memory among the ranks."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, int(total * config.gpu_memory_utilization))
    return int(_available_memory() * 0.9) // (config.tensor_parallel_size * config.pipeline_parallel_size)


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
