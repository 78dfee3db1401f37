"""A gateway goes on with answers that another one began: after whichever token, what is read is the same."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conversations import KINDS, Conversation, Told, answered, conversations, prepared
from quire import LLM
from quire_cluster.gateway.generation import Choice, Delta, Emitted, Generation, RequestFacts
from quire_engine.text.output import OutputText

CONVERSATIONS = conversations(2 * len(KINDS), tokens=120)


@pytest.fixture(scope="module")
def llm(talking_folder: Path) -> Iterator[LLM]:
    with LLM(str(talking_folder), kv_cache_memory_bytes=16 << 20) as made:
        torch.set_num_threads(1)  # the matrices are too small for more
        yield made


@pytest.fixture(scope="module")
def answers(llm: LLM) -> list[list[Told]]:
    return answered(llm, CONVERSATIONS)


def beginner(llm: LLM, one: Conversation) -> Callable[[], Generation]:
    """Begins it as a gateway does."""
    output, sampling = prepared(llm, one)
    prompt = output.prompt_token_ids
    facts = RequestFacts("request", prompt, 0, 0.0, b"", time.monotonic())
    samplings = sampling.choices(room=500, seed=one.number)

    def begun() -> Generation:
        texts = [OutputText(llm.tokenizer, sampling.params, prompt, sampling.answer) for _ in samplings]
        return Generation(facts, samplings, texts)

    return begun


def add(told: Told, delta: Delta | None) -> None:
    if delta is None:
        return
    told.tokens += delta.token_ids
    told.content += delta.shown.content
    told.reasoning += delta.shown.reasoning
    for part in delta.shown.calls:
        told.call(part.index, part.name or "", part.arguments)
    told.finish_reason = delta.finish_reason or told.finish_reason


def follow(choice: Choice, tokens: list[int], reason: str, told: Told) -> None:
    """The rest of its tokens come, and then its ending."""
    for token in tokens:
        choice.accept(len(choice.output), token, 0.0)
        add(told, choice.take())
    choice.end("stop" if reason == "tool_calls" else reason)
    add(told, choice.take())


@pytest.mark.parametrize("one", CONVERSATIONS, ids=lambda one: f"{one.number} {one.kind}")
def test_after_whichever_token(llm: LLM, answers: list[list[Told]], one: Conversation) -> None:
    """Names and pieces of calls, reasoning and content that had been held back, too."""
    begun = beginner(llm, one)
    for index, whole in enumerate(answers[one.number]):
        reason = whole.finish_reason or ""
        for cut in range(len(whole.tokens) + 1):
            told, first = Told(scores=whole.scores), begun().choices[index]
            for place, token in enumerate(whole.tokens[:cut]):
                first.accept(place, token, 0.0)
            add(told, first.take())
            generation = begun()
            generation.resume({index: Emitted(whole.tokens[:cut], finished=first.ended)})
            add(told, generation.choices[index].take())
            follow(generation.choices[index], whole.tokens[cut:], reason, told)
            assert told == whole, f"cut at {cut}"


def test_an_answer_that_was_told_whole_is_told_no_more(llm: LLM, answers: list[list[Told]]) -> None:
    for one, answer in zip(CONVERSATIONS, answers, strict=True):
        generation = beginner(llm, one)()
        generation.resume({index: Emitted(whole.tokens, finished=True) for index, whole in enumerate(answer)})
        assert all(choice.ended and choice.take() is None for choice in generation.choices)
