"""What a config leaves out means what transformers' config class of its family fills in."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_checkpoint
from families import ENCODERS, FAMILIES, TINY, Family
from greedy import engine_for, prompt_logits, prompts
from layouts import rewritten
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.models.families import spec_of
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import resolve
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]
# What a tiny model needs to be tiny; all else of its config is left out.
SIZES = re.compile(r"(size|dim|_layers|heads?|embd|head|positions|position_embeddings|experts|tok|rank|groups?)$")
LEFT_OUT = [
    "cohere",
    "cohere2",
    "deepseek_v3",
    "ernie_moe",
    "exaone4",
    "gemma2",
    "gemma3",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "gpt_oss",
    "helium",
    "lfm2",
    "minimax_m2",
    "mixtral",
    "olmo3",
    "phi",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]


def config_of(known: Family, **given: Any) -> Any:
    return getattr(transformers, known.config)(**given)


@pytest.mark.parametrize("family", FAMILIES | ENCODERS)
def test_each_field_left_out(family: str) -> None:
    """One after the other: the model is that of the config in which transformers has written the field out."""
    known = (FAMILIES | ENCODERS)[family]
    whole = config_of(known, **TINY | known.facts).to_dict()
    kind = known.config.removesuffix("Config").removesuffix("Text")
    architectures = [f"{kind}Model" if family in ENCODERS else f"{kind}ForCausalLM"]
    architectures = {"GPT2": ["GPT2LMHeadModel"]}.get(kind, architectures)
    compared = 0
    for field in dataclasses.fields(getattr(transformers, known.config)):
        if field.name not in whole or field.name == "architectures":
            continue
        left = {name: value for name, value in whole.items() if name != field.name}
        try:
            written = config_of(known, **left).to_dict()
        except Exception:  # what transformers raises for a model of such a size
            with pytest.raises(ModelError, match="is not one of"):
                completed(left | {"architectures": architectures})
            continue
        try:
            expected = spec_of(completed(written | {"architectures": architectures}))
        except ModelError as error:
            with pytest.raises(ModelError, match=re.escape(str(error))):
                spec_of(completed(left | {"architectures": architectures}))
            continue
        assert spec_of(completed(left | {"architectures": architectures})) == expected, field.name
        compared += 1
    assert compared > 15


@pytest.mark.parametrize("family", LEFT_OUT)
def test_logits_of_a_config_of_sizes_alone(tmp_path: Path, family: str) -> None:
    """Equal transformers', which makes the checkpoint and reads it by the same few fields; no architecture is named."""
    known = FAMILIES[family]
    sizes = {key: value for key, value in known.facts.items() if SIZES.search(key) and key != "no_rope_layers"}
    defaults = {f.name: f.default for f in dataclasses.fields(getattr(transformers, known.config))}
    left_out = {key: defaults[key] for key in known.facts if key not in sizes and key in defaults}
    folder = make_checkpoint(tmp_path / "whole", family, **left_out, num_hidden_layers=4)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    few = TINY | sizes | {"num_hidden_layers": 4, "model_type": kind}
    (folder / "config.json").write_text(json.dumps(few))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = prompts()[-2:]
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt])).logits[0] for prompt in batch]
    for got, expected in zip(prompt_logits(engine_for(folder), batch), theirs, strict=True):
        assert (got - expected).abs().max() < 3e-4


@pytest.mark.parametrize("family", ["llama", "hunyuan", "apertus"])
def test_dynamic_rope_within_the_context(checkpoint: Make, tmp_path: Path, family: str) -> None:
    """It is plain there, and nothing is served beyond."""
    plain = {"rope_type": "default", "rope_theta": 500.0}
    rope = plain | {"rope_type": "dynamic", "factor": 2.0}
    expected = rewritten(checkpoint(family), tmp_path / "plain", dict.copy, rope_parameters=plain)
    model = AutoModelForCausalLM.from_pretrained(expected, dtype=torch.float32)
    folder = rewritten(checkpoint(family), tmp_path / "dynamic", dict.copy, rope_parameters=rope)
    for got, prompt in zip(prompt_logits(engine_for(folder), prompts()), prompts(), strict=True):
        with torch.no_grad():
            assert (got - model(torch.tensor([prompt])).logits[0]).abs().max() < 1e-4
    with pytest.raises(InvalidParameter, match="max_model_len is 513; the model's context is 512"):
        engine_for(folder, max_model_len=513)


def test_a_family_that_transformers_lacks_has_its_own_defaults() -> None:
    """InternLM2's class is remote code. The published models name what differs from it."""
    few = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "num_key_value_heads": 8}
    spec = spec_of(completed(few | {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    assert (spec.num_heads, spec.num_kv_heads, spec.max_position, spec.qkv_bias) == (32, 8, 2048, True)
    assert spec.rope is not None
    assert (spec.rope.theta, spec.rope.kind) == (500.0, "dynamic")


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"model_type": "qwen3"}, "Qwen3ForCausalLM"),
        ({"model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"model_type": "mpt", "architectures": ["MPTForCausalLM"]}, "MptForCausalLM"),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": "xlm-roberta"}, "XLMRobertaModel"),
        ({"model_type": "qwen3_5_text"}, "Qwen3_5ForCausalLM"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "Gemma3ForCausalLM"),
        ({"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM"),
    ],
)
def test_architecture_and_context_are_those_of_the_model_type(config: dict[str, Any], architecture: str) -> None:
    found = completed(config)
    assert found["architectures"] == [architecture]
    assert spec_of(found).max_position > 500


