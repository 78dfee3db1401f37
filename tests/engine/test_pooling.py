"""Embeddings and relevance scores equal transformers' hidden states, pooled and classified by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from families import ENCODERS
from greedy import engine_for, prompts
from quire_engine.engine import Engine
from quire_engine.errors import ContextTooLong, InvalidParameter, ModelError
from quire_engine.request import EngineSampling, Request
from transformers import AutoModel, AutoModelForSequenceClassification

CLASSIFIER = "AutoModelForSequenceClassification"
POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda states: states[0],
    "mean_tokens": lambda states: states.mean(0),
    "lasttoken": lambda states: states[-1],
}


# A decoder's first token has seen nothing.
CASES = [(family, mode) for family in ENCODERS for mode in POOLINGS]
CASES += [(family, mode) for family in ("llama", "qwen3", "gemma2") for mode in ("mean_tokens", "lasttoken")]


def describe(folder: Path, mode: str, *, normalize: bool = True) -> Path:
    """As sentence-transformers does."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}": name == mode for name in (*POOLINGS, "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | modes))
    return folder


def vectors(engine: Engine, batch: list[list[int]]) -> list[torch.Tensor]:
    """All at once."""
    first = 1 + max(engine.scheduler.requests, default=0)
    for number, prompt in enumerate(batch):
        engine.add(Request(first + number, list(prompt), len(prompt), EngineSampling(temperature=0.0, max_tokens=1)))
    found: dict[int, torch.Tensor] = {}
    while engine.has_work:
        for request, vector in engine.step().vectors:
            assert request.id not in found
            found[request.id] = torch.from_numpy(vector.copy())
    engine.scheduler.check_integrity()
    return [found[first + number] for number in range(len(batch))]


def check(engine: Engine, batch: list[list[int]], expected: list[torch.Tensor]) -> None:
    for got, truth in zip(vectors(engine, batch), expected, strict=True):
        assert (got - truth).abs().max() < 2e-5


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_embeddings(tmp_path: Path, family: str, mode: str) -> None:
    """Batched, in parts, from the prefix cache, with few pages. Checkpoints without a head, names without prefix."""
    folder = describe(make_checkpoint(tmp_path, family, "AutoModel"), mode, normalize=family != "qwen3")
    encoder = family in ENCODERS
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    batch = prompts()
    expected = []
    for prompt in batch:
        with torch.no_grad():
            state = POOLINGS[mode](model(torch.tensor([prompt])).last_hidden_state[0])
        expected.append(state if family == "qwen3" else torch.nn.functional.normalize(state, dim=0))
    engine = engine_for(folder)
    check(engine, batch, expected)
    check(engine, batch, expected)
    hits = engine.scheduler.stats.prefix_hits
    assert hits == (16 * (2 + 4) if mode == "lasttoken" and not encoder else 0), "a mean needs every token's state"
    check(engine_for(folder, attention_backend="torch"), batch, expected)
    if not encoder:
        check(engine_for(folder, max_num_batched_tokens=7), batch, expected)
    runner: Any = engine._executor
    page = runner.memory.page_bytes
    tight = engine_for(folder, kv_cache_memory_bytes=9 * page, max_model_len=128)
    assert tight.scheduler.limits.num_pages == 9
    check(tight, batch, expected)


def test_an_encoder_through_triton(tmp_path: Path) -> None:
    """Ties the spans of the Triton kernel to the engine."""
    folder = describe(make_checkpoint(tmp_path, "bert", "AutoModel"), "mean_tokens")
    batch = prompts()[:3]
    check(engine_for(folder, attention_backend="triton"), batch, vectors(engine_for(folder), batch))


@pytest.mark.parametrize("family", ["roberta", "xlm_roberta", "llama", "qwen3"])
def test_scores(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path, family, "AutoModelForSequenceClassification", num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for prompt in prompts():
        with torch.no_grad():
            expected.append(torch.sigmoid(model(torch.tensor([prompt])).logits[0]))
    check(engine_for(folder), prompts(), expected)


def test_pairs_of_texts(tmp_path: Path) -> None:
    """BERT tells a pair's second text by embeddings of its own."""
    folder = make_checkpoint(tmp_path, "bert", CLASSIFIER, num_labels=1)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"sep_token": "</s>"}))
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    separator = 2
    pairs = [([1, *first], [separator, *second, separator]) for first in prompts()[1:3] for second in prompts()[:3]]
    expected = []
    for first, second in pairs:
        kinds = [0] * (len(first) + 1) + [1] * (len(second) - 1)
        with torch.no_grad():
            logits = model(torch.tensor([first + second]), token_type_ids=torch.tensor([kinds])).logits[0]
        expected.append(torch.sigmoid(logits))
    check(engine_for(folder), [first + second for first, second in pairs], expected)


