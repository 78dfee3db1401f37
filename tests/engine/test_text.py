"""Texts in and out: incremental detokenization and stop strings, against doing it all at once."""

import math
from typing import Any

import pytest
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import InvalidParameter
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import resolve

TEXTS = [
    "The capital of France is Paris.",
    "naïve café — “quoted” … 你好，世界 🌍🏳️‍🌈 e\u0301",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}\n\n\n",
    "   leading and trailing   ",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve(DEMO_MODEL))


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
    pieces = [stream.step(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens) == text
    assert "\ufffd" not in "".join(pieces), "no half character is shown"


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a 🌍")[:-1]
    stream = tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
    text = "".join(stream.step(token) for token in tokens) + stream.flush()
    assert text == tokenizer.decode(tokens)
    assert text.endswith("\ufffd")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|im_start|><|im_end|>hi")
    for skip, expected in ((True, "hi"), (False, "<|im_start|><|im_end|>hi")):
        for spaces in (True, False):
            stream = tokenizer.stream(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
            assert "".join(stream.step(token) for token in tokens) + stream.flush() == expected


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(InvalidParameter):
        tokenizer.render([{"content": "no role"}, {"x": 1}], add_generation_prompt=True, continue_final_message=False)


def test_params_name_what_is_wrong() -> None:
    with pytest.raises(InvalidParameter) as wrong:
        SamplingParams(temperature=float("inf"))
    assert wrong.value.parameter == "temperature"
    with pytest.raises(InvalidParameter, match="at most 64"):
        SamplingParams(stop=["x"] * 65)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"],
)
def test_no_number_is_none(name: str, value: float) -> None:
    """JSON has no such numbers, but gRPC and Python do."""
    asked: dict[str, Any] = {name: {5: value} if name == "logit_bias" else value}
    with pytest.raises(InvalidParameter) as refused:
        SamplingParams(**asked)
    assert refused.value.parameter == name