def test_what_is_no_config_is_named(tmp_path: Path) -> None:
    for config, named in (
        ({}, "architectures is missing; served are Arcee"),
        ({"model_type": "unheard_of"}, "architectures is missing; served are Arcee"),
        (
            {"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"},
            "not one of llama in transformers.*hidden_size",
        ),
        ({"architectures": ["LlamaForCausalLM"], "num_attention_heads": 0}, "num_attention_heads 0; it must be from 1"),
        ({"model_type": "llama", "max_position_embeddings": -5}, "max_position_embeddings -5; it must be from 1"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; it must be .* to 16384"),
        ({"model_type": "llama", "intermediate_size": 10**30}, "intermediate_size 1000000.*; it must be from 0 to"),
        ({"model_type": "llama", "bos_token_id": -(10**30)}, "bos_token_id -1000000.*; it must be from"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window -1; it must be from 0"),
        ({"model_type": "llama", "quantization_config": []}, r"quantization_config \[\]; it must be an object"),
        ({"model_type": "llama", "rms_norm_eps": math.nan}, "rms_norm_eps NaN; it must be a number"),
        ({"model_type": "gpt2", "n_layer": 0}, "n_layer 0; it must be from 1"),
        ({"model_type": "llama", "rope_theta": -1e4}, "rope_theta -10000.0; it must be a number above 0"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": "4"}}, "factor '4'; it must be a number"),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": math.nan}}, "factor nan; it must be"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "1 numbers|48 numbers|short_factor",
        ),
        ({"architectures": [None]}, r"architectures \[None\]; they must be"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": [1]}, "text_config is"),
        (
            {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float99"},
            "not one of llama in transformers.*float99",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=named):
            spec_of(resolve(str(tmp_path)).config)


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "auto"},
        {"torch_dtype": "torch.float16", "dtype": "torch.float16"},
        {"quantization_config": {}},
        {"quantization_config": None},
        {"architectures": ["llamaforcausallm"]},
        {"architectures": ["LlamaForCausalLMFineTuned"]},
        {"model_max_length": 10**30},
    ],
)
def test_oddities_that_change_nothing(checkpoint: Make, facts: dict[str, Any]) -> None:
    """Each has been published."""
    plain = resolve(str(checkpoint("llama"))).config
    assert spec_of(completed(plain | facts)) == spec_of(plain)


def test_a_class_with_code_of_its_own_is_no_other() -> None:
    config = {"architectures": ["Llama9ForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "llama9.Model"}}
    with pytest.raises(ModelError, match=r"Llama9ForCausalLM.*served are"):
        spec_of(completed(config))


def test_old_names_of_published_configs() -> None:
    """Nemotron-H says its layers in letters; Phi-3's first config calls longrope "su"."""
    letters = {"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*-", "num_hidden_layers": 5}
    spec = spec_of(completed(letters))
    assert (spec.num_layers, spec.recurrent_layers, spec.without_mixer) == (5, {0, 2}, {1, 4})
    rope = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi = {"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 131072, "rope_scaling": rope}
    old, new = (spec_of(completed(phi | {"rope_scaling": rope | {"type": kind}})) for kind in ("su", "longrope"))
    assert old == new
    assert old.rope is not None
    assert (old.rope.kind, old.rope.scaling["original_max_position_embeddings"]) == ("longrope", 4096)


@pytest.mark.parametrize(
    "written",
    [
        "[" * 200_000,
        '{"a": {"__float__": []}}',
        '{"architectures": 5}',
        '{"architectures": [null]}',
        '{"architectures": [["LlamaForCausalLM"]]}',
        '{"model_type": []}',
        '{"architectures": ["Gemma3ForConditionalGeneration"], "text_config": 5}',
        '{"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": {}}}',
        '{"architectures": ["DeepseekV3ForCausalLM"], "moe_layer_freq": 0}',
        '{"architectures": ["DeepseekV3ForCausalLM"], "moe_layer_freq": "x"}',
        '{"architectures": ["BertModel"], "num_attention_heads": 0}',
        '{"architectures": ["FalconForCausalLM"], "hidden_size": 1000000000000000000000000000000}',
        '{"architectures": ["LlamaForCausalLM"], "rope_scaling": {"rope_type": "linear", "factor": null}}',
    ],
)
def test_values_of_any_kind_are_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(ModelError, match=r"config\.json|text_config"):
        spec_of(resolve(str(tmp_path)).config)


@pytest.mark.parametrize("written", ["5", "[1]", "null", "[" * 200_000])
def test_a_generation_config_that_is_no_object_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "generation_config.json").write_text(written)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        assert resolve(str(tmp_path)).generation_config is None, "it was read"
