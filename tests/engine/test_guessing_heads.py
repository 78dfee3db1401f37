"""Heads that guess tokens ahead change no token when they are served, and one that copies its model is always right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import DRAFT_VOCABULARY, HIDDEN, MTP, VOCABULARY, eagle_folder, mtp_folders
from layouts import Tensors, rewritten
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.execution.runner import ModelRunner
from quire_engine.weights.resolve import find_model
from test_draft_model import guessing, judged
from test_speculation import FEATURES, Model, requests, run

Make = Callable[[str], Path]
OUTPUTS = ("o_proj", "down_proj", "out_proj")  # of what layers add
SOME = ["greedy", "seeded", "most tokens", "penalties", "logprobs", "prompt_logprobs", "stop ids", "short"]


def served(folder: Path, *, head: Path | None = None, **options: Any) -> Model:
    asked: dict[str, Any] = {"num_speculative_tokens": 4}
    if head is not None:
        asked["model"] = str(head)
    return Model(folder, speculative_config=json.dumps(asked), **options)


def without_layers(tensors: Tensors) -> Tensors:
    """Of which nothing is left but the embedding and the output head: each token follows from the one before it."""
    return {name: torch.zeros_like(x) if any(end in name for end in OUTPUTS) else x for name, x in tensors.items()}


def check(model: Model, asked: list[dict[str, Any]], **limits: Any) -> tuple[int, int]:
    """The tokens are those without guesses → drafts, and how many were accepted."""
    plain = [seen[:2] for seen in run(model.engine(), requests(asked))]
    engine = guessing(model, **limits)
    assert [seen[:2] for seen in run(engine, requests(asked))] == plain
    return judged(engine)


@pytest.mark.parametrize("name", MTP)
def test_mtp_is_found_and_changes_nothing(tmp_path: Path, name: str) -> None:
    model = served(mtp_folders(tmp_path, name)[1])
    assert model.limits.speculation.method == "mtp"
    drafts, accepted = check(model, [FEATURES["greedy"], FEATURES["seeded"]])
    assert accepted < drafts


@pytest.mark.parametrize("name", MTP)
def test_mtp_that_copies_its_model(tmp_path: Path, name: str) -> None:
    """By the embedding of the token before alone, as the model."""
    mtp, folder = MTP[name], mtp_folders(tmp_path / "made", name)[1]

    def copying(tensors: Tensors) -> Tensors:
        out = without_layers(tensors)
        out[f"{mtp.embedding_norm}.weight"] = torch.full((HIDDEN,), 0.0 if mtp.unit_offset else 1.0)
        out[f"{mtp.norm}.weight"] = out["model.norm.weight"].clone()
        halves = [torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)]
        out[f"{mtp.projection}.weight"] = torch.cat(halves[::-1] if mtp.hidden_first else halves, 1)
        return out

    model = served(rewritten(folder, tmp_path / "copying", copying))
    for limits in ({}, {"max_num_batched_tokens": 13}):
        drafts, accepted = check(model, [FEATURES["greedy"]], **limits)
        assert accepted == drafts > 20
    drafts, accepted = check(model, [FEATURES["seeded"]])
    assert 50 < 0.9 * drafts < accepted  # a norm of a norm is not quite the same: what is drawn may be the next token


@pytest.fixture(scope="module")
def eagles(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Model]:
    folder, made = checkpoint("llama"), {}
    for version in (1, 3):
        facts = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]} if version == 3 else {}
        head = eagle_folder(tmp_path_factory.mktemp("eagle"), version, **facts)
        made[version] = served(folder, head=head, deterministic=True)
    return made


@pytest.mark.parametrize("feature", SOME)
@pytest.mark.parametrize("version", [1, 3])
def test_eagle_changes_nothing(eagles: dict[int, Model], version: int, feature: str) -> None:
    model = eagles[version]
    assert model.limits.speculation.method == ("eagle3" if version == 3 else "eagle")
    asked = [FEATURES.get(feature, {"top_k": 200})]  # more than a head may have
    plain = run(model.engine(), requests(asked))
    engine = guessing(model)
    assert run(engine, requests(asked)) == plain
    drafts, accepted = judged(engine)
    assert accepted < drafts or feature == "short"


def test_eagle_that_copies_its_model(checkpoint: Make, tmp_path: Path) -> None:
    def scaled(tensors: Tensors) -> Tensors:  # a head without a norm: what is likeliest does not depend on lengths
        out = without_layers(tensors)
        out["fc.weight"] = torch.cat([torch.eye(HIDDEN) * norm, torch.zeros(HIDDEN, HIDDEN)], 1)
        return out | {"fc.bias": torch.zeros(HIDDEN)}

    norm = 1 + 0.2 * torch.randn(HIDDEN)
    folder = rewritten(
        checkpoint("llama"), tmp_path / "model", lambda tensors: without_layers(tensors) | {"model.norm.weight": norm}
    )
    head = rewritten(eagle_folder(tmp_path / "made", 1), tmp_path / "head", scaled)
    drafts, accepted = check(served(folder, head=head), [FEATURES["greedy"]])
    assert accepted == drafts > 50


def test_eagle_3_that_knows_what_follows(checkpoint: Make, tmp_path: Path) -> None:
    """A model that goes round in a circle of tokens, and a head that is two tokens ahead of what it reads."""
    circle = torch.arange(HIDDEN) + 30

    def going_round(tensors: Tensors) -> Tensors:
        out = without_layers(tensors)
        out["model.embed_tokens.weight"] = torch.zeros(VOCABULARY, HIDDEN).index_copy(0, circle, torch.eye(HIDDEN))
        out["lm_head.weight"] = torch.zeros(VOCABULARY, HIDDEN).index_copy(0, circle.roll(-1), torch.eye(HIDDEN))
        return out | {"model.norm.weight": torch.ones(HIDDEN)}

    def ahead(tensors: Tensors) -> Tensors:
        out = without_layers(tensors)
        out["fc.weight"] = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, 2 * HIDDEN)], 1)
        own = torch.arange(HIDDEN).roll(-2)  # of its tokens: those of the circle are its first
        out["lm_head.weight"] = torch.zeros(DRAFT_VOCABULARY, HIDDEN).index_copy(0, own, torch.eye(HIDDEN))
        out["d2t"] = torch.full((DRAFT_VOCABULARY,), 30)
        return out | {"norm.weight": torch.ones(HIDDEN)}

    folder = rewritten(checkpoint("llama"), tmp_path / "model", going_round)
    made = eagle_folder(tmp_path / "made", 3, eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    model = served(folder, head=rewritten(made, tmp_path / "head", ahead))
    prompts = [[30, 31, 32], [40], list(range(40, 60))]
    plain = run(model.engine(), requests([FEATURES["greedy"]], prompts))
    assert plain[1][0][:3] == [41, 42, 43]
    engine = guessing(model, most=1)
    assert run(engine, requests([FEATURES["greedy"]], prompts)) == plain
    drafts, accepted = judged(engine)
    assert accepted == drafts > 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "mtp"}, "has no layer for it"),
        ({"method": "eagle3", "model": "eagle"}, "is for eagle; leave method out"),
        ({"method": "draft_model", "model": "eagle"}, "is for eagle; leave method out"),
        ({"method": "eagle", "model": "llama"}, "the head has 3 layers"),
        ({"model": "wide"}, "trained on it"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    checkpoint: Make, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    folder = checkpoint("llama")
    if (name := given.get("model")) is not None:
        facts = {"hidden_size": 128} if name == "wide" else {}
        given = given | {"model": str(folder if name == "llama" else eagle_folder(tmp_path, 1, **facts))}
    config = EngineConfig(model=str(folder), device="cpu", speculative_config=json.dumps(given))
    with pytest.raises(InvalidParameter, match=said):
        ModelRunner(config, find_model(config))


@pytest.mark.parametrize("name", ["draft_model", "eagle", "eagle3", "mtp"])
def test_captured_steps_are_followed(checkpoint: Make, tmp_path: Path, name: str) -> None:
    """Steps of padded shapes, whose states are left where every captured step leaves them."""
    folder, head = checkpoint("llama"), None
    if name == "mtp":
        folder = mtp_folders(tmp_path, "mimo")[1]
    elif name == "draft_model":
        head = folder
    else:
        layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]} if name == "eagle3" else {}
        head = eagle_folder(tmp_path, 3 if name == "eagle3" else 1, **layers)
    served_model = served(folder, head=head)
    asked = [FEATURES["greedy"], FEATURES["seeded"]]
    plain = [seen[:2] for seen in run(served_model.engine(), requests(asked))]
    engine = guessing(served_model)
    run(engine, requests(asked))
    served_model.runner.warm_up()

    def replaying(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    served_model.runner.capture_graphs(replaying)
    replayed = guessing(served_model)
    assert [seen[:2] for seen in run(replayed, requests(asked))] == plain
    assert judged(replayed) == judged(engine)


def test_a_head_s_own_tables_are_planned(checkpoint: Make, tmp_path: Path) -> None:
    folder, made = checkpoint("llama"), eagle_folder(tmp_path / "made", 1)
    both = ("embed_tokens.weight", "lm_head.weight")
    own = rewritten(made, tmp_path / "own", lambda t: t | {name: torch.randn(VOCABULARY, HIDDEN) for name in both})
    weights = [served(folder, head=head).runner.memory.weight_bytes for head in (made, own)]
    assert weights[1] - weights[0] == 2 * 4 * VOCABULARY * HIDDEN


@pytest.mark.parametrize(
    "facts",
    [
        {"eagle_aux_hidden_state_layer_ids": [0.5, 1, 2]},
        {"eagle_aux_hidden_state_layer_ids": "012"},
        {"eagle_config": [1]},
        {"draft_vocab_size": "90"},
        {"draft_vocab_size": -3},
        {"draft_vocab_size": 10**9},
        {"target_hidden_size": "64"},
        {"norm_before_residual": "no"},
    ],
    ids=str,
)
def test_a_head_s_config_is_checked(checkpoint: Make, tmp_path: Path, facts: dict[str, Any]) -> None:
    head = eagle_folder(tmp_path, 3, **facts)
    config = EngineConfig(
        model=str(checkpoint("llama")), device="cpu", speculative_config=json.dumps({"model": str(head)})
    )
    with pytest.raises(InvalidParameter, match="speculative_config: the head"):
        ModelRunner(config, find_model(config))
