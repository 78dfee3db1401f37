"""A model that guesses for another changes no token, and one that guesses for itself is always right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drafters import Everything
from layouts import Tensors, rewritten
from quire_engine.config import EngineConfig, SpeculativeConfig
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.speculation import Speculation
from quire_engine.speculation.workers import WorkersDrafter
from quire_engine.weights.resolve import find_model
from test_speculation import FEATURES, PROMPTS, Model, requests, run

Make = Callable[[str], Path]
UNEDITED = [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}]


def with_draft(folder: Path, draft: Path, **options: Any) -> Model:
    return Model(folder, speculative_config=json.dumps({"model": str(draft), "num_speculative_tokens": 4}), **options)


def forgetting(model: Model) -> Model:
    """Nothing that a draft model or head has read is there any more, and whatever reads it all the same sees NaN."""
    drafting = model.runner._drafting
    assert drafting is not None
    for cache in drafting._caches:
        for part in cache:
            part.fill_(float("nan"))
    return model


def guessing(model: Model, most: int = 4, **limits: Any) -> Engine:
    return forgetting(model).engine(Speculation(WorkersDrafter(), Everything(), most), **limits)


def judged(engine: Engine) -> tuple[int, int]:
    """Drafts, and how many were accepted."""
    stats = engine.scheduler.stats
    return stats.draft_tokens, stats.accepted_tokens


@pytest.fixture(scope="module")
def itself(checkpoint: Make) -> Model:
    return with_draft(checkpoint("llama"), checkpoint("llama"), deterministic=True)


@pytest.fixture(scope="module")
def other(checkpoint: Make) -> Model:
    return with_draft(checkpoint("llama"), checkpoint("qwen3"), deterministic=True)


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_num_batched_tokens": 13}, {"num_pages": 9, "max_num_seqs": 4}, {"steps_in_flight": 1}],
    ids=["plain", "chunked", "short of pages", "one step in flight"],
)
def test_a_model_knows_itself(itself: Model, limits: dict[str, Any]) -> None:
    """It guesses by the sampler's random numbers: what is drawn at random is guessed as well. Prompts in pieces, found
    prefixes and preempted requests leave no gap in its cache."""
    plain = run(itself.engine(), requests(UNEDITED))
    engine = guessing(itself, **limits)
    assert run(engine, requests(UNEDITED)) == plain
    if "num_pages" in limits:
        assert engine.scheduler.stats.preemptions > 0
    drafts, accepted = judged(engine)
    assert accepted == drafts > 50


class Seldom(Everything):
    """In place of `Value`: many steps without drafts, then some with."""

    steps = 0

    def possible(self, rows: int, certain: int) -> bool:
        self.steps += 1
        return self.steps % 24 > 18


@pytest.mark.parametrize("budget", [48, 13])
def test_it_reads_later_what_it_was_not_asked_about(itself: Model, budget: int) -> None:
    """And where it lacks more than a step can read, piece by piece."""
    asked = [sampled | {"max_tokens": 70} for sampled in UNEDITED]
    plain = run(itself.engine(), requests(asked, PROMPTS[:2]))
    engine = forgetting(itself).engine(Speculation(WorkersDrafter(), Seldom(), 4), max_num_batched_tokens=budget)
    assert run(engine, requests(asked, PROMPTS[:2])) == plain
    drafts, accepted = judged(engine)
    assert accepted == drafts > 20


class Told(Everything):
    """In place of `Value`: all drafts, where it is told to."""

    def __init__(self, asked: bool) -> None:
        super().__init__()
        self.asked = asked

    def possible(self, rows: int, certain: int) -> bool:
        return self.asked


@pytest.mark.parametrize("asked_at_first", [True, False])
def test_a_conversation_goes_on(itself: Model, asked_at_first: bool) -> None:
    """Pages of an answer that are found again were read if something was guessed in them, and are read if not."""
    policy = Told(asked_at_first)
    engine = forgetting(itself).engine(Speculation(WorkersDrafter(), policy, 4))
    log = list(range(40, 60))
    for turn in range(3):
        request = Request(turn, list(log), len(log), EngineSampling(temperature=0.0, max_tokens=24))
        engine.add(request)
        while engine.has_work:
            engine.step()
        log = [*request.tokens, 5, 6, 7]
        policy.asked = True
    assert engine.scheduler.stats.prefix_hits > 40
    drafts, accepted = judged(engine)
    assert accepted == drafts > 20


def test_what_it_does_not_know(itself: Model) -> None:
    """Penalties are the sampler's: guesses know nothing of them, and some are wrong."""
    plain = run(itself.engine(), requests([FEATURES["penalties"]]))
    engine = guessing(itself)
    assert run(engine, requests([FEATURES["penalties"]])) == plain
    drafts, accepted = judged(engine)
    assert 0 < accepted < drafts


