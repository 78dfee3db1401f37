"""Requests and answers of the gRPC client as messages, and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2 as pb


@dataclass
class CalledTool:
    """A call of a tool; in a stream, what is new of one: its id and name come with the first piece alone."""

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON text


@dataclass
class Output:
    """One choice: whole, or (in a stream) what is new of it."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: list[CalledTool] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None


@dataclass
class Response:
    """All choices of a request."""

    request_id: str
    outputs: list[Output]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    prompt_logprobs: list[Any]

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.outputs[0].text


def sampling_of(options: dict[str, Any]) -> pb.SamplingParams:
    """Raises InvalidParameter for what cannot be sent: an unknown name, another type, too large a number."""
    message = pb.SamplingParams()
    for name, value in options.items():
        try:
            sent: Any = _structure(value) if name == "structured_outputs" else value
            message.MergeFrom(pb.SamplingParams(**{name: sent}))
        except (TypeError, ValueError) as error:
            raise InvalidParameter(f"{name} cannot be sent: {error}", name) from error
    return message


def _structure(given: Any) -> pb.StructuredOutputs:
    """Of an object with one of the fields; schemas and tags as objects, or as their text."""
    if not isinstance(given, Mapping):
        raise TypeError(f"it is {given!r:.60}; give an object")
    message = pb.StructuredOutputs()
    for name, value in given.items():
        if name in ("json", "structural_tag") and not isinstance(value, str):
            value = json.dumps(value)
        if name == "choice":
            value = pb.Choices(texts=value)
        message.MergeFrom(pb.StructuredOutputs(**{name: value}))
    return message


def generate_request(prompt: str | list[int], model: str, options: dict[str, Any]) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=model, priority=options.pop("priority", None), cache_salt=options.pop("cache_salt", None)
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    request.sampling.CopyFrom(sampling_of(options))
    return request


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    model: str,
    options: dict[str, Any],
) -> pb.ChatRequest:
    """`messages`, `tools` and `tool_choice` are OpenAI's. Raises InvalidParameter for what cannot be sent."""
    names = ("priority", "cache_salt", "add_generation_prompt", "continue_final_message", "parallel_tool_calls")
    request = pb.ChatRequest(model=model, **{name: options.pop(name, None) for name in names})
    tools, choice = options.pop("tools", None), options.pop("tool_choice", None)
    variables = options.pop("chat_template_kwargs", None)
    try:
        for message in messages:
            request.messages.append(_message(message))
        for tool in tools or ():
            request.tools.append(_tool(tool["function"]))
        if isinstance(choice, str):
            request.tool_choice = choice
        elif choice is not None:
            request.tool_name = choice["function"]["name"]
        if variables is not None:
            request.chat_template_kwargs = json.dumps(variables)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidParameter(f"messages, tools or tool_choice cannot be sent: {error}", "messages") from error
    request.sampling.CopyFrom(sampling_of(options))
    return request


def _message(given: Mapping[str, Any]) -> pb.ChatMessage:
    fields = {name: value for name, value in given.items() if value is not None}
    calls = [
        pb.ToolCall(id=one["id"], name=one["function"]["name"], arguments=one["function"]["arguments"])
        for one in fields.pop("tool_calls", ())
    ]
    reasoning = fields.pop("reasoning_content", None)
    return pb.ChatMessage(tool_calls=calls, **({"reasoning": reasoning} if reasoning is not None else {}) | fields)


def _tool(function: Mapping[str, Any]) -> pb.Tool:
    fields = dict(function)
    if fields.get("parameters") is not None:
        fields["parameters"] = json.dumps(fields["parameters"])
    return pb.Tool(**fields)


def embed_request(inputs: Sequence[str | list[int]], model: str, dimensions: int | None) -> pb.EmbedRequest:
    request = pb.EmbedRequest(model=model, dimensions=dimensions)
    for given in inputs:
        if isinstance(given, str):
            request.inputs.add(text=given)
        else:
            request.inputs.add(token_ids=pb.TokenIds(ids=given))
    return request


def delta_of(message: pb.GenerateResponse) -> Output:
    return Output(
        index=message.index,
        text=message.text,
        reasoning=message.reasoning,
        tool_calls=[CalledTool(call.index, call.id, call.name, call.arguments) for call in message.calls],
        token_ids=list(message.token_ids),
        logprobs=list(message.logprobs),
        finish_reason=message.finish_reason if message.HasField("finish_reason") else None,
        stop_reason=message.stop_reason if message.HasField("stop_reason") else None,
    )


class Gathered:
    """Deltas becoming a response."""

    def __init__(self) -> None:
        self._outputs: dict[int, Output] = {}
        self._last = pb.GenerateResponse()
        self._prompt_logprobs: list[Any] = []

    def add(self, message: pb.GenerateResponse) -> None:
        self._prompt_logprobs += message.prompt_logprobs
        if message.HasField("usage"):
            self._last = message
            return
        if message.prompt_logprobs:
            return
        delta = delta_of(message)
        whole = self._outputs.setdefault(delta.index, Output(delta.index))
        whole.text += delta.text
        whole.reasoning += delta.reasoning
        for part in delta.tool_calls:
            if part.index == len(whole.tool_calls):
                whole.tool_calls.append(part)
            else:
                whole.tool_calls[part.index].arguments += part.arguments
        whole.token_ids += delta.token_ids
        whole.logprobs += delta.logprobs
        whole.finish_reason = delta.finish_reason or whole.finish_reason
        whole.stop_reason = delta.stop_reason or whole.stop_reason

    def response(self) -> Response:
        usage = self._last.usage
        return Response(
            request_id=self._last.request_id,
            outputs=[self._outputs[index] for index in sorted(self._outputs)],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            prompt_logprobs=self._prompt_logprobs,
        )