def test_a_model_that_generates_embeds_where_asked(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for prompt in prompts():
        with torch.no_grad():
            state = model(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected.append(torch.nn.functional.normalize(state, dim=0))
    check(engine_for(folder, task="embed"), prompts(), expected)


def test_the_context_is_filled_to_the_last_token(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "roberta", "AutoModel")
    engine = engine_for(folder)
    [vector] = vectors(engine, [[5] * 128])
    assert torch.isfinite(vector).all()
    with pytest.raises(ContextTooLong):
        vectors(engine, [[5] * 129])


def test_no_more_tokens_than_the_model_was_trained_with(tmp_path: Path) -> None:
    """`max_seq_length`, where it is below what the model has positions for."""
    folder = describe(make_checkpoint(tmp_path, "bert", "AutoModel"), "mean_tokens")
    for file, most, expected in (("bert", None, 128), ("bert", 48, 48), ("roberta", 4096, 128)):
        (folder / "sentence_bert_config.json").unlink(missing_ok=True)
        (folder / f"sentence_{file}_config.json").write_text(json.dumps({"max_seq_length": most}))
        engine = engine_for(folder)
        [vector] = vectors(engine, [[5] * expected])
        assert torch.isfinite(vector).all()
        with pytest.raises(ContextTooLong):
            vectors(engine, [[5] * (expected + 1)])
        with pytest.raises(InvalidParameter, match=f"the model's context is {expected}"):
            engine_for(folder, max_model_len=expected + 1)
    (folder / "sentence_roberta_config.json").write_text(json.dumps({"max_seq_length": "many"}))
    with pytest.raises(ModelError, match=r"max_seq_length in sentence_roberta_config\.json is 'many'"):
        engine_for(folder)


@pytest.mark.parametrize(
    ("family", "kind", "options", "facts", "error", "named"),
    [
        ("llama", "AutoModelForCausalLM", {"task": "score"}, {}, InvalidParameter, "no classifier"),
        ("llama", "AutoModel", {"task": "generate"}, {}, InvalidParameter, "no head"),
        (
            "llama",
            "AutoModelForSequenceClassification",
            {"task": "embed"},
            {"num_labels": 1},
            InvalidParameter,
            "scores",
        ),
        ("llama", CLASSIFIER, {}, {"num_labels": 3}, ModelError, "id2label has 3"),
        ("bert", CLASSIFIER, {}, {"num_labels": 1}, ModelError, "do not tell the separator"),
        ("bert", "AutoModel", {"max_num_batched_tokens": 64}, {}, InvalidParameter, "up to 128 tokens at once"),
    ],
)
def test_what_is_refused_is_named(
    tmp_path: Path, family: str, kind: str, options: dict[str, Any], facts: dict[str, Any], error: type, named: str
) -> None:
    folder = make_checkpoint(tmp_path, family, kind, **facts)
    with pytest.raises(error, match=named):
        engine_for(folder, **options)


def test_an_unknown_pooling_is_refused(tmp_path: Path) -> None:
    folder = describe(make_checkpoint(tmp_path, "bert", "AutoModel"), "max_tokens")
    with pytest.raises(ModelError, match="pooling_mode_max_tokens"):
        engine_for(folder)
