"""What guides answers, paired with all else that there is to ask for, and with all the ways to compute it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import BUDGET, END, Conversation, Told, answered, same
from quire import LLM

GUIDED = (
    "a schema",
    "a schema behind reasoning",
    "calls that have to be",
    "calls as it likes",
    "calls or a schema",
    "reasoning with a budget",
    "tags",
)
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"temperature": 0.0},
    "logprobs": {"logprobs": 2},
    "n": {"n": 3},
    "min_tokens": {"min_tokens": 100},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {END: -3.0}},
    "nucleus": {"top_p": 0.8, "top_k": 50, "min_p": 0.01},
}
PAIRS = [(kind, feature) for kind in GUIDED for feature in FEATURES]


def asked(kind: str, feature: str) -> Conversation:
    return Conversation(number=7 + GUIDED.index(kind), kind=kind, more=FEATURES[feature], tokens=160)


ALL = [asked(*pair) for pair in PAIRS]


def opened(talking_folder: Path, **options: Any) -> LLM:
    made = LLM(str(talking_folder), **({"kv_cache_memory_bytes": 16 << 20, "max_model_len": 512} | options))
    torch.set_num_threads(1)  # the matrices are too small for more
    return made


@pytest.fixture(scope="module")
def plain(talking_folder: Path) -> Iterator[LLM]:
    """One step after the other, and nothing found in a cache."""
    with opened(talking_folder, async_scheduling=False, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(plain: LLM) -> dict[tuple[str, str], list[Told]]:
    """Each by itself."""
    return dict(zip(PAIRS, (answered(plain, [one])[0] for one in ALL), strict=True))


@pytest.fixture(scope="module")
def expected(alone: dict[tuple[str, str], list[Told]]) -> list[list[Told]]:
    return [*alone.values()]


# ---- with what else is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GUIDED)
def test_each_pair_is_what_was_asked_for(alone: dict[tuple[str, str], list[Told]], kind: str) -> None:
    for feature in FEATURES:
        asked(kind, feature).check(alone[kind, feature])


def test_there_is_something_of_everything(expected: list[list[Told]]) -> None:
    told = [one for answer in expected for one in answer]
    assert {one.finish_reason for one in told} == {"stop", "tool_calls", "length"}
    for part in ("content", "reasoning", "calls"):
        assert sum(bool(getattr(one, part)) for one in told) > 10


@pytest.mark.parametrize("kind", GUIDED)
def test_scores_change_nothing(alone: dict[tuple[str, str], list[Told]], kind: str) -> None:
    [scored] = alone[kind, "logprobs"]
    assert [replace(scored, scores=[])] == alone[kind, "nothing"]
    assert len(scored.scores) == len(scored.tokens)
    assert max(scored.scores) <= 0


@pytest.mark.parametrize("kind", GUIDED)
def test_one_of_several_answers_is_the_one_of_its_seed(
    plain: LLM, alone: dict[tuple[str, str], list[Told]], kind: str
) -> None:
    one = asked(kind, "nothing")
    for index, choice in enumerate(alone[kind, "n"]):
        assert answered(plain, [one], seed=one.number + index) == [[choice]]
    assert len({tuple(choice.tokens) for choice in alone[kind, "n"]}) == 3


@pytest.mark.parametrize("kind", GUIDED)
def test_parameters_that_change_logits_change_the_answer(alone: dict[tuple[str, str], list[Told]], kind: str) -> None:
    for feature in ("greedy", "penalties", "nucleus"):
        assert alone[kind, feature][0].tokens != alone[kind, "nothing"][0].tokens


@pytest.mark.parametrize("kind", GUIDED)
def test_an_answer_has_as_many_tokens_as_it_must(alone: dict[tuple[str, str], list[Told]], kind: str) -> None:
    """Or more; whatever ended it would have been a token beyond them."""
    [one] = alone[kind, "min_tokens"]
    assert len(one.tokens) > 100 or one.finish_reason == "length"


@pytest.mark.parametrize("kind", GUIDED)
def test_a_stop_string_ends_content_and_nothing_else(
    plain: LLM, alone: dict[tuple[str, str], list[Told]], kind: str
) -> None:
    """Also where it stands in reasoning or in arguments, which have more letters of each sort than the content."""
    [whole] = alone[kind, "nothing"]
    texts = (whole.content, whole.reasoning, "".join(arguments for _, arguments in whole.calls))
    stops = [text[len(text) // 2 :][:2] for text in texts if text]
    for stop in stops:
        [[cut]] = answered(plain, [asked(kind, "nothing")], stop=stop)
        place = whole.content.find(stop)
        if place < 0:
            assert cut == whole
            continue
        assert cut.content == whole.content[:place]
        assert whole.reasoning.startswith(cut.reasoning)
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert cut.calls == whole.calls[: len(cut.calls)]


def test_reasoning_that_is_taken_up_again_has_what_is_left_of_its_budget(plain: LLM) -> None:
    """None where it is used up: it is ended at once."""
    wants = {"likely": {"<think>": 5.0, "</s>": -100.0}, "n": 6}
    opener, closer = plain.tokenizer.delimiters["<think>"], plain.tokenizer.delimiters["</think>"]
    [told] = answered(plain, [Conversation(number=3, kind="reasoning with a budget", more=wants, tokens=160)])
    assert sum(one.tokens.count(opener) for one in told) > 12
    for one in told:
        inside, thought = True, 0
        for token in one.tokens:
            thought += inside and token != closer
            inside = (inside or token == opener) and token != closer
        assert 0 < thought <= BUDGET


# ---- however it is computed -----------------------------------------------------------------------------------------


def test_beside_each_other_and_with_steps_that_overlap(talking_folder: Path, expected: list[list[Told]]) -> None:
    with opened(talking_folder) as llm:
        same(answered(llm, ALL), expected)
        found = llm.engine.scheduler.stats.prefix_hits
        same(answered(llm, ALL), expected)
        assert llm.engine.scheduler.stats.prefix_hits > found, "prompts are found in the prefix cache"


def test_in_parts_and_under_pressure(talking_folder: Path, expected: list[list[Told]]) -> None:
    """Prompts in parts of 24 tokens, and too few pages for what runs."""
    page = 3 * 2 * 2 * 16 * 32 * 4
    with opened(talking_folder, max_num_batched_tokens=24, max_model_len=256, kv_cache_memory_bytes=40 * page) as llm:
        same(answered(llm, ALL), expected)
        assert llm.engine.scheduler.stats.preemptions > 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_by_two_ranks(talking_folder: Path, expected: list[list[Told]], ranks: str) -> None:
    with opened(talking_folder, **{ranks: 2}) as llm:
        same(answered(llm, ALL), expected)
