"""A checkpoint's config made whole: what it leaves out is what transformers' config class of its family fills in.

The families' own files then read fields and have no defaults. transformers also brings old names to new ones: all of
RoPE is in `rope_parameters`, what each layer is in `layer_types`.
"""

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

from quire_engine.errors import ModelError
from quire_engine.weights.text_parts import TEXT_PARTS

log = logging.getLogger(__name__)
_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "Model")
_TAKEN_TOO = ("hybrid_override_pattern", "mtp_hybrid_override_pattern")  # computed, and what published configs say
_LIKE = {"mimo": "qwen2"}  # families without a class in transformers, and whose fields they have
_SIZES = {  # what is counted, and how little and how much of it is no mistake
    "num_hidden_layers": (1, 1 << 14),
    "vocab_size": (1, 1 << 28),
    "hidden_size": (1, 1 << 24),
    "intermediate_size": (0, 1 << 28),
    "num_attention_heads": (1, 1 << 20),
    "num_key_value_heads": (1, 1 << 20),
    "max_position_embeddings": (1, 1 << 48),
    "sliding_window": (0, 1 << 48),
    "num_nextn_predict_layers": (0, 64),
    "num_mtp_modules": (0, 64),
}
_ANY = (-1 << 63, (1 << 63) - 1)
_REFINED_WEB = {"RefinedWebModel": False, "RefinedWeb": True}  # Falcon's first model types: whether it is as in 40B
_OF_REFINED_WEB = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
_OF_THE_WHOLE = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every field of its family, of the text part where there are images too (`text_part_of` then says
    of which architecture, and `whole` has it as it was). A family that transformers has no class for keeps what it says
    itself.

    Raises ModelError for a config that transformers refuses.
    """
    _check_names(config)
    config = _as_falcon(config) if config.get("model_type") in _REFINED_WEB else config
    config = {**config, "architectures": _architectures(config)}
    name = next((name for name in config["architectures"] if name in TEXT_PARTS), None)
    if name is None:
        kind = _kind_of(config["architectures"]) or config.get("model_type")
        kind = _LIKE.get(kind, kind) if isinstance(kind, str) else kind
        return _filled(config, kind) if _is_known(kind) else config
    return _text_part(config, name)


def _text_part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Of the text part of an architecture, as its family says it by itself."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    logging.getLogger("transformers.modeling_rope_utils").addFilter(_tells_news)
    part, whole_kind = TEXT_PARTS[name], _kind_of_whole(config, name)
    text = config.get("text_config") or config  # Qwen2-VL's published configs have no part of their own
    if not isinstance(text, Mapping):
        raise ModelError(f"text_config is {text!r:.80}; it must be an object")
    _check_names(text)
    kind = text.get("model_type") or CONFIG_MAPPING[whole_kind]().text_config.model_type
    if not _is_known(kind):
        raise ModelError(f"text_config has model_type {kind!r}, which transformers does not know")
    own = _filled(text, kind)
    if "text_config" in own:
        kind = own["text_config"]["model_type"]
        own = _filled(own["text_config"], kind)
    family = part.family or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if family is None:
        raise ModelError(f"text_config has model_type {kind!r}, which transformers has no language model of")
    usual = _filled(own, _kind_of([family])) if part.family else own
    found = usual | own | {"head_dim": own.get("head_dim"), **part.fixed}
    kept = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    of_text, of_whole = ({key: of[key] for key in ("tie_word_embeddings",) if key in of} for of in (text, config))
    tied = _filled({"text_config": {"model_type": kind} | of_text} | of_whole, whole_kind)["tie_word_embeddings"]
    whole = {**config, "model_type": whole_kind}
    parts = {"tie_word_embeddings": tied, "architectures": [family], "text_part_of": name, "whole": whole}
    return found | kept | parts


def _tells_news(record: logging.LogRecord) -> bool:
    """transformers warns of M-RoPE's sections in the rope of a text part, which is where they belong."""
    return "mrope_" not in record.getMessage()


def _as_falcon(config: Mapping[str, Any]) -> dict[str, Any]:
    """The first Falcon configs, which came with code of their own, as transformers writes them."""
    named = {_OF_REFINED_WEB.get(key, key): value for key, value in config.items()}
    kind = {"model_type": "falcon", "new_decoder_architecture": _REFINED_WEB[config["model_type"]]}
    names = [name.replace("RW", "Falcon", 1) for name in config.get("architectures") or []]
    return named | kind | {"architectures": names}


