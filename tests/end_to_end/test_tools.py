"""Tools and structured outputs through the openai SDK as it is. What a small model says is not to be relied on, so what
is tested is the form: forced, or the same again by a seed."""

import asyncio
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import openai
import pytest
from conftest import RunningServer
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field
from web import LIMIT, http

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """The weather of some days in a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


class Stars(BaseModel):
    """What stands in the sky."""

    north: bool


WEATHER = openai.pydantic_function_tool(Weather, name="get_weather")
STARS = openai.pydantic_function_tool(Stars, name="get_stars")
NAMED = {"type": "function", "function": {"name": "get_stars"}}
CALLED = {"model": "demo", "messages": ASK, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def client(demo: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=LIMIT) as made:
        yield made


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Step(BaseModel):
    colour: Colour
    minutes: int = Field(ge=0, le=60)


class Plan(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=2)
    note: Literal["short", "long"] | None
    sure: bool


class Tree(BaseModel):
    leaf: Literal[1, 2]
    below: list["Tree"] = Field(max_length=1)


def test_a_nested_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "Plan a tea."}],
        response_format=Plan,
        max_tokens=300,
        seed=1,
    )
    plan = answer.choices[0].message.parsed
    assert plan is not None
    assert 1 <= len(plan.steps) <= 2
    assert answer.choices[0].finish_reason == "stop"


def test_a_model_that_refers_to_itself_is_parsed_as_deep_as_it_goes(demo: RunningServer, client: openai.OpenAI) -> None:
    [ends] = http.post(f"{demo.url}/tokenize", json={"prompt": "]", "add_special_tokens": False}).json()["tokens"]
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="demo",
            messages=[{"role": "user", "content": "A tree."}],
            response_format=Tree,
            max_tokens=300,
            seed=seed,
            logit_bias={str(ends): 10},  # else a small model goes on for ever
        )
        assert answer.choices[0].message.parsed is not None


def test_tools_are_called_as_tool_choice_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": ASK, "tools": [WEATHER, STARS], "max_tokens": 300, "seed": 5}
    required = client.chat.completions.parse(**asked, tool_choice="required").choices[0]
    assert required.finish_reason == "tool_calls"
    assert required.message.content is None
    assert required.message.tool_calls
    assert len({call.id for call in required.message.tool_calls}) == len(required.message.tool_calls)
    for call in required.message.tool_calls:
        assert isinstance(call.function.parsed_arguments, Weather if call.function.name == "get_weather" else Stars)
    named = client.chat.completions.parse(**asked, tool_choice=NAMED).choices[0]
    assert [call.function.name for call in named.message.tool_calls or []] == ["get_stars"]
    assert named.finish_reason == "tool_calls"
    asked["max_tokens"] = 24
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    assert none.message.content
    auto = client.chat.completions.create(**asked, tool_choice="auto").choices[0]
    left_out = client.chat.completions.create(**asked).choices[0]
    assert (auto.message.content, auto.finish_reason) == (left_out.message.content, left_out.finish_reason)


@pytest.mark.parametrize("seed", range(3))
def test_without_parallel_calls_there_is_one(client: openai.OpenAI, seed: int) -> None:
    message = client.chat.completions.create(**CALLED, max_tokens=120, seed=seed).choices[0].message
    assert len(message.tool_calls or []) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [WEATHER, STARS], "tool_choice": "required"},
        {"tools": [WEATHER, STARS], "tool_choice": NAMED},
        {"tools": [WEATHER], "tool_choice": "auto"},
        {"response_format": Plan},
        {"tools": [WEATHER], "response_format": Plan},
        {"tools": [WEATHER, STARS], "tool_choice": "required", "n": 3, "logprobs": True, "top_logprobs": 2},
    ],
    ids=["required", "named", "auto", "structured", "tools or structure", "several, scored"],
)
def test_what_is_streamed_is_what_comes_whole(client: openai.OpenAI, options: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": ASK, "max_tokens": 150, "seed": 11, **options}
    whole = client.chat.completions.parse(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion()
    assert without_identity(streamed) == without_identity(whole)
    called = any(choice.message.tool_calls for choice in whole.choices)
    assert ("tool_calls.function.arguments.done" in kinds) == called


def without_identity(answer: ChatCompletion) -> dict[str, Any]:
    """Without what differs from call to call. Streams accumulate an empty content where a whole answer has none."""
    found = answer.model_dump(warnings=False, exclude={"id", "created", "object"})
    found["usage"].pop("prompt_tokens_details")
    for choice in found["choices"]:
        message = choice["message"]
        choice.pop("stop_reason", None)
        if choice["logprobs"] is not None:  # their last bits depend on what else is computed at the time
            choice["logprobs"] = [
                (entry["token"], round(entry["logprob"], 2)) for entry in choice["logprobs"]["content"]
            ]
        message["content"] = message["content"] or None
        for name in ("refusal", "annotations", "audio", "function_call"):
            message.pop(name, None)
        message["tool_calls"] = [
            {name: call["function"].get(name) for name in ("name", "arguments", "parsed_arguments")}
            for call in message["tool_calls"] or []
        ]
    return found


def test_each_call_of_a_stream_begins_with_its_id_and_name_and_goes_on_with_arguments(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=ASK, tools=[WEATHER, STARS], tool_choice="required", max_tokens=120, seed=4, stream=True
    )
    state = ChatCompletionStreamState()
    seen: dict[int, str | None] = {}
    reasons = []
    for chunk in stream:
        state.handle_chunk(chunk)
        for choice in chunk.choices:
            reasons.append(choice.finish_reason)
            assert not choice.delta.content, "nothing of a call is content"
            for part in choice.delta.tool_calls or []:
                function = part.function
                assert function is not None
                if part.index not in seen:
                    assert part.index == len(seen)
                    assert part.type == "function"
                    assert function.name
                    seen[part.index] = part.id
                else:
                    assert (part.id, function.name) == (None, None)
                assert function.arguments is not None
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    assert reasons[-1] == "tool_calls"
    calls = state.get_final_completion().choices[0].message.tool_calls or []
    assert [call.id for call in calls] == list(seen.values())


def test_what_a_tool_gave_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**CALLED, max_tokens=120, seed=2).choices[0].message
    [call] = first.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 31 degrees."}
    messages = [*ASK, first, result]  # as the SDK gave it
    second = client.chat.completions.create(
        model="demo", messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=30, seed=2
    )
    assert second.choices[0].message.content
    shorter = client.chat.completions.create(
        model="demo", messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=1
    )
    assert second.usage is not None
    assert shorter.usage is not None
    assert second.usage.prompt_tokens > shorter.usage.prompt_tokens + 20, "the call and its result are in the prompt"
    as_dict = first.model_dump()  # with every field that is null
    again = client.chat.completions.create(
        model="demo", messages=[*ASK, as_dict, result], tools=[WEATHER], tool_choice="none", max_tokens=30, seed=2
    )
    assert again.choices[0].message.content == second.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_short_has_the_arguments_so_far(client: openai.OpenAI, stream: bool) -> None:
    whole = called(client, max_tokens=120)
    cut = called(client, max_tokens=24, stream=stream)
    assert whole.finish_reason == "tool_calls"
    assert cut.finish_reason == "length"
    [call], [complete] = cut.message.tool_calls or [], whole.message.tool_calls or []
    assert not cut.message.content
    assert call.function.arguments
    assert complete.function.arguments.startswith(call.function.arguments)
    assert complete.function.arguments != call.function.arguments


def called(client: openai.OpenAI, *, stream: bool = False, **options: Any) -> Any:
    """The only choice of an answer that has to be a call."""
    asked: dict[str, Any] = CALLED | {"temperature": 0} | options
    if not stream:
        return client.chat.completions.create(**asked).choices[0]
    state = ChatCompletionStreamState()
    for chunk in client.chat.completions.create(**asked, stream=True):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot.choices[0]


def test_stop_strings_end_content_and_not_calls(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(
        model="demo", messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=20, temperature=0
    )
    words = (free.choices[0].message.content or "").split()
    stopped = client.chat.completions.create(
        model="demo", messages=ASK, tools=[WEATHER], tool_choice="none", max_tokens=20, temperature=0, stop=words[2]
    ).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == (free.choices[0].message.content or "").partition(words[2])[0]
    whole = called(client, max_tokens=120)
    arguments = whole.message.tool_calls[0].function.arguments
    kept = called(client, max_tokens=120, stop=["Paris", "days", "tool_call", "name"])
    assert kept.finish_reason == "tool_calls"
    assert kept.message.tool_calls[0].function.arguments == arguments


def test_a_seed_gives_the_same_calls(client: openai.OpenAI) -> None:
    def arguments(seed: int) -> list[str]:
        choices = client.chat.completions.create(**CALLED, max_tokens=120, seed=seed, n=3).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        calls = [(choice.message.tool_calls or [])[0] for choice in choices]
        assert len({call.id for call in calls}) == 3
        return [call.function.arguments for call in calls]

    assert arguments(3) == arguments(3)


def test_every_token_of_a_call_has_its_log_probability(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CALLED, max_tokens=120, temperature=0, logprobs=True, top_logprobs=1)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert answer.usage is not None
    assert len(scores.content) == answer.usage.completion_tokens
    written = b"".join(bytes(entry.bytes or []) for entry in scores.content).decode()
    assert "get_weather" in written


def test_usage_of_a_stream_is_that_of_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CALLED, max_tokens=120, temperature=0).usage
    stream = client.chat.completions.create(
        **CALLED, max_tokens=120, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *others, last = list(stream)
    assert all(chunk.usage is None for chunk in others)
    assert last.choices == []
    assert last.usage is not None
    assert whole is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)


def test_the_async_client_calls_many_at_once(demo: RunningServer) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=LIMIT
        ) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(**CALLED, max_tokens=120, seed=seed) for seed in range(4))
            )
        return [(answer.choices[0].message.tool_calls or [])[0].function.arguments for answer in answers]

    for arguments in asyncio.run(run()):
        Weather.model_validate_json(arguments)
