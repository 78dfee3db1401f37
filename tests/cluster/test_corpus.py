"""The real model under grammars at temperature 1: whatever it finishes is what was asked for."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from quire import LLM, SamplingParams
from schema_corpus import CORPUS
from test_schema_corpus import faults_of

NAMES = sorted(CORPUS)
TOKENS = 120
REGEXES = (
    r"[A-Z][a-z]{2,9}(, [A-Z][a-z]{2,9}){0,3}",
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no|maybe)[.!]?",
    r"[a-z]+@[a-z]+\.(com|org)",
)
SUMS = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/'


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=512) as opened:
        yield opened


def written(llm: LLM, structures: list[dict[str, Any]]) -> list[str | None]:
    """What comes of each; None where it was cut off."""
    prompt = "Write one short example.\n"
    params = [
        SamplingParams(temperature=1.0, seed=number, max_tokens=TOKENS, structured_outputs=structure)
        for number, structure in enumerate(structures)
    ]
    outputs = [output.outputs[0] for output in llm.generate([prompt] * len(params), params, use_tqdm=False)]
    assert {one.finish_reason for one in outputs} <= {"stop", "length"}, [one.error for one in outputs if one.error]
    return [one.text if one.finish_reason == "stop" else None for one in outputs]


def check(llm: LLM, names: list[str]) -> int:
    """How many were finished."""
    texts = written(llm, [{"json": CORPUS[name]} for name in names])
    finished = {name: text for name, text in zip(names, texts, strict=True) if text is not None}
    wrong = {name: (text, faults) for name, text in finished.items() if (faults := faults_of(CORPUS[name], text))}
    assert wrong == {}
    return len(finished)


def test_json_follows_its_schema(llm: LLM) -> None:
    assert check(llm, NAMES[::40]) > len(NAMES[::40]) / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_json_follows_every_schema_of_the_corpus(llm: LLM) -> None:
    assert check(llm, NAMES) > len(NAMES) / 2


def test_texts_match_their_regular_expressions(llm: LLM) -> None:
    wanted = [regex for regex in REGEXES for _ in range(2)]
    texts = written(llm, [{"regex": regex} for regex in wanted])
    assert sum(text is not None for text in texts) > 4
    for regex, text in zip(wanted, texts, strict=True):
        assert text is None or re.fullmatch(regex, text)


def test_sentences_are_of_their_grammar(llm: LLM) -> None:
    texts = written(llm, [{"grammar": SUMS}] * 3)
    for text in texts:
        if text is not None:
            assert re.fullmatch(r"[0-9+()]+", text)
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


def test_any_object_is_one(llm: LLM) -> None:
    for text in written(llm, [{"json_object": True}] * 3):
        assert text is None or isinstance(json.loads(text), dict)