def _check_names(config: Mapping[str, Any]) -> None:
    kind, names = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str | None) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ModelError(
            f"config.json has model_type {kind!r:.80} and architectures {names!r:.80}; they must be a text and a list "
            "of texts"
        )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """Those that the config names, as transformers spells them (MPTForCausalLM, PhiMoEForCausalLM are published); else
    what its model type is, as where a fine-tune names a class of its own and brings no code for it."""
    import transformers

    usual = _usual(config)
    spelled = {name.lower(): name for name in usual}
    names = [spelled.get(name.lower(), name) for name in config.get("architectures") or usual]
    if not usual or config.get("auto_map") or not set(names).isdisjoint([*usual, *TEXT_PARTS, *transformers.__all__]):
        return names
    if any("eagle" in name.lower() for name in names):  # a head on a model, not the model
        return names
    log.warning("architectures is %s, which transformers does not know; it is read as %s", names, usual[0])
    return usual


def _usual(config: Mapping[str, Any]) -> list[str]:
    """What transformers makes of a model type: an encoder without a head, else a language model."""
    from transformers.models.auto import modeling_auto

    mappings = [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ]
    kind = config.get("model_type")
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        mappings = [modeling_auto.MODEL_MAPPING_NAMES]
    elif "text_config" in config:
        mappings.reverse()
    return [mapping[kind] for mapping in mappings if kind in mapping][:1]


def _is_known(kind: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _kind_of_whole(config: Mapping[str, Any], name: str) -> str:
    """The model type of an architecture with a text part."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if _is_known(kind := config.get("model_type")) and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return str(kind)
    return {whole: kind for kind, whole in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()}[name]


def _kind_of(architectures: list[str]) -> str | None:
    """The model type whose config class is named as the architecture is: that of its text, where there are two."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = {name: kind for kind, name in reversed(CONFIG_MAPPING_NAMES.items())}
    for architecture in architectures:
        for base in (architecture.removesuffix(ending) for ending in _ENDINGS if architecture.endswith(ending)):
            for name in (f"{base}TextConfig", f"{base}Config"):
                if name in kinds:
                    return kinds[name]
    return None


def _filled(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """By the config class of a model type. A field that it knows by several names is there by each."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    given = {key: value for key, value in config.items() if _is_settable(cls, key)}
    for name in ("dtype", "torch_dtype"):
        if isinstance(dtype := given.get(name), str):  # "auto" and "torch.float16" are published
            given[name] = None if dtype == "auto" else dtype.removeprefix("torch.")
    rope = given.get("rope_scaling")
    if isinstance(rope, Mapping) and rope.get("type") == "su":  # Phi-3's first name of it
        given["rope_scaling"] = {**rope, "type": "longrope"}
    _check_values(cls, given)
    try:
        made = cls(**copy.deepcopy(given))  # some keep and change what they are given
        names = {alias: getattr(made, name) for alias, name in cls.attribute_map.items() if hasattr(made, name)}
        whole = made.to_dict()
    except Exception as error:  # others' code, which raises nearly anything where a value is not what it expects
        raise ModelError(f"config.json is not one of {kind} in transformers: {_why(error, given)}") from error
    if "rope_parameters" in whole:
        given.pop("rope_scaling", None)  # their older name
    return given | names | whole


def _why(error: Exception, given: Mapping[str, Any]) -> str:
    """What a class finds wrong, with the field where it is in one."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    found = error.__cause__ if isinstance(error, StrictDataclassFieldValidationError) else None
    field = str(error).partition("'")[2].partition("'")[0]
    why = " ".join(str(found or error).split())[:300]
    return f"{field} is {given[field]!r:.80} ({why}); correct it" if found and field in given else why


def _check_values(cls: Any, given: Mapping[str, Any]) -> None:
    """Before a class makes lists of them. Raises ModelError."""
    usual_name = {own: usual for usual, own in cls.attribute_map.items()}
    fields = cls.__dataclass_fields__.keys() | cls.attribute_map.keys()
    for key, value in given.items():
        least, most = _SIZES.get(usual_name.get(key, key), _ANY)
        if key in fields and isinstance(value, int) and not least <= value <= most:
            raise ModelError(f"config.json has {key} {value}; it must be from {least} to {most}")
        if isinstance(value, float) and math.isnan(value):
            raise ModelError(f"config.json has {key} NaN; it must be a number")
    if not isinstance(stored := given.get("quantization_config"), dict | None):
        raise ModelError(f"config.json has quantization_config {stored!r:.80}; it must be an object")


def _is_settable(cls: type, key: str) -> bool:
    """Not what a class computes from other fields, nor what is fixed for it."""
    if key in ("model_type", "transformers_version"):
        return False
    computed = getattr(cls, key, None)
    return key in _TAKEN_TOO or not (isinstance(computed, property) and computed.fset is None)
