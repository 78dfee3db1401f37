"""Configs of EAGLE's heads as facts. They are those of a Llama of one layer, and a few fields besides."""

from dataclasses import dataclass, replace
from typing import Any

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.models.base import base_spec
from quire_engine.spec import Config, DecoderSpec, Names
from quire_engine.weights.hf_config import completed

_NAMES = Names(embedding="embed_tokens", layers="layers", norm="norm", head="lm_head")


@dataclass(frozen=True, kw_only=True)
class EagleSpec:
    """A head and what it reads."""

    version: int  # 1 or 3
    layer: DecoderSpec
    vocab_size: int  # of what it guesses
    taps: tuple[int, ...] = ()  # layers of the model whose inputs it reads; none: what the model's head reads
    normed_residual: bool = False  # the residual begins with the norm of the state


def eagle_spec(config: Config, target: DecoderSpec) -> EagleSpec:
    """Of a head on a model of that spec. Raises InvalidParameter where they do not belong together or the head is none
    that is served."""
    layer_config: Config = config
    if isinstance(inner := config.get("transformer_layer_config"), dict):  # the format of `speculators`
        if config.get("speculators_model_type") != "eagle3":
            raise refused(f"speculators_model_type is {config.get('speculators_model_type')!r}; served is 'eagle3'")
        layer_config = completed(inner)
    _check_fields(config, target)
    names = [str(name).lower() for name in config.get("architectures") or []]
    third = bool(config.get("draft_vocab_size")) or any("eagle3" in name for name in names)
    try:
        spec = base_spec(layer_config, names=_NAMES)
    except KeyError as error:
        raise refused(f"the head's config.json lacks {error.args[0]}") from error
    except ModelError as error:
        raise refused(f"the head's {error}") from error
    if spec.num_layers != 1:
        raise refused(f"the head has {spec.num_layers} layers; served are EAGLE heads of one")
    if not third:
        _check_width("hidden_size", spec.hidden_size, target)
        names_of_layer = replace(_NAMES, attention_norm="")
        return EagleSpec(version=1, layer=replace(spec, names=names_of_layer), vocab_size=target.vocab_size)
    _check_width("target_hidden_size", config.get("target_hidden_size") or spec.hidden_size, target)
    taps = _taps(config, target)
    if not taps:
        _check_width("hidden_size", spec.hidden_size, target)
    return EagleSpec(
        version=3,
        layer=spec,
        vocab_size=config.get("draft_vocab_size") or spec.vocab_size,
        taps=taps,
        normed_residual=bool(config.get("norm_before_residual")),
    )


def _taps(config: Config, target: DecoderSpec) -> tuple[int, ...]:
    """Within `eagle_config` layers are those whose outputs count, beside it those whose inputs do."""
    inner = config.get("eagle_config") or {}
    if not inner.get("use_aux_hidden_state", True):
        return ()
    layers = target.num_layers
    given = _layers_in(config)
    if not given:
        given = [layer + 1 for layer in _layers_in(inner)]
    usual = (2, layers // 2, layers - 3)
    if not given and (layers < 3 or len(set(usual)) < 3):
        raise refused(f"the head's config.json does not say which of the model's {layers} layers it reads")
    taps = tuple(sorted(given or usual))
    if not 0 <= taps[0] <= taps[-1] <= layers or len(set(taps)) < len(taps):
        raise refused(f"the head reads the layers {', '.join(map(str, taps))} of a model that has {layers}")
    return taps


def _layers_in(config: Config) -> list[int]:
    given: Any = config.get("eagle_aux_hidden_state_layer_ids") or []
    if not isinstance(given, list) or not all(type(layer) is int for layer in given):
        raise refused(f"the head's eagle_aux_hidden_state_layer_ids is {given!r:.80}; it must be a list of numbers")
    return given


def _check_fields(config: Config, target: DecoderSpec) -> None:
    for name, kind, what in (
        ("eagle_config", dict, "an object"),
        ("draft_vocab_size", int, f"a whole number from 1 to {target.vocab_size}, as many tokens as the model has"),
        ("target_hidden_size", int, "a whole number"),
        ("norm_before_residual", bool, "true or false"),
    ):
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise refused(f"the head's {name} is {value!r:.80}; it must be {what}")
    if not 0 < (config.get("draft_vocab_size") or target.vocab_size) <= target.vocab_size:
        raise refused(f"the head guesses {config['draft_vocab_size']} tokens, and the model has {target.vocab_size}")


def _check_width(field: str, value: int, target: DecoderSpec) -> None:
    if value != target.hidden_size:
        raise refused(
            f"the head's {field} is {value}, and the model's {target.hidden_size}; give a head that was trained on it"
        )


def refused(why: str) -> InvalidParameter:
    """An error of `--speculative-config`."""
    return InvalidParameter(f"speculative_config: {why}", "speculative_config")
