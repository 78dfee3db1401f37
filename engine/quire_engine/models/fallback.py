"""Families that the decoder does not know: transformers' own code, its attention over the paged cache.

transformers hands queries, keys and values (rotated, normed) to an attention function by name. Ours writes them to the
cache and attends over the pages, so that scheduler, prefix cache and preemption are those of every other family. What a
layer's mask is, is found out once from the shapes alone, on the meta device; only causal masks are served, with or
without a window.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from quire_kernels.backends import AttentionBatch, Backend
from quire_kernels.cache_write import CacheScales
from quire_kernels.paged_attention import AttentionOptions
from torch import Tensor, nn

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.layers.caches import LayerCache
from quire_engine.parallel import ParallelGroup
from quire_engine.spec import Config, DecoderSpec

log = logging.getLogger(__name__)
_ATTENTION, _PROBE = "quire_paged", "quire_probe"
_HARMLESS = {"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position", "layer_idx"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a layer's attention was called with."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for a mask in the probe."""

    window: int


@dataclass(slots=True)
class _Step:
    """What the attention function needs besides its arguments."""

    ops: Backend
    batch: AttentionBatch
    caches: list[LayerCache]
    windows: list[int]
    places: dict[int, int]  # layer_idx → number among the layers that attend
    scales: CacheScales | None
    progress: Callable[[], None]


_step: ContextVar[_Step] = ContextVar("step")
_probed: ContextVar[dict[int, Seen]] = ContextVar("probed")


def fallback_spec(config: Config) -> DecoderSpec | None:
    """The spec of a model that transformers' own code computes; None where it has no such class.

    Raises ModelError, naming the field, for what does not fit the paged cache.
    """
    return _spec_of(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _spec_of(text: str) -> DecoderSpec | None:
    config = json.loads(text)
    kind = _class_of(config)
    if kind is None:
        return None
    _check(config, kind)
    layers = _layers_of(text)
    shapes = {(seen.heads, seen.kv_heads, seen.head_dim) for seen in layers.values()}
    if len(shapes) != 1 or any(seen.value_dim != seen.head_dim for seen in layers.values()):
        raise ModelError(
            f"architectures is {config['architectures']}: its layers' heads differ ({sorted(shapes)}), or values are "
            "not as wide as keys; transformers' code is served on the paged cache where all are alike"
        )
    [(heads, kv_heads, head_dim)] = shapes
    text_config = _hf_config(config, _PROBE).get_text_config()
    return DecoderSpec(
        vocab_size=text_config.vocab_size,
        hidden_size=text_config.hidden_size,
        intermediate_size=0,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=getattr(text_config, "max_position_embeddings", None) or 2048,
        tie_embeddings=bool(text_config.tie_word_embeddings),
        windows=tuple(seen.window for seen in layers.values()),
        fallback=config,
    )


@lru_cache(maxsize=4)
def _layers_of(text: str) -> dict[int, Seen]:
    """layer_idx → what its attention is called with, in the order of the caches."""
    config = json.loads(text)
    try:
        with torch.device("meta"):
            model = _class_of(config)._from_config(_hf_config(config, _PROBE), dtype=torch.float32)
    except KeyError as error:  # an activation's name, say
        raise ModelError(f"config.json asks for {error}, which transformers' code of its family lacks") from error
    _shape_experts(model)
    return dict(sorted(_probe(model).items()))


def _class_of(config: Config) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in config.get("architectures") or []:
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            import transformers

            return getattr(transformers, name)
    return None


def _check(config: Config, kind: Any) -> None:
    name = config["architectures"]
    if kind._is_stateful:
        raise ModelError(
            f"architectures is {name}, whose layers keep a state beside keys and values; states are not served: "
            "take a model with attention alone"
        )
    if not kind._supports_attention_backend:
        raise ModelError(
            f"architectures is {name}, whose code in transformers does not go through its attention interface"
        )
    if config.get("quantization_config"):
        raise ModelError(f"architectures is {name}, which transformers' code computes: unquantized checkpoints alone")
    known = {"full_attention", "sliding_attention"}
    layer_types = getattr(_hf_config(config, _PROBE).get_text_config(), "layer_types", None)
    if strange := set(layer_types or ()) - known:
        raise ModelError(f"layer_types has {', '.join(sorted(strange))}; served are {', '.join(sorted(known))}")


def _ropes(config: Config) -> list[dict[str, Any]]:
    rope = config.get("rope_parameters") or {}
    return [rope, *(part for part in rope.values() if isinstance(part, dict))]


def _hf_config(config: Config, attention: str, *, shapes_alone: bool = True) -> Any:
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig

    AttentionInterface.register(_ATTENTION, _attend)
    AttentionInterface.register(_PROBE, _note)
    AttentionMaskInterface.register(_PROBE, _mask)
    config = copy.deepcopy(dict(config))
    for part in _ropes(config):
        # dynamic is the default within the model's context, longrope of its shapes; both look at the batch's length
        within = part.get("rope_type") == "dynamic" and not part.get("alpha")
        if within or (part.get("rope_type") == "longrope" and shapes_alone):
            for key in part.keys() - {"rope_theta", "partial_rotary_factor"}:
                del part[key]
            part["rope_type"] = "default"
    made = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "transformers_version"})
    made._attn_implementation = attention
    return made


