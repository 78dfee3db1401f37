"""Conversations and tools of the gRPC API, as OpenAI's API has them."""

from typing import Any

import orjson
from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.chat import ToolUse
from quire_engine.text.messages import image_url
from quire_protos.v1 import inference_pb2 as pb


def conversation(request: pb.ChatRequest) -> tuple[list[dict[str, Any]], list[dict[str, Any]], ToolUse]:
    """Its messages and tools, as OpenAI's API has them, and what of the tools is to be called. Raises
    InvalidParameter."""
    tools = _tools(request)
    parallel = request.parallel_tool_calls if request.HasField("parallel_tool_calls") else None
    use = ToolUse.of(tools or None, _tool_choice(request), parallel)
    return [_message(message) for message in request.messages], tools, use


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """As OpenAI's API has it."""
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        if message.content:
            raise InvalidParameter("a message has both content and parts; put the content into a part", "messages")
        made["content"] = [_part(part) for part in message.parts]
    if message.name:
        made["name"] = message.name
    if message.HasField("tool_call_id"):
        made["tool_call_id"] = message.tool_call_id
    if message.HasField("reasoning"):
        made["reasoning_content"] = message.reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in message.tool_calls
        ]
    return made


def _part(part: pb.ContentPart) -> dict[str, Any]:
    """As OpenAI's API has it, but for an image that came along."""
    kind = part.WhichOneof("part")
    if kind == "image":
        return {"type": "image", "image": part.image}
    return {"type": "text", "text": part.text} if kind == "text" else image_url(part.image_url)


def _tools(request: pb.ChatRequest) -> list[dict[str, Any]]:
    """As OpenAI's API has them. Raises InvalidParameter."""
    tools = []
    for place, tool in enumerate(request.tools):
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        if tool.HasField("parameters"):
            function["parameters"] = read_json(tool.parameters, f"the parameters of tool {place}", "tools")
        if tool.HasField("strict"):
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(request: pb.ChatRequest) -> Any:
    """As OpenAI's API has it. Raises InvalidParameter."""
    if not request.HasField("tool_name"):
        return request.tool_choice if request.HasField("tool_choice") else None
    if request.HasField("tool_choice"):
        raise InvalidParameter("tool_choice and tool_name exclude each other", "tool_name")
    return {"type": "function", "function": {"name": request.tool_name}}


def read_json(text: str, what: str, parameter: str) -> Any:
    """Raises InvalidParameter."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidParameter(f"{what} are no JSON: {error}", parameter) from error
