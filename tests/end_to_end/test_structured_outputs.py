"""Structured outputs over HTTP: what comes is what was asked for, streamed as whole; the openai SDK's own parsing."""

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import jsonschema
import openai
import pytest
from conftest import RunningServer
from pydantic import BaseModel, ConfigDict
from web import LIMIT, http

PROPERTIES = {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": ["colour", "n"],
    "additionalProperties": False,
}
CHOICES = ("no", "é\n", "n\u2028\x85o\u2029s")  # of what some readers of streams end lines at
KINDS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "regex": ({"regex": "[ab]{2,6}c"}, lambda text: re.fullmatch("[ab]{2,6}c", text) is not None),
    "choice": ({"choice": [*CHOICES]}, lambda text: text in CHOICES),
    "grammar": ({"grammar": 'root ::= "a" [0-9]{1,2}'}, lambda text: re.fullmatch("a[0-9]{1,2}", text) is not None),
    "structural_tag": (
        {
            "structural_tag": {
                "type": "structural_tag",
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["a"],
                    "tags": [{"begin": "a=", "content": {"type": "regex", "pattern": "[0-9]"}, "end": ";"}],
                    "stop_after_first": True,
                },
            }
        },
        lambda text: re.fullmatch("[^a]*a=[0-9];", text, re.DOTALL) is not None,
    ),
}


UNTHINKING = {"chat_template_kwargs": {"thinking": "closed"}}


@pytest.fixture
def client(talker: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{talker.url}/v1", api_key="none", max_retries=0, timeout=LIMIT)


def ask(talker: RunningServer, route: str, **body: Any) -> Any:
    """The text of a route, the reason why it ends, and how many tokens it has."""
    chat = {"messages": [{"role": "user", "content": "the"}], **UNTHINKING}
    about = {"prompt": "the"} if route == "completions" else chat
    given = {"model": "talker", "max_tokens": 150, "seed": 1} | about | body
    answer = http.post(f"{talker.url}/v1/{route}", json=given)
    assert answer.status_code == 200, answer.text
    if not given.get("stream"):
        choice = answer.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"]
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(one["text"] if "text" in one else one["delta"].get("content") or "" for one in choices)
    return text, next(one["finish_reason"] for one in choices if one["finish_reason"])


def brief(kind: str) -> dict[str, Any]:
    """Little space, so that an end is reached; letters of the tag alone."""
    if kind == "structural_tag":
        return {"allowed_token_ids": [*range(1, 128)], "logit_bias": {"66": 6.0}}
    return {"bad_words": ["\t", "\r"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_an_output_is_what_was_asked_for_streamed_as_whole(talker: RunningServer, route: str, kind: str) -> None:
    structure, is_right = KINDS[kind]
    ended = 0
    for seed in range(6):
        asked = {"structured_outputs": structure, "seed": seed} | brief(kind)
        text, reason = ask(talker, route, **asked)
        assert ask(talker, route, **asked, stream=True) == (text, reason)
        if reason == "stop":
            ended += 1
            assert is_right(text if route == "completions" else text.lstrip()), text
    assert ended, "none came to its end"


@pytest.mark.parametrize("strict", [True, False, None])
def test_the_response_format_of_a_schema(talker: RunningServer, strict: bool | None) -> None:
    form = {"name": "a", "description": "b", "schema": SCHEMA} | ({} if strict is None else {"strict": strict})
    wanted = {"type": "json_schema", "json_schema": form}
    texts = [ask(talker, "chat/completions", response_format=wanted, seed=n, **brief("json")) for n in range(8)]
    whole = [text for text, reason in texts if reason == "stop"]
    assert whole
    for text in whole:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_what_cannot_be_held_is_left_out_of_a_schema_that_is_not_strict(talker: RunningServer) -> None:
    schema = SCHEMA | {
        "properties": PROPERTIES
        | {"code": {"enum": ["abc"], "pattern": "^(?=a)"}, "at": {"const": 7, "maximum": 2**63 - 1}},
        "required": ["colour", "n", "code", "at"],
        "uniqueItems": True,
    }
    answers = [
        ask(
            talker,
            "chat/completions",
            response_format={"type": "json_schema", "json_schema": {"schema": schema, "strict": False}},
            seed=seed,
            **brief("json"),
        )
        for seed in range(8)
    ]
    whole = [text for text, reason in answers if reason == "stop"]
    assert whole
    for text in whole:
        jsonschema.validate(json.loads(text), schema)


def test_the_response_format_of_any_object(talker: RunningServer) -> None:
    texts = [
        ask(talker, "chat/completions", response_format={"type": "json_object"}, seed=seed, **brief("json"))
        for seed in range(8)
    ]
    whole = [text for text, reason in texts if reason == "stop"]
    assert whole
    assert all(isinstance(json.loads(text), dict) for text in whole)


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["add", "take"]
    by: int | None


class Plan(BaseModel):
    model_config = ConfigDict(extra="forbid")

    first: Step
    done: bool


def test_the_sdk_parses_into_a_model(client: openai.OpenAI) -> None:
    found = []
    for seed in range(8):
        with contextlib.suppress(openai.LengthFinishReasonError):
            parsed = client.chat.completions.parse(
                model="talker",
                messages=[{"role": "user", "content": "the"}],
                response_format=Plan,
                max_tokens=200,
                seed=seed,
                extra_body=brief("json") | UNTHINKING,
            )
            found.append(parsed.choices[0].message.parsed)
    assert found, "none came to its end"
    assert all(isinstance(one, Plan) for one in found)


def test_choices_draw_for_themselves(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="talker", prompt="the", n=6, seed=5, logprobs=2, extra_body={"structured_outputs": {"regex": "[a-z]{5}"}}
    )
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch("[a-z]{5}", text) for text in texts)
    assert len(set(texts)) > 1


BAD = [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": {"uniqueItems": True}}}},
        "uniqueItems",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "text"}}}}, "text"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"multipleOf": 1000003}}}}, "multipleOf"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "json_schema"),
    ({"structured_outputs": {"json": {"if": {}}}}, "if"),
    ({"structured_outputs": {"json": {"$ref": "#"}}}, "grammar"),
    ({"structured_outputs": {"grammar": "start: start"}}, "it allows no output"),
    ({"structured_outputs": {"json": "{"}}, "JSON"),
    ({"structured_outputs": {"regex": "("}}, "regex"),
    ({"structured_outputs": {"choice": []}}, "choice"),
    ({"structured_outputs": {"grammar": "start: other"}}, "other"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "regex and choice"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {"type": "object"}}, "structured_outputs"),
    ({"guided_regex": "a"}, "structured_outputs"),
    (
        {"structured_outputs": {"json": {"type": "object", "properties": {f"p{n}": {} for n in range(2600)}}}},
        "properties",
    ),
]


@pytest.mark.parametrize(("body", "named"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_held_is_refused_by_name(
    talker: RunningServer, body: dict[str, Any], named: str, stream: bool
) -> None:
    given = {"model": "talker", "messages": [{"role": "user", "content": "the"}], "stream": stream} | body
    answer = http.post(f"{talker.url}/v1/chat/completions", json=given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
