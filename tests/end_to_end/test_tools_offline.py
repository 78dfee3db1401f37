"""Tools and structures without a server: `LLM`, and `quire run-batch`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from quire import LLM, SamplingParams
from quire_engine.errors import InvalidParameter
from weather import ASK, SCHEMA, TOOL

STRUCTURE = {"json": SCHEMA}
GREEDY = SamplingParams(temperature=0, max_tokens=120)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(cpu_threads=1) as made:
        yield made


def test_chat_calls_tools_and_takes_their_results(llm: LLM) -> None:
    [output] = llm.chat(ASK, GREEDY, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, use_tqdm=False)
    [completion] = output.outputs
    [call] = completion.tool_calls
    assert (completion.finish_reason, completion.text, call.name) == ("tool_calls", "", "get_weather")
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    turn = {
        "role": "assistant",
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        ],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
    [after] = llm.chat([*ASK, turn, result], GREEDY, tools=[TOOL], tool_choice="none", use_tqdm=False)
    assert not after.outputs[0].tool_calls
    assert len(after.prompt_token_ids) > len(output.prompt_token_ids)


def test_structures_of_prompts_and_conversations(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=120, structured_outputs=STRUCTURE)
    outputs = [*llm.generate(["The weather:", "Days:"], params, use_tqdm=False), *llm.chat(ASK, params, use_tqdm=False)]
    for output in outputs:
        jsonschema.validate(json.loads(output.outputs[0].text), SCHEMA)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "get_weather"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_refused_by_name(llm: LLM, options: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameter, match=parameter) as refused:
        llm.chat(ASK, GREEDY, use_tqdm=False, **options)
    assert refused.value.parameter == parameter


def test_lines_of_a_batch_have_tools_and_structures(tmp_path: Path, llm: LLM) -> None:
    shared = {"messages": ASK, "temperature": 0, "max_tokens": 120}
    called = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    schema = {"name": "weather", "schema": SCHEMA}
    bodies = [
        shared | called,
        shared | {"response_format": {"type": "json_schema", "json_schema": schema}},
        shared | {"tool_choice": "required"},
        shared | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
    ]
    lines = [json.dumps({"url": "/v1/chat/completions", "body": body}) for body in bodies]
    lines.append(
        json.dumps(
            {
                "url": "/v1/completions",
                "body": {"prompt": "Days:", "max_tokens": 120, "temperature": 0, "structured_outputs": STRUCTURE},
            }
        )
    )
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "quire.cli.main",
        "run-batch",
        str(source),
        "-o",
        str(target),
        "--cpu-threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    responses = [json.loads(line)["response"] for line in target.read_text().splitlines()]
    assert [response["status_code"] for response in responses] == [200, 200, 400, 400, 200]
    [choice] = responses[0]["body"]["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    [output] = llm.chat(ASK, GREEDY, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, use_tqdm=False)
    assert call["function"] == {"name": "get_weather", "arguments": output.outputs[0].tool_calls[0].arguments}
    jsonschema.validate(json.loads(responses[1]["body"]["choices"][0]["message"]["content"]), SCHEMA)
    assert [responses[place]["body"]["error"]["param"] for place in (2, 3)] == ["tool_choice", "response_format"]
    jsonschema.validate(json.loads(responses[4]["body"]["choices"][0]["text"]), SCHEMA)
