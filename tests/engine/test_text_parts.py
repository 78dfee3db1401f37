"""The text parts of models of images and text: equal to transformers' whole models, given text alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, TINY
from greedy import NEW_TOKENS, engine_for, prompt_logits, prompts, run
from image_text import WHOLE, whole_model
from quire_engine.errors import ModelError
from quire_engine.models.families import spec_of
from quire_engine.models.tied import as_stored
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import resolve
from quire_engine.weights.tensors import LazyTensor
from quire_engine.weights.text_parts import TEXT_PARTS
from transformers import AutoModelForImageTextToText


@pytest.mark.parametrize("renamed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WHOLE)
def test_text_alone(name: str, renamed: bool, tmp_path: Path) -> None:
    """Under the names that published checkpoints have, and under those of transformers' own modules."""
    model = whole_model(name, tmp_path, renamed=renamed)
    architecture = WHOLE[name].architecture
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    engine = engine_for(tmp_path)
    batch = prompts()
    with torch.no_grad():
        for got, prompt in zip(prompt_logits(engine, batch), batch, strict=True):
            assert (got - model(input_ids=torch.tensor([prompt])).logits[0]).abs().max() < 1e-4
    for got, prompt in zip(run(engine, batch, 100), batch, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert got == out[0, len(prompt) :].tolist()


def test_every_architecture_is_tested() -> None:
    assert {whole.architecture for whole in WHOLE.values()} == TEXT_PARTS.keys()


def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path) -> None:
    """Published configs of Gemma 3 name the few facts that differ from their class's defaults."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34},
        "eos_token_id": [1, 106],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = resolve(str(tmp_path)).config
    assert found["num_attention_heads"] == transformers.Gemma3TextConfig().num_attention_heads
    assert (found["hidden_size"], found["eos_token_id"]) == (2560, [1, 106])
    config["text_config"] = {"hidden_size": 2560, "num_hidden_layers": 34}
    made = completed(config)
    assert made | {"whole": found["whole"]} == found
    config["text_config"] = {"model_type": "unheard_of"}
    with pytest.raises(ModelError, match="text_config has model_type 'unheard_of'"):
        completed(config)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("whole", [None, True, False])
@pytest.mark.parametrize("part", [None, True, False])
def test_whose_word_on_tied_embeddings_counts(name: str, whole: bool | None, part: bool | None) -> None:
    facts = WHOLE[name]
    told = {} if whole is None else {"tie_word_embeddings": whole}
    of_text = facts.text | ({} if part is None else {"tie_word_embeddings": part})
    config = getattr(transformers, facts.config)(
        text_config=TINY | FAMILIES[facts.family].facts | of_text, vision_config=facts.vision, **told
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    written = {
        "architectures": [facts.architecture],
        "model_type": config.model_type,
        "text_config": TINY | FAMILIES[facts.family].facts | of_text,
    }
    assert spec_of(completed(written | told)).tie_embeddings == tied


@pytest.mark.parametrize("name", WHOLE)
def test_what_a_text_part_leaves_out_is_of_its_own_class(name: str, tmp_path: Path) -> None:
    """Not of the class of the family that it is served as, which has other contexts and other bases."""
    facts = WHOLE[name]
    named = {"model_type": facts.text["model_type"]} if "model_type" in facts.text else {}
    theirs = getattr(transformers, facts.config)(**({"text_config": named} if named else {})).text_config
    config = {
        "architectures": [facts.architecture],
        "text_config": {"model_type": theirs.model_type, "vocab_size": 300},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = resolve(str(tmp_path)).config
    known = theirs.to_dict() | {"vocab_size": 300}
    names = {"max_position_embeddings", "hidden_size", "num_key_value_heads", "intermediate_size", "rope_parameters"}
    assert {name: found[name] for name in names & known.keys()} == {name: known[name] for name in names & known.keys()}


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        (
            "llava",
            {"model_type": "clip_text_model"},
            "has model_type 'clip_text_model', which transformers has no lang",
        ),
        ("llava", {"model_type": "unheard_of"}, "has model_type 'unheard_of', which transformers does not know"),
        ("llava", {"model_type": "apertus"}, "the text of LlavaForConditionalGeneration is of ApertusForCausalLM"),
        ("llava_next", {"model_type": "granite", "embedding_multiplier": 12.0}, "scales its embeddings or its logits"),
        ("llava_next", {"model_type": "granite", "logits_scaling": 8.0}, "scales its embeddings or its logits"),
        ("internvl", {"model_type": "gemma2"}, "scales its embeddings or its logits"),
    ],
)
def test_texts_that_are_refused(name: str, text: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        spec_of(completed({"architectures": [WHOLE[name].architecture], "text_config": text}))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_config_without_a_part_for_the_text(name: str) -> None:
    """As those of Qwen2-VL and 2.5-VL were published first, with RoPE's first name too."""
    kind = getattr(transformers, WHOLE[name].config).model_type
    facts = {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    rope = {"rope_theta": 5e5, "rope_scaling": {"type": "mrope", "mrope_section": [20, 22, 22]}}
    whole = {"architectures": [WHOLE[name].architecture], "model_type": kind, "tie_word_embeddings": True}
    flat = spec_of(completed(whole | facts | rope))
    text = {"model_type": f"{kind}_text"} | facts
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [20, 22, 22]}
    nested = spec_of(completed(whole | {"text_config": text}))
    assert flat == dataclasses.replace(nested, rope=flat.rope, images=flat.images)
    assert flat.tie_embeddings
    assert flat.rope is not None
    assert (flat.rope.sections, flat.rope.theta, flat.rope.dim) == ((20, 22, 22), 5e5, 128)


class Names:
    """A checkpoint of which the names alone are looked at."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def names(self) -> list[str]:
        return list(self._names)

    def tensor(self, name: str) -> LazyTensor:
        raise AssertionError(f"{name} is read")


@pytest.mark.parametrize("at", ["model", "model.language_model", "language_model.model", "model.text_model"])
def test_the_layer_behind_the_last_one_lies_with_the_others(at: str) -> None:
    text = {"model_type": "glm4v_moe_text", "head_dim": 128, "num_nextn_predict_layers": 1}
    config = {"architectures": ["Glm4vMoeForConditionalGeneration"], "text_config": text}
    spec = as_stored(spec_of(completed(config)), Names("model.visual.blocks.0.weight", f"{at}.layers.0.weight"))
    assert spec.mtp is not None
    assert (spec.names.layers, spec.mtp.layers, spec.mtp.at) == (f"{at}.layers", f"{at}.layers", f"{at}.layers.46")
    assert (spec.names.embedding, spec.names.norm) == (f"{at}.embed_tokens", f"{at}.norm")


def test_a_text_model_is_looked_for_where_it_is() -> None:
    """Families by themselves keep their names, whatever a checkpoint of theirs is called."""
    spec = spec_of(completed({"architectures": ["GPTNeoXForCausalLM"]}))
    assert as_stored(spec, Names("gpt_neox.layers.0.weight")) == spec
    assert as_stored(spec, Names("model.language_model.layers.0.weight")) == spec
