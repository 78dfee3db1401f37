"""Reasoning as clients see it: a model whose chat template opens it, closes it, or leaves it to the model."""

import json
from typing import Any

import jsonschema
import openai
import pytest
from conftest import RunningServer
from quire import Client
from web import LIMIT, http

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
ONE_CALL = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}}


def asked(*, thinking: bool | None, budget: int | None = None, **options: Any) -> dict[str, Any]:
    """A request's body."""
    body: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 120, "return_token_ids": True} | options
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    if budget is not None:
        body["thinking_token_budget"] = budget
    return body


def answer(server: RunningServer, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only choice, and the usage."""
    response = http.post(f"{server.url}/v1/chat/completions", json=asked(**options))
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0], body["usage"]


def tokens_of(server: RunningServer, text: str) -> list[int]:
    return http.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]


@pytest.mark.parametrize("budget", [1, 8, 25])
def test_a_budget_ends_reasoning_after_exactly_so_many_tokens(demo: RunningServer, budget: int) -> None:
    free, usage = answer(demo, thinking=True, max_tokens=30)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] == 30
    assert free["finish_reason"] == "length"
    assert free["message"]["content"] == ""
    choice, usage = answer(demo, thinking=True, budget=budget, max_tokens=budget + 20)
    closing = tokens_of(demo, "</think>")
    assert choice["token_ids"][:budget] == free["token_ids"][:budget], "up to there it is what it would be"
    assert choice["token_ids"][budget : budget + len(closing)] == closing
    reasoning = choice["message"].get("reasoning_content", "")  # the first token is whitespace, which is not told
    assert free["message"]["reasoning_content"].startswith(reasoning)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == budget + len(closing)
    assert choice["message"]["content"]
    assert "think>" not in reasoning + choice["message"]["content"]


def test_a_budget_of_nothing_closes_reasoning_at_once(demo: RunningServer) -> None:
    choice, usage = answer(demo, thinking=True, budget=0, max_tokens=20)
    closing = tokens_of(demo, "</think>")
    assert choice["token_ids"][: len(closing)] == closing
    assert "reasoning_content" not in choice["message"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(closing)


@pytest.mark.parametrize("thinking", [False, None], ids=["closed", "left to the model"])
def test_without_reasoning_all_is_content(demo: RunningServer, thinking: bool | None) -> None:
    plain, usage = answer(demo, thinking=thinking, max_tokens=20)
    assert "reasoning_content" not in plain["message"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    budgeted, _ = answer(demo, thinking=thinking, budget=3, max_tokens=20)
    assert budgeted["token_ids"] == plain["token_ids"], "there is nothing that a budget could end"


def test_a_call_that_is_wanted_comes_after_reasoning(demo: RunningServer) -> None:
    choice, usage = answer(demo, thinking=True, budget=8, **ONE_CALL)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] is None
    assert message["reasoning_content"] == message["reasoning"] != ""
    [call] = message["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


@pytest.mark.parametrize("thinking", [True, False, None], ids=["opened", "closed", "left to the model"])
def test_a_structure_is_of_what_follows_reasoning(demo: RunningServer, thinking: bool | None) -> None:
    choice, _ = answer(demo, thinking=thinking, budget=8, **FORMAT)
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert ("reasoning_content" in choice["message"]) == (thinking is True)


def test_stop_strings_do_not_end_reasoning(demo: RunningServer) -> None:
    free, _ = answer(demo, thinking=True, budget=20, max_tokens=60)
    word = free["message"]["reasoning_content"].split()[1]
    stopped, _ = answer(demo, thinking=True, budget=20, max_tokens=60, stop=[f" {word}"])
    assert stopped["message"]["reasoning_content"] == free["message"]["reasoning_content"]
    assert stopped["message"]["content"] == free["message"]["content"].partition(f" {word}")[0]


@pytest.mark.parametrize("options", [{}, ONE_CALL, FORMAT], ids=["text", "call", "structure"])
def test_reasoning_is_streamed_as_it_comes_whole_over_http_and_grpc(
    demo: RunningServer, options: dict[str, Any]
) -> None:
    whole, usage = answer(demo, thinking=True, budget=8, **options)
    message = whole["message"]
    body = asked(thinking=True, budget=8, **options)
    told = {name: body.pop(name) for name in ("chat_template_kwargs", "thinking_token_budget", "return_token_ids")}
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", timeout=LIMIT, max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="demo", **body, extra_body=told, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    kinds = [
        kind
        for delta in deltas
        for kind, value in (
            ("reasoning", (delta.model_extra or {}).get("reasoning_content")),
            ("rest", delta.content or delta.tool_calls),
        )
        if value
    ]
    assert kinds == sorted(kinds), "first reasoning, then the rest"
    assert (
        "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas)
        == (message["reasoning_content"])
    )
    assert "".join(delta.content or "" for delta in deltas) == (message["content"] or "")
    arguments = "".join(call["function"]["arguments"] for call in message.get("tool_calls", []))
    parts = [part.function.arguments for delta in deltas for part in delta.tool_calls or [] if part.function]
    assert "".join(part or "" for part in parts) == arguments

    if "response_format" in body:
        body["structured_outputs"] = {"json": body.pop("response_format")["json_schema"]["schema"]}
    del told["return_token_ids"]
    with Client(demo.grpc) as remote:
        response = remote.chat(**body, **told)
        pieces = list(remote.stream_chat(**body, **told))
    [output] = response.outputs
    assert output.token_ids == whole["token_ids"]
    assert (output.reasoning, output.text) == (message["reasoning_content"], message["content"] or "")
    assert "".join(call.arguments for call in output.tool_calls) == arguments
    assert response.reasoning_tokens == usage["completion_tokens_details"]["reasoning_tokens"]
    assert "".join(piece.reasoning for piece in pieces) == output.reasoning
    assert "".join(piece.text for piece in pieces) == output.text
    assert "".join(call.arguments for piece in pieces for call in piece.tool_calls) == arguments


def test_past_reasoning_that_a_template_does_not_read_changes_nothing(demo: RunningServer) -> None:
    turn = {"role": "assistant", "content": "Sunny."}
    told: list[Any] = []
    for extra in ({}, {"reasoning_content": "Let me see."}, {"reasoning": "Let me see."}):
        messages = [*ASK, turn | extra, {"role": "user", "content": "And in Rome?"}]
        told.append(answer(demo, thinking=False, messages=messages, max_tokens=8)[1]["prompt_tokens"])
    assert len(set(told)) == 1


def test_agents_find_reasoning_where_they_look_for_it(demo: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is looked up on the internet
    import litellm
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    more = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 8}
    whole = litellm.completion(
        model="demo",
        api_base=f"{demo.url}/v1",
        custom_llm_provider="openai",
        api_key="none",
        messages=ASK,
        max_tokens=30,
        temperature=0,
        extra_body=more,
    )
    choice, _ = answer(demo, thinking=True, budget=8, max_tokens=30)
    assert whole.choices[0].message.reasoning_content == choice["message"]["reasoning_content"]
    model = OpenAIChatModel("demo", provider=OpenAIProvider(base_url=f"{demo.url}/v1", api_key="none"))
    agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 30, "extra_body": more})
    parts = agent.run_sync(str(ASK[0]["content"])).all_messages()[-1].parts
    assert [part.part_kind for part in parts] == ["thinking", "text"]
