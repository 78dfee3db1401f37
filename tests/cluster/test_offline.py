"""Offline batches: what fails for one choice ends that choice alone."""

import gc
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import processes, wait_until
from drafters import speculation, told
from quire import LLM, SamplingParams
from quire_engine.errors import EngineFailure, InvalidParameter
from quire_engine.request import EngineSampling, Request
from quire_engine.step import StepPlan
from quire_engine.text.output import OutputText


@pytest.fixture(scope="module")
def llm(checkpoint: Callable[[str], Path]) -> LLM:
    return LLM(str(checkpoint("qwen3")))


def test_several_tokens_of_a_step(checkpoint: Callable[[str], Path]) -> None:
    """Behind drafts: texts, endings and log-probabilities are those of one token a step."""
    prompts = ["w5 w17", "w5 w6 w7 w5 w6 w7", "w9"]
    end = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    plain = LLM(str(checkpoint("qwen3")))
    whole = [output.outputs[0] for output in plain.generate(prompts, end, use_tqdm=False)]
    known, text = [one.token_ids for one in whole], whole[0].text
    asked = [
        end,
        replace(end, stop=[text[len(text) // 2 :][:3]]),
        replace(end, stop_token_ids=[known[0][5], known[1][9]]),
    ]
    drafted = LLM(str(checkpoint("qwen3")), speculative_config={"num_speculative_tokens": 5})
    encoded = [plain.tokenizer.encode(prompt) for prompt in prompts]
    for params in asked:
        drafted.engine.scheduler.speculation = speculation(told(encoded, known, wrong=0.1), 5)
        ours, theirs = (llm.generate(prompts, params, use_tqdm=False) for llm in (drafted, plain))
        for got, expected in zip(ours, theirs, strict=True):
            [one], [other] = got.outputs, expected.outputs
            assert (one.text, one.token_ids, one.finish_reason, one.stop_reason) == (
                other.text,
                other.token_ids,
                other.finish_reason,
                other.stop_reason,
            )
            assert one.logprobs is not None
            assert len(one.logprobs) == len(one.token_ids)
    assert drafted.engine.scheduler.stats.accepted_tokens > 20
    for llm in (plain, drafted):
        llm.close()


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("logprobs", "n", "max_tokens", "top_k", "seed") for value in (True, 1.5, "1")),
        *(("temperature", value) for value in (None, "1", True)),
        *(("stop", value) for value in (5, [5], b"x")),
        *(("bad_words", value) for value in ("w5 w6", [5])),
        *((name, value) for name in ("stop_token_ids", "allowed_token_ids") for value in (5, "ab", [1.5], [True])),
        *(("logit_bias", value) for value in ([1], {"5": 1.0}, {5: "x"}, {5.5: 1.0})),
    ],
)
def test_values_of_another_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=f"{name} is .* it must be") as wrong:
        SamplingParams(**{name: value})
    assert wrong.value.parameter == name


def test_a_clock_that_is_set_forward_ends_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left until a deadline is measured by a clock that nobody sets."""
    request = Request(10**6, [5, 6, 7], 3, EngineSampling(max_tokens=4, temperature=0.0))
    request.arrival, request.deadline = time.monotonic(), time.monotonic() + 3600
    monkeypatch.setattr(time, "time", lambda: 4e9)
    engine = llm.engine
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert (request.finish_reason, request.error) == ("length", None)


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


GREEDY = SamplingParams(temperature=0, max_tokens=9)


def tokens(llm: LLM, prompts: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_prompts_may_come_one_after_the_other(llm: LLM) -> None:
    listed = ["w5 w17", "w9"]
    assert tokens(llm, (prompt for prompt in listed)) == tokens(llm, tuple(listed)) == tokens(llm, listed)
    each = (GREEDY for _ in listed)
    assert [o.prompt for o in llm.generate(listed, each, use_tqdm=False)] == listed


@pytest.mark.parametrize(
    "prompts", [None, 5, b"w5", {"prompt": "w5"}, [{"prompt": "w5"}], [[True]], [["w5"]], "\ud800"]
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidParameter, match="prompts"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("params", [{"temperature": 0}, [], [None], 5])
def test_what_is_no_sampling_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidParameter, match="sampling_params"):
        llm.generate("w5", params, use_tqdm=False)


@pytest.mark.parametrize("messages", ["w5", ["w5"], [["w5"]], 5])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidParameter, match="messages"):
        llm.chat(messages, use_tqdm=False)


def test_threads_wait_for_each_other(llm: LLM) -> None:
    prompts = [["w5 w17", "w9"], ["w6"], ["w7 w8 w9"], ["w10"]]
    alone = [tokens(llm, some) for some in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda some: tokens(llm, some), prompts * 3)) == alone * 3


class Interrupting:
    """Sends Ctrl-C in the middle of the third step, once it was scheduled and before it was handed over."""

    def __init__(self, executor: Any, times: int) -> None:
        self._executor, self._times, self._steps = executor, times, 0
        self.limits, self.collect, self.close = executor.limits, executor.collect, executor.close

    def submit(self, plan: StepPlan) -> None:
        self._steps += 1
        if self._steps == 3:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)
        self._executor.submit(plan)


def test_an_interrupt_ends_a_batch_between_two_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm, "w5 w17")
    monkeypatch.setattr(llm.engine, "_executor", Interrupting(llm.engine._executor, 1))
    with pytest.raises(KeyboardInterrupt):
        tokens(llm, ["w5 w17"] * 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert tokens(llm, "w5 w17") == expected
    llm.engine.scheduler.check_integrity()


def test_who_interrupts_twice_does_not_wait(checkpoint: Callable[[str], Path]) -> None:
    impatient = LLM(checkpoint("qwen3"), kv_cache_memory_bytes=4 << 20)
    impatient.engine._executor = Interrupting(impatient.engine._executor, 2)
    with pytest.raises(KeyboardInterrupt):
        tokens(impatient, "w5 w17")
    with pytest.raises(EngineFailure, match=r"a step failed \(KeyboardInterrupt.*open another"):
        tokens(impatient, "w5 w17")


@pytest.mark.slow  # five processes start
def test_workers_end_with_their_llm(checkpoint: Callable[[str], Path]) -> None:
    """Two beside each other, one closed twice, the other forgotten."""
    options: dict[str, Any] = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 4 << 20, "cpu_threads": 1}
    mine = processes(os.getpid(), "Worker")
    first, second = (LLM(checkpoint("qwen3"), **options) for _ in range(2))
    expected = tokens(first, "w5 w17")
    first.close()
    first.close()
    with pytest.raises(EngineFailure, match="it is closed; open another"):
        tokens(first, "w5 w17")
    assert tokens(second, "w5 w17") == expected
    wait_until(lambda: len(processes(os.getpid(), "Worker")) == len(mine) + 2)
    del second
    gc.collect()
    wait_until(lambda: processes(os.getpid(), "Worker") == mine)
