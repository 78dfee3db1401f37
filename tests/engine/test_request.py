"""What an engine refuses whoever asks, for the sake of what else is in the step."""

import math
from typing import Any

import pytest
from quire_engine.config import SchedulerLimits
from quire_engine.errors import InvalidParameter
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.scheduler import Scheduler

VOCABULARY = 300
LIMITS = SchedulerLimits(
    vocab_size=VOCABULARY,
    num_pages=8,
    block_size=16,
    max_model_len=99,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_num_queued_reqs=8,
)


@pytest.mark.parametrize(
    ("tokens", "num_prompt"),
    [([], 0), ([5], 0), ([5], 2), ([5, -1], 2), ([VOCABULARY], 1), ([5, VOCABULARY], 1), ([5, 2**31], 1)],
)
def test_logs_that_no_step_can_compute(tokens: list[int], num_prompt: int) -> None:
    """A prompt, or what an earlier replica is said to have drawn."""
    scheduler = Scheduler(LIMITS)
    with pytest.raises(InvalidParameter):
        scheduler.add(Request(1, tokens, num_prompt, EngineSampling(), resumed=True))
    assert not scheduler.has_work


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": math.nan},
        {"temperature": -1.0},
        {"top_p": math.nan},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"presence_penalty": math.inf},
        {"frequency_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"logit_bias": {VOCABULARY: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {5: math.nan}},
        {"allowed_token_ids": TokenSet.of((5, VOCABULARY))},
        {"bad_words": ((5,), ())},
    ],
    ids=str,
)
def test_parameters_that_would_harm_a_step(asked: dict[str, Any]) -> None:
    scheduler = Scheduler(LIMITS)
    with pytest.raises(InvalidParameter) as refused:
        scheduler.add(Request(1, [5], 1, EngineSampling(**asked)))
    assert refused.value.parameter == next(iter(asked))
    assert not scheduler.has_work


def test_what_the_bounds_still_hold_is_taken() -> None:
    scheduler = Scheduler(LIMITS)
    for number, asked in enumerate(
        (
            {"temperature": 0.0, "top_p": 0.0, "min_p": 1.0, "repetition_penalty": 0.01},
            {"repetition_penalty": 100.0, "logprobs": 20, "prompt_logprobs": 0},
            {"allowed_token_ids": TokenSet.of((0, VOCABULARY - 1)), "stop_token_ids": (2**31,), "min_tokens": 3},
        )
    ):
        params: dict[str, Any] = asked
        scheduler.add(Request(number, [0, VOCABULARY - 1], 2, EngineSampling(**params)))
    assert scheduler.num_waiting == 3
