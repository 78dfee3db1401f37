"""Libraries that agents are written with, as they are: pointed at a server by its address, and nothing else."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from conftest import RunningServer
from pydantic import BaseModel, ConfigDict, Field
from web import LIMIT

ADA = [{"role": "user", "content": "Ada is 36 years old."}]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


class Person(BaseModel):
    """Somebody."""

    model_config = ConfigDict(extra="forbid")  # else a small model has much to add
    name: Literal["Ada", "Bob"]
    age: int = Field(ge=1, le=99)


@pytest.fixture(scope="module")
def client(demo: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=LIMIT) as made:
        yield made


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor_extracts_a_model(client: openai.OpenAI, mode: str) -> None:
    import instructor

    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    asked: dict[str, Any] = {"model": "demo", "response_model": Person, "messages": ADA, "max_retries": 0, **OPTIONS}
    assert isinstance(patched.chat.completions.create(**asked), Person)


def test_instructor_sees_a_model_grow_as_its_call_is_streamed(client: openai.OpenAI) -> None:
    import instructor

    patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    states = list(patched.chat.completions.create_partial(model="demo", response_model=Person, messages=ADA, **OPTIONS))
    known = [sum(value is not None for value in state.model_dump().values()) for state in states]
    assert known == sorted(known)
    Person.model_validate(states[-1].model_dump())


@pytest.fixture(scope="module")
def model(demo: RunningServer) -> Any:
    """For pydantic-ai."""
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel("demo", provider=OpenAIProvider(base_url=f"{demo.url}/v1", api_key="none"))


def agent_of(model: Any, output: Any) -> Any:
    from pydantic_ai import Agent

    return Agent(model, output_type=output, retries=0, model_settings=OPTIONS)


def test_pydantic_ai_extracts_a_model_by_a_call_and_by_a_schema(model: Any) -> None:
    from pydantic_ai import NativeOutput, ToolOutput

    for output in (ToolOutput(Person), NativeOutput(Person)):
        assert isinstance(agent_of(model, output).run_sync("Ada is 36 years old.").output, Person)


def test_a_pydantic_ai_agent_calls_a_tool_and_answers(model: Any) -> None:
    from pydantic_ai import RunContext, ToolDefinition, ToolOutput

    looked_up: list[str] = []

    async def once(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
        return None if looked_up else tool

    agent = agent_of(model, ToolOutput(Person))

    @agent.tool_plain(prepare=once)
    def look_up(name: Literal["Ada", "Bob"]) -> str:
        """Says who somebody is. Always begin with this."""
        looked_up.append(name)
        return f"{name} is 36 years old."

    result = agent.run_sync("Look up Ada, and tell me who it is.")
    assert isinstance(result.output, Person)
    kinds = [part.part_kind for message in result.all_messages() for part in message.parts]
    assert looked_up, kinds
    assert kinds.count("tool-call") == kinds.count("tool-return")


def test_a_pydantic_ai_agent_streams_its_output(model: Any) -> None:
    from pydantic_ai import ToolOutput

    async def run() -> list[Any]:
        async with agent_of(model, ToolOutput(Person)).run_stream("Ada is 36 years old.") as result:
            return [output async for output in result.stream_output(debounce_by=None)]

    assert isinstance(asyncio.run(run())[-1], Person)


@pytest.fixture
def complete(demo: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """litellm's way to an OpenAI server that it does not know."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is looked up on the internet
    import litellm

    def call(**options: Any) -> Any:
        return litellm.completion(
            model="demo",
            api_base=f"{demo.url}/v1",
            custom_llm_provider="openai",
            api_key="none",
            messages=ADA,
            timeout=LIMIT,
            **OPTIONS,
            **options,
        )

    return call


TOOL = {
    "type": "function",
    "function": {"name": "person", "description": "Somebody.", "parameters": Person.model_json_schema()},
}


def test_litellm_extracts_a_model(complete: Any) -> None:
    Person.model_validate_json(complete(response_format=Person).choices[0].message.content)


def test_litellm_calls_a_tool_whole_and_streamed(complete: Any) -> None:
    import litellm

    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    [whole] = complete(**asked).choices[0].message.tool_calls
    chunks = list(complete(**asked, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks)
    [streamed] = built.choices[0].message.tool_calls
    assert Person.model_validate(json.loads(whole.function.arguments))
    assert (streamed.function.name, streamed.function.arguments) == ("person", whole.function.arguments)
    assert built.choices[0].finish_reason == "tool_calls"


def test_litellm_knows_our_refusals(complete: Any) -> None:
    import litellm

    with pytest.raises(litellm.BadRequestError, match="two functions named 'person'"):
        complete(tools=[TOOL, TOOL])
