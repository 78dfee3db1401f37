"""A gRPC service over HTTP as JSON: POST /package.Service/Method, as the Connect protocol has unary calls; and its
description in OpenAPI, made from the .proto file."""

import logging
from collections.abc import Callable
from typing import Any

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from quire_engine.errors import InvalidParameter, QuireError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire_cluster.gateway.http import error_body, error_response, json_response

log = logging.getLogger(__name__)
LARGEST = 4 << 20  # bytes of a call
DESCRIBE = "openapi.json"
_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32: ("integer", "int32"),
    FieldDescriptor.CPPTYPE_UINT32: ("integer", "int64"),
    FieldDescriptor.CPPTYPE_DOUBLE: ("number", "double"),
    FieldDescriptor.CPPTYPE_FLOAT: ("number", "float"),
    FieldDescriptor.CPPTYPE_BOOL: ("boolean", None),
    FieldDescriptor.CPPTYPE_ENUM: ("string", None),
    # JSON's numbers are doubles to many readers: these are written as texts, and read as both.
    FieldDescriptor.CPPTYPE_INT64: ("string", "int64"),
    FieldDescriptor.CPPTYPE_UINT64: ("string", "uint64"),
}
_ANYTHING = ("google.protobuf.Struct", "google.protobuf.Value")


class JsonCalls:
    """The routes of one service."""

    def __init__(
        self,
        service: ServiceDescriptor,
        servicer: Any,
        *,
        may: Callable[[str], None] = lambda name: None,
        on_call: Callable[[str, Any], None] = lambda name, message: None,
    ) -> None:
        """`may`: asked of each call, and of DESCRIBE, before its body is read; raises QuireError. `on_call`: told of
        each before it is made."""
        self._service = service
        self._servicer = servicer
        self._may = may
        self._on_call = on_call

    def routes(self) -> list[Route]:
        """The calls, and what describes them."""
        root = f"/{self._service.full_name}"
        return [
            Route(f"{root}/{DESCRIBE}", self._describe, methods=["GET"]),
            Route(f"{root}/{{method}}", self._call, methods=["POST"]),
        ]

    async def _describe(self, request: Request) -> Response:
        try:
            self._may(DESCRIBE)
        except QuireError as error:
            return error_response(error)
        return json_response(openapi(self._service))

    async def _call(self, request: Request) -> Response:
        """JSON in, JSON out, by the same methods as gRPC's."""
        name = request.path_params["method"]
        method = self._service.methods_by_name.get(name)
        if method is None:
            known = ", ".join(self._service.methods_by_name)
            return json_response(
                error_body(InvalidParameter(f"there is no method {name:.80}; there are: {known}"), 404), 404
            )
        message = GetMessageClass(method.input_type)()
        try:
            self._may(name)
            body = await request.body()
            if len(body) > LARGEST:
                raise InvalidParameter(f"the body has more than {LARGEST} bytes")
            if body and not body.lstrip().startswith(b"{"):
                raise json_format.ParseError("it must be an object with named fields")
            json_format.Parse(body or b"{}", message)
            self._on_call(name, message)
            answer = await getattr(self._servicer, name)(message, None)
        except (json_format.Error, UnicodeDecodeError) as error:
            return error_response(InvalidParameter(f"the body is no {method.input_type.name}: {error}"))
        except QuireError as error:
            return error_response(error)
        except Exception:  # a bug of ours: the caller gets its 500, and the log the cause
            log.exception("%s failed", name)
            return json_response(error_body(QuireError("internal error; it is in the server's log"), 500), 500)
        content = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return Response(orjson.dumps(content), media_type="application/json")


def openapi(service: ServiceDescriptor) -> dict[str, Any]:
    """OpenAPI 3.1 of a service's calls, as proto3's JSON mapping has their messages."""
    schemas: dict[str, Any] = {}
    paths = {f"/{service.full_name}/{one.name}": {"post": _operation(one, schemas)} for one in service.methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": service.full_name, "version": service.file.package.rpartition(".")[2]},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: MethodDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    def content(message: Descriptor) -> dict[str, Any]:
        return {"application/json": {"schema": _message(message, schemas)}}

    return {
        "operationId": method.name,
        "requestBody": {"content": content(method.input_type)},
        "responses": {
            "200": {"description": method.output_type.name, "content": content(method.output_type)},
            "default": {"description": "OpenAI's error object"},
        },
    }


def _message(message: Descriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if message.full_name in _ANYTHING:
        return {}
    if message.name not in schemas:
        schemas[message.name] = {}  # before its fields, which may be of its own kind
        properties = {one.name: _field(one, schemas) for one in message.fields}
        schemas[message.name] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"$ref": f"#/components/schemas/{message.name}"}


def _field(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _one(field.message_type.fields_by_name["value"], schemas)}
    one = _one(field, schemas)
    return {"type": "array", "items": one} if field.is_repeated else one


def _one(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        return _message(field.message_type, schemas)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    kind, form = _NUMBERS.get(field.cpp_type, ("string", None))
    return {"type": kind} | ({"format": form} if form else {})