def _probe(model: Any) -> dict[int, Seen]:
    """Runs four tokens on the meta device. → layer_idx → what its attention was called with."""
    token = _probed.set({})
    try:
        with torch.no_grad(), torch.device("meta"):
            ids = torch.zeros((1, 4), dtype=torch.int64)
            # With a mask given, nobody looks at positions for several sequences in one row.
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        found = _probed.get()
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        # What others' code raises where it wants a number of a tensor that has a shape alone, or a mask to be a tensor.
        raise ModelError(
            f"{type(model).__name__} in transformers looks at values where shapes must do ({error}); it is not served"
        ) from error
    finally:
        _probed.reset(token)
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) < layers:
        raise ModelError(
            f"{type(model).__name__} attends in {len(found)} of its {layers} layers; what the others keep of the past "
            "is not served: take a model with attention in every layer"
        )
    return found


def _shape_experts(model: nn.Module) -> None:
    """On the meta device nobody knows which token goes to which expert: their modules give shapes alone."""
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = _expert_shapes


def _expert_shapes(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden)


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **rest: Any) -> _Mask:
    """In place of a mask: what it is. Raises ModelError where it is neither causal nor that with a window."""
    window = local_size or 0
    for query in {0, 1, 5, 63, *((window - 1, window, window + 3) if window else ())}:
        for key in {0, 1, query - window, query - window + 1, query - 1, query, query + 1}:
            if key < 0:
                continue
            seen = bool(mask_function(0, 0, torch.tensor(query, device="cpu"), torch.tensor(key, device="cpu")))
            if seen != (key <= query and (not window or key > query - window)):
                raise ModelError(
                    "a layer's mask is neither causal nor a sliding window (chunked or bidirectional attention); "
                    "transformers' code is served with those alone"
                )
    return _Mask(window)


def _note(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    _refuse_unknown(module, kwargs)
    window = attention_mask.window if isinstance(attention_mask, _Mask) else 0
    told = kwargs.get("sliding_window") or 0
    if told and window and told != window:
        raise ModelError(f"{type(module).__name__} has a window of {told} and a mask with one of {window}")
    layer = int(module.layer_idx)
    if layer in _probed.get():
        raise ModelError(
            f"{type(module).__name__} attends more than once per layer; the paged cache has one place for it"
        )
    _probed.get()[layer] = Seen(query.shape[1], key.shape[1], query.shape[3], value.shape[3], window or told)
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3])), None


def _refuse_unknown(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    known = _HARMLESS | {"scaling", "sliding_window", "softcap", "s_aux"}
    if strange := {name for name, value in kwargs.items() if value is not None} - known:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(sorted(strange))}, which the paged kernels lack"
        )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D]."""
    step = _step.get()
    heads, head_dim = query.shape[1], query.shape[3]
    place = step.places[int(module.layer_idx)]
    keys, values = step.caches[place]
    qkv = torch.cat((query, key, value), 1)[0].transpose(0, 1).reshape(query.shape[2], -1)
    step.ops.rope_cache_write(qkv, keys, values, step.batch, heads, None, None, step.scales)
    options = AttentionOptions(
        window=step.windows[place],
        soft_cap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
        key_scale=None if step.scales is None else step.scales.key,
        value_scale=None if step.scales is None else step.scales.value,
    )
    q = qkv.view(query.shape[2], -1, head_dim)[:, :heads]
    scale = scaling if scaling is not None else head_dim**-0.5
    attended = step.ops.paged_attention(q, keys, values, step.batch, scale, options)
    step.progress()
    return attended.reshape(1, query.shape[2], heads, head_dim), None


class TransformersDecoder:
    """Token ids to logits, as `Decoder`, by transformers' code."""

    def __init__(
        self,
        spec: DecoderSpec,
        group: ParallelGroup,
        ops: Backend,
        dtype: torch.dtype,
        device: torch.device,
        folder: str | None,
        max_model_len: int,
        *,
        quantized_cache: bool = False,
    ) -> None:
        """Weights are read from `folder`; without it they are random (on the meta device: shapes alone). Positions are
        below `max_model_len`."""
        assert spec.fallback is not None
        if group.stages > 1 or group.experts_apart:
            raise InvalidParameter(
                f"{spec.fallback['architectures'][0]} is computed by transformers' code, which is served with tensor "
                "parallelism alone: leave -pp and --enable-expert-parallel out",
                "pipeline_parallel_size",
            )
        self.spec = spec
        self.group = group
        self.layers: Sequence[int] = range(spec.num_layers)
        self._windows = [spec.window(layer) for layer in range(spec.num_layers)]
        self.progress: Callable[[], None] = lambda: None
        self._ops = ops
        kind = _class_of(spec.fallback)
        config = _hf_config(spec.fallback, _ATTENTION, shapes_alone=device.type == "meta")
        if folder is None:
            with torch.device(device):
                model = kind._from_config(config, dtype=dtype)
        else:
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            for name, stored, asked in sorted(info["mismatched_keys"]):
                raise ModelError(
                    f"tensor {name} has shape {list(stored)}, the config asks for {list(asked)}; config and weights do "
                    "not belong together"
                )
            if missing := sorted(info["missing_keys"]):
                raise ModelError(f"the checkpoint has no tensor {missing[0]}; is it complete?")
        if device.type == "meta":
            _shape_experts(model)
        if group.size > 1:
            _slice_over(model, group)
        _hold_longrope(model, max_model_len)
        self._model = model.to(device).eval()
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        self._places = {
            index: place for place, index in enumerate(_layers_of(json.dumps(spec.fallback, sort_keys=True)))
        }
        self._scales: CacheScales | None = None
        if quantized_cache:
            one = torch.ones(spec.num_kv_heads // group.size, device=device)
            self._scales = CacheScales(key=one, value=one)

    def __call__(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[LayerCache], embedded: object = None
    ) -> Tensor:
        """Token ids [T] → the last layer's normalized output [T, hidden]. There are no images."""
        assert embedded is None, "transformers' code computes texts alone"
        step = _Step(self._ops, batch, caches, self._windows, self._places, self._scales, self.progress)
        token = _step.set(step)
        try:
            out = self._model.base_model(
                input_ids=token_ids[None].long(), position_ids=batch.positions[None].long(), use_cache=False
            )
        finally:
            _step.reset(token)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None) -> Tensor | None:
        """[S, hidden] → fp32 [S, vocabulary] on rank 0: the head, and what the family's code does around it."""
        assert out is None, "what transformers' code computes is not captured"
        base = self._model.base_model
        base.forward = lambda *args, **kwargs: _Hidden(hidden[None])
        try:
            logits: Tensor = self._model(input_ids=hidden.new_zeros((1, hidden.shape[0]), dtype=torch.int64)).logits[0]
        finally:
            del base.forward
        return logits.float() if self.group.draws else None


