"""Errors of ours as gRPC's."""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import ServiceDescriptor
from quire_engine.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidParameter,
    LimitReached,
    OutOfMemory,
    QueueFull,
    QuireError,
    RequestError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)

PARAMETER = "quire-parameter"  # trailing metadata: what was wrong


def status_code(error: QuireError) -> grpc.StatusCode:
    """What gRPC calls it."""
    code = grpc.StatusCode
    for kind, found in (
        (UnknownModel, code.NOT_FOUND),
        (Unauthenticated, code.UNAUTHENTICATED),
        (Forbidden, code.PERMISSION_DENIED),
        (QueueFull, code.RESOURCE_EXHAUSTED),
        (LimitReached, code.RESOURCE_EXHAUSTED),
        (DeadlineExceeded, code.DEADLINE_EXCEEDED),
        (RequestError, code.INVALID_ARGUMENT),
        (Unavailable, code.UNAVAILABLE),
        (OutOfMemory, code.RESOURCE_EXHAUSTED),
    ):
        if isinstance(error, kind):
            return found
    return code.INTERNAL


class CallErrors(grpc.aio.ServerInterceptor):
    """Around the unary methods of one service."""

    def __init__(self, service: ServiceDescriptor, on_call: Callable[[str, Any], None]) -> None:
        """`on_call`: told of each call before it is made; may raise QuireError."""
        self._root = f"/{service.full_name}/"
        self._on_call = on_call

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._root):
            return handler
        method = details.method.removeprefix(self._root)

        async def answer(request: Any, context: Any) -> Any:
            try:
                self._on_call(method, request)
                return await handler.unary_unary(request, context)
            except json_format.Error as error:  # a number that JSON does not have
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this is no {method}Request: {error}")
            except QuireError as error:
                if isinstance(error, InvalidParameter) and error.parameter:
                    context.set_trailing_metadata(((PARAMETER, error.parameter.encode("ascii", "replace").decode()),))
                await context.abort(status_code(error), str(error))

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)
