"""The text parts of models of images and text: equal to transformers' whole models, given text alone."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, TINY
from greedy import NEW_TOKENS, engine_for, prompt_logits, prompts, run
from image_text import WHOLE, whole_model
from quire_engine.errors import ModelError
from quire_engine.models.families import spec_of
from quire_engine.weights.hf_config import completed
from quire_engine.weights.resolve import resolve
from quire_engine.weights.text_parts import TEXT_PARTS
from transformers import AutoModelForImageTextToText


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_text_alone(name: str, renamed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under the names that published checkpoints have, and under those of transformers' own modules."""
    model = whole_model(name, tmp_path, renamed=renamed)
    architecture = WHOLE[name].architecture
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
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
    assert completed(config) == found
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