class _Hidden:
    """In place of a base model's output: the last hidden state and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def _hold_longrope(model: nn.Module, length: int) -> None:
    """Its angles change with the longest sequence of a batch: here they are always those of one of `length` tokens."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            module.forward = partial(_rotated_within, module.forward, length)


def _rotated_within(
    forward: Callable[..., tuple[Tensor, Tensor]],
    length: int,
    x: Tensor,
    position_ids: Tensor,
    layer_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions [1, T] → cosines and sines [1, T, D], of a sequence that ends at `length`."""
    last = position_ids.new_full((1, 1), length - 1)
    positions = torch.cat((position_ids, last), 1)
    cosines, sines = forward(x, positions) if layer_type is None else forward(x, positions, layer_type)
    return cosines[:, :-1], sines[:, :-1]


def _slice_over(model: Any, group: ParallelGroup) -> None:
    """Keeps this rank's part of each projection, by the model's own tensor-parallel plan.

    Raises ModelError where it has none, or one with more than columns and rows.
    """
    prefix = model.base_model_prefix
    plan = {
        f"{prefix}.{name}": style for name, style in (model.config.get_text_config().base_model_tp_plan or {}).items()
    }
    plan |= getattr(type(model), "_tp_plan", None) or {}
    styles = {"colwise", "rowwise", "colwise_gather_output"}
    if not plan or (strange := set(plan.values()) - styles):
        raise ModelError(
            f"{type(model).__name__} has {'no' if not plan else 'a'} tensor-parallel plan in transformers"
            + (f" with {', '.join(sorted(strange))}" if plan else "")
            + "; serve it with -tp 1"
        )
    patterns = {re.compile(name.replace(".", r"\.").replace("*", r"\d+")): style for name, style in plan.items()}
    for name, module in model.named_modules():
        style = next((style for pattern, style in patterns.items() if pattern.fullmatch(name)), None)
        if style is None:
            continue
        if not isinstance(module, nn.Linear):
            raise ModelError(f"{name} is in the tensor-parallel plan and no linear layer; serve it with -tp 1")
        dim = 1 if style == "rowwise" else 0
        if module.weight.shape[dim] % group.size:
            raise ModelError(f"{name} has {module.weight.shape[dim]} rows or columns; serve it with -tp 1")
        module.weight = nn.Parameter(module.weight.chunk(group.size, dim)[group.rank].contiguous(), requires_grad=False)
        if module.bias is not None and style != "rowwise":
            module.bias = nn.Parameter(module.bias.chunk(group.size)[group.rank].contiguous(), requires_grad=False)
        elif module.bias is not None and group.rank:
            module.register_parameter("bias", None)
        if style == "rowwise":
            module.register_forward_hook(lambda module, inputs, output: group.all_reduce(output))
        elif style == "colwise_gather_output":
            module.register_forward_hook(lambda module, inputs, output: _gathered(output, group))


def _gathered(x: Tensor, group: ParallelGroup) -> Tensor:
    """[1, S, N / ranks] → [1, S, N] on rank 0; the others' result is not used."""
    whole = group.gather_columns(x[0])
    return x if whole is None else whole[None]
