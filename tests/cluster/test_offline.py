"""Offline batches: what fails for one choice ends that choice alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quire import LLM, SamplingParams
from quire_engine.errors import InvalidParameter
from quire_engine.text.output import OutputText


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(str(checkpoint("qwen3")))


def test_an_engine_failure_ends_one_choice(llm: LLM) -> None:
    good = SamplingParams(temperature=0, max_tokens=9)
    impossible = SamplingParams(temperature=0, allowed_token_ids=[5], bad_words=["w5 w5"])
    [alone] = llm.generate("w5 w17", good, use_tqdm=False)
    first, failed, last = llm.generate(["w5 w17"] * 3, [good, impossible, good], use_tqdm=False)
    assert first.outputs == last.outputs == alone.outputs
    [choice] = failed.outputs
    assert choice.finish_reason == "error"
    assert "no token has a finite logit" in str(choice.error)


def test_a_text_that_cannot_be_made_ends_one_choice(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0, max_tokens=9)
    [alone] = llm.generate("w5 w17", params, use_tqdm=False)
    plain, count = OutputText.push, 0

    def push(self: OutputText, token_id: int, is_stop_token: bool = False) -> str:
        nonlocal count
        count += 1
        if count == 2:
            raise ValueError("cannot be decoded")
        return plain(self, token_id, is_stop_token)

    monkeypatch.setattr(OutputText, "push", push)
    outputs = llm.generate(["w5 w17"] * 3, params, use_tqdm=False)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert sorted(reasons) == ["error", "length", "length"]
    assert [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "length"] == [alone.outputs[0]] * 2
    [error] = [o.outputs[0].error for o in outputs if o.outputs[0].error]
    assert "cannot be decoded" in str(error)


def test_more_tokens_than_fit_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameter, match="min_tokens is 600") as wrong:
        llm.generate("w5 w17", SamplingParams(max_tokens=None, min_tokens=600), use_tqdm=False)
    assert wrong.value.parameter == "min_tokens"


def test_a_prompt_is_scored_without_an_output(llm: LLM) -> None:
    [output] = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=0, prompt_logprobs=1, logprobs=1), use_tqdm=False)
    assert sum(len(part.chosen) for part in output.prompt_logprobs or []) == 2
    [choice] = output.outputs
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.logprobs) == ("", [], "length", [])


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([[301]], "token id 301"),
        ([{"prompt": "w5"}], "holds {'prompt': 'w5'}, which is no text and no list of token ids"),
        ([5, "w5"], "token ids and prompts"),
    ],
)
def test_what_is_no_prompt_is_named(llm: LLM, prompts: list[Any], named: str) -> None:
    with pytest.raises(InvalidParameter, match=named):
        llm.generate(prompts, use_tqdm=False)
