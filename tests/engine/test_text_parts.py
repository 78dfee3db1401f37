"""The text parts of models of images and text: equal to transformers' whole models, given text alone."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import add_tokenizer
from families import FAMILIES, TINY
from greedy import NEW_TOKENS, engine_for, prompt_logits, prompts, run
from quire_engine.errors import ModelError
from quire_engine.models.families import spec_of
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import resolve
from quire_engine.weights.text_parts import TEXT_PARTS
from transformers import AutoModelForImageTextToText

_QWEN = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "depth": 1}
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL = {"image_size": 32, "patch_size": 8}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# architecture → its config class, the family of its text part, what that part and the visual one are
WHOLE: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("Gemma3Config", "gemma3", {}, _TOWER | _SMALL),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        "mistral",
        {"model_type": "mistral"},
        _TOWER | _SMALL | {"model_type": "pixtral", "head_dim": 16},
    ),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VLConfig", "qwen2", _ROPE | {"use_sliding_window": False}, _QWEN),
    "Qwen3VLForConditionalGeneration": (
        "Qwen3VLConfig",
        "qwen3",
        _ROPE | {"head_dim": 16},
        _QWEN | {"deepstack_visual_indexes": [0]},
    ),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5Config", "qwen3_5", {}, _QWEN),
    "Qwen3_5MoeForConditionalGeneration": ("Qwen3_5MoeConfig", "qwen3_5_moe", {}, _QWEN),
}


@pytest.mark.parametrize("architecture", TEXT_PARTS)
def test_text_alone(architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, family, text, vision = WHOLE[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(text_config=TINY | FAMILIES[family].facts | text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    add_tokenizer(tmp_path, TINY["vocab_size"])
    with caplog.at_level(logging.WARNING):
        engine = engine_for(tmp_path)
    assert f"{architecture}: images are not served" in caplog.text
    batch = prompts()
    with torch.no_grad():
        for got, prompt in zip(prompt_logits(engine, batch), batch, strict=True):
            assert (got - model(input_ids=torch.tensor([prompt])).logits[0]).abs().max() < 1e-4
    for got, prompt in zip(run(engine, batch, 100), batch, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert got == out[0, len(prompt) :].tolist()


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
    assert completed(config) == found
    config["text_config"] = {"model_type": "unheard_of"}
    with pytest.raises(ModelError, match="text_config has model_type 'unheard_of'"):
        completed(config)


@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"])
@pytest.mark.parametrize("whole", [None, True, False])
@pytest.mark.parametrize("part", [None, True, False])
def test_whose_word_on_tied_embeddings_counts(architecture: str, whole: bool | None, part: bool | None) -> None:
    kind, family, text, vision = WHOLE[architecture]
    told = {} if whole is None else {"tie_word_embeddings": whole}
    of_text = text | ({} if part is None else {"tie_word_embeddings": part})
    config = getattr(transformers, kind)(
        text_config=TINY | FAMILIES[family].facts | of_text, vision_config=vision, **told
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    written = {"architectures": [architecture], "model_type": config.model_type, "text_config": of_text} | told
    assert spec_of(completed(written)).tie_embeddings == tied


@pytest.mark.parametrize("architecture", TEXT_PARTS)
def test_what_a_text_part_leaves_out_is_of_its_own_class(architecture: str, tmp_path: Path) -> None:
    """Not of the class of the family that it is served as, which has other contexts and other bases."""
    kind, _, text, _ = WHOLE[architecture]
    named = {"model_type": text["model_type"]} if "model_type" in text else {}
    theirs = getattr(transformers, kind)(**({"text_config": named} if named else {})).text_config
    config = {"architectures": [architecture], "text_config": {"model_type": theirs.model_type, "vocab_size": 300}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = resolve(str(tmp_path)).config
    facts = theirs.to_dict() | {"vocab_size": 300}
    names = {"max_position_embeddings", "hidden_size", "num_key_value_heads", "intermediate_size", "rope_parameters"}
    assert {name: found[name] for name in names & facts.keys()} == {name: facts[name] for name in names & facts.keys()}
