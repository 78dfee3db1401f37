"""Requests and answers of the gRPC client as messages, and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.tools import tools_of
from quire_engine.text.images import PromptImage
from quire_engine.text.messages import REASONING, conversation, has_images, text_of
from quire_protos.v1 import inference_pb2 as pb

from quire.files import file_of


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
    """`messages`, `tools` and `tool_choice` are OpenAI's. Raises InvalidParameter for what is wrong or cannot be
    sent."""
    request = pb.ChatRequest(model=model)
    for turn in conversation([_with_files(place, one) for place, one in enumerate(messages)]):
        request.messages.append(_message(turn))
    tools, choice = options.pop("tools", None), options.pop("tool_choice", None)
    tools_of(tools)
    request.tools.extend(_tool(tool["function"]) for tool in tools or ())
    if isinstance(choice, str):
        request.tool_choice = choice
    elif choice is not None:
        request.tool_name = _named(choice)
    if (variables := options.pop("chat_template_kwargs", None)) is not None:
        try:
            request.chat_template_kwargs = json.dumps(variables)
        except (TypeError, ValueError) as error:
            raise InvalidParameter(f"chat_template_kwargs are no JSON: {error}", "chat_template_kwargs") from error
    for name in ("priority", "cache_salt", "add_generation_prompt", "continue_final_message", "parallel_tool_calls"):
        try:
            request.MergeFrom(pb.ChatRequest(**{name: options.pop(name, None)}))
        except (TypeError, ValueError) as error:
            raise InvalidParameter(f"{name} cannot be sent: {error}", name) from error
    request.sampling.CopyFrom(sampling_of(options))
    return request


def _message(turn: Mapping[str, Any]) -> pb.ChatMessage:
    calls = [pb.ToolCall(id=one.id, name=one.name, arguments=one.text) for one in turn.get("tool_calls", ())]
    reasoning = next((turn[name] for name in REASONING if name in turn), None)
    content = turn.get("content")
    seen = has_images(content)
    return pb.ChatMessage(
        role=turn["role"],
        content="" if seen else text_of(content),
        parts=map(_part, content or ()) if seen else (),
        name=turn.get("name"),
        tool_calls=calls,
        tool_call_id=turn.get("tool_call_id"),
        reasoning=reasoning,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sent(PromptImage):
    """An image that the server makes something of."""

    file: bytes


def _with_files(place: int, message: Any) -> Any:
    """With the files of its images: those of parts of type image, which may be PIL images, files or paths."""
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for number, part in enumerate(content):
        if isinstance(part, Mapping) and part.get("type") == "image":
            what = f"part {number} of message {place}"
            file = file_of(part.get("image"), what)
            part = {"type": "image", "image": _Sent(what=what, key=b"", replacement="", num_tokens=0, file=file)}
        parts.append(part)
    return dict(message) | {"content": parts}


def _part(part: Mapping[str, Any]) -> pb.ContentPart:
    if part["type"] == "image":
        return pb.ContentPart(image=part["image"].file)
    return (
        pb.ContentPart(text=part["text"])
        if part["type"] == "text"
        else pb.ContentPart(image_url=part["image_url"]["url"])
    )


def _tool(function: Mapping[str, Any]) -> pb.Tool:
    fields = dict(function)
    if fields.get("parameters") is not None:
        fields["parameters"] = json.dumps(fields["parameters"], ensure_ascii=False)
    return pb.Tool(**fields)


def _named(choice: Any) -> str:
    """The tool that has to be called."""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        one = '{"type": "function", "function": {"name": ...}}'
        raise InvalidParameter(f"tool_choice is {choice!r:.80}; give auto, none, required or {one}", "tool_choice")
    return name


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