@pytest.mark.parametrize("feature", FEATURES)
def test_another_model_changes_nothing(other: Model, feature: str) -> None:
    asked = [FEATURES[feature]]
    plain = run(other.engine(), requests(asked))
    engine = guessing(other)
    assert run(engine, requests(asked)) == plain
    drafts, accepted = judged(engine)
    assert accepted < drafts or feature == "short"


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "gemma3", "deepseek_v3"])
def test_beside_other_families(checkpoint: Make, family: str) -> None:
    model = with_draft(checkpoint(family), checkpoint("llama"))
    asked = [{"temperature": 0.0}]
    engine = guessing(model)
    assert [seen[:2] for seen in run(engine, requests(asked))] == [
        seen[:2] for seen in run(model.engine(), requests(asked))
    ]
    assert judged(engine)[0] > 50


def test_some_requests_in_their_own_time(itself: Model) -> None:
    """A request that comes while others are guessed for is guessed for as they are."""
    asked = requests([{"temperature": 0.8}])
    plain = run(itself.engine(), requests([{"temperature": 0.8}]))
    engine = guessing(itself)
    for request in asked:
        engine.add(request)
        engine.step()
        engine.step()
    while engine.has_work:
        engine.step()
    assert [request.tokens[request.num_prompt :] for request in asked] == [tokens for tokens, _, _ in plain]
    drafts, accepted = judged(engine)
    assert accepted == drafts > 50


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "draft_model"}, "no model is given"),
        ({"method": "ngram", "model": "x"}, "takes no model"),
        ({"revision": "x"}, "no model"),
        ({"method": "medusa"}, "one of auto, suffix"),
    ],
)
def test_refused_at_once(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        SpeculativeConfig.read(json.dumps(given))


@pytest.mark.parametrize(
    ("draft", "said"),
    [("qwen3_5", "recurrent states"), ("gpt2", "a context of 64 tokens"), ("", "no model at")],
)
def test_refused_when_it_is_seen(checkpoint: Make, tmp_path: Path, draft: str, said: str) -> None:
    if draft:
        known = json.loads((checkpoint(draft) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(known | {"n_positions": 64}))
    folder = str(tmp_path) if draft else "/nowhere"
    config = EngineConfig(
        model=str(checkpoint("llama")), device="cpu", speculative_config=json.dumps({"model": folder})
    )
    with pytest.raises(InvalidParameter, match=said):
        ModelRunner(config, find_model(config))


@pytest.mark.parametrize(
    "text", ["{", '{"architectures": ["FooForCausalLM"]}', None], ids=["no JSON", "unknown", "empty"]
)
def test_what_is_wrong_with_it_is_not_said_of_the_model(checkpoint: Make, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    speculative = json.dumps({"model": str(tmp_path)})
    config = EngineConfig(model=str(checkpoint("llama")), device="cpu", speculative_config=speculative)
    with pytest.raises(InvalidParameter, match=r"^speculative_config: of the model '/"):
        ModelRunner(config, find_model(config))


def test_another_tokenizer_is_refused(checkpoint: Make, byte_level_folder: Path) -> None:
    speculative = json.dumps({"model": str(byte_level_folder)})
    config = EngineConfig(model=str(checkpoint("llama")), device="cpu", speculative_config=speculative)
    with pytest.raises(InvalidParameter, match="has another tokenizer"):
        ModelRunner(config, find_model(config))


@pytest.mark.parametrize("stored", ["as the head alone", "with another head"])
def test_tied_weights_are_read_as_a_model_s(checkpoint: Make, tmp_path: Path, stored: str) -> None:
    """A config that ties the output head to the embeddings, and a checkpoint that says otherwise."""

    def other(tensors: Tensors) -> Tensors:
        embedding = tensors.pop("model.embed_tokens.weight")
        if stored == "as the head alone":
            return tensors | {"lm_head.weight": embedding}
        return tensors | {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.flip(0).contiguous()}

    folder = rewritten(checkpoint("qwen2"), tmp_path / "tied", other, tie_word_embeddings=True)
    model = with_draft(folder, folder)
    engine = guessing(model)
    run(engine, requests([{"temperature": 0.0}]))
    drafts, accepted = judged(engine)
    assert accepted == drafts > 50
