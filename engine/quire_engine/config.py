"""The engine's configuration. Each default stands here once; command-line options are generated from these fields."""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from quire_engine.errors import InvalidParameter


def option(default: Any, help: str, *, flags: tuple[str, ...] = (), choices: tuple[str, ...] | None = None) -> Any:
    """A field with the text of its command-line option, its short flags and its allowed values."""
    return field(default=default, metadata={"help": help, "flags": flags, "choices": choices})


def check_choices(config: Any) -> None:
    """Raises InvalidParameter where a field that names its choices holds something else."""
    described: tuple[Field[Any], ...] = fields(config)
    for f in described:
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices and value not in choices and not (value is None and f.default is None):
            raise InvalidParameter(f"{f.name} is {value!r}; it must be one of {', '.join(choices)}", f.name)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: the model, the device it runs on, its cache and its scheduler."""

    model: str
    tokenizer: str | None = option(None, "a tokenizer other than the model's: a folder or a hub id")
    task: str = option(
        "auto",
        "what the model is for; auto: embed or score where its checkpoint says so, else generate",
        choices=("auto", "generate", "embed", "score"),
    )
    revision: str | None = option(None, "branch, tag or commit of a model from the hub")
    download_dir: str | None = option(None, "where models from the hub are kept (default: the hub's own cache)")
    load_format: str = option(
        "auto",
        "format of the weights; dummy: random ones, from the config alone",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    quantization: str | None = option(
        None,
        "quantize an unquantized checkpoint as it is read (a quantized one says itself what it is)",
        flags=("-q",),
        choices=("fp8", "int8"),
    )
    kv_cache_dtype: str = option("auto", "of the key-value cache; auto: as the activations", choices=("auto", "fp8"))
    dtype: str = option(
        "auto",
        "of weights and activations; auto: float32 on a CPU, the checkpoint's (bfloat16 for float32) on a GPU",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = option("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    attention_backend: str = option(
        "auto",
        "auto: native (C) on a CPU in float32; triton on a GPU, or flash (the same with FlashAttention 3 for long "
        "prompts) on Hopper where it is installed; else torch",
        choices=("auto", "native", "torch", "triton", "flash"),
    )
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens (default: the model's)")
    tensor_parallel_size: int = option(1, "workers that share every layer", flags=("-tp",))
    pipeline_parallel_size: int = option(1, "stages that the layers are divided among", flags=("-pp",))
    enable_expert_parallel: bool = option(False, "each tensor-parallel rank holds whole experts, not slices of all")
    block_size: int = option(16, "tokens per page of the key-value cache")
    gpu_memory_utilization: float = option(0.92, "share of a GPU's memory for weights, activations and cache")
    kv_cache_memory_bytes: int | None = option(
        None,
        "bytes of key-value cache per worker (default: a GPU's share; on a CPU 560 MiB, or one longest request)",
    )
    enable_prefix_caching: bool = option(True, "share pages between requests that begin alike")
    max_num_seqs: int = option(256, "requests that run at once")
    max_num_batched_tokens: int | None = option(None, "tokens per step (default: 256 on a CPU, 8192 on a GPU)")
    max_num_queued_reqs: int = option(4096, "requests that wait; one more is refused")
    scheduling_policy: str = option(
        "fcfs", "fcfs: by arrival; priority: by priority, then arrival", choices=("fcfs", "priority")
    )
    deterministic: bool = option(
        False, "the same bits for a request whatever runs beside it, however it is cut up, found cached or resumed"
    )
    enforce_eager: bool = option(False, "launch a GPU's kernels one by one instead of capturing steps as graphs")
    async_scheduling: bool = option(True, "plan a step while the one before it runs; tokens stay on the device between")
    cpu_threads: int | None = option(None, "threads per CPU worker (default: cores / workers on this machine)")

    @property
    def num_workers(self) -> int:
        """Ranks of the engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (
            ("tensor_parallel_size", 1),
            ("pipeline_parallel_size", 1),
            ("block_size", 1),
            ("max_num_seqs", 1),
            ("max_num_queued_reqs", 0),
        ):
            if getattr(self, name) < least:
                raise InvalidParameter(f"{name} is {getattr(self, name)}; it must be at least {least}", name)
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(f"{name} is {value}; it must be at least 1", name)
        if self.block_size > 64:
            raise InvalidParameter(f"block_size is {self.block_size}; it must be at most 64", "block_size")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InvalidParameter(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1",
                "gpu_memory_utilization",
            )


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What the scheduler works within, once the model and the device are known."""

    num_pages: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_reqs: int
    enable_prefix_caching: bool = True
    by_priority: bool = False
    whole_prompts: bool = False  # a prompt is computed in one step
    num_states: int = 0  # pages of recurrent states, one for a request that runs; 0: the model has none
    steps_in_flight: int = 1  # 2: a step is planned while the one before it runs

    @property
    def most_draws(self) -> int:
        """How many requests of a step draw a token, at most."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def most_tokens(self) -> int:
        """How many tokens a step has, at most."""
        return min(self.max_num_batched_tokens, self.max_num_seqs * self.max_model_len)
