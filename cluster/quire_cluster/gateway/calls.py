"""What no gRPC method foresees: messages that are none, and failures that are not the caller's to read."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

log = logging.getLogger(__name__)


class CallGuard(grpc.aio.ServerInterceptor):
    """Around every method: bytes that are not its message are INVALID_ARGUMENT; any error but a refusal is INTERNAL,
    and told to the log alone. gRPC itself would answer UNKNOWN, with the error's own text."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method with a guard around it, which reads its messages."""
        handler = await continuation(details)
        if handler is None:
            return None
        read, write = handler.request_deserializer, handler.response_serializer

        async def read_all(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for request in requests:
                yield read(request)

        async def answer(request: bytes, context: Any) -> Any:
            async with _guarded(details.method, context):
                return await (handler.unary_unary or handler.unary_stream)(read(request), context)

        async def converse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async with _guarded(details.method, context):
                async for response in handler.stream_stream(read_all(requests), context):
                    yield response

        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(converse, None, write)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(answer, None, write)
        return grpc.unary_unary_rpc_method_handler(answer, None, write)


@contextlib.asynccontextmanager
async def _guarded(method: str, context: Any) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except DecodeError:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"this is no message that {method} takes; write it with code generated from the .proto files, in UTF-8",
        )
    except Exception:  # a bug of ours: gRPC itself would tell the caller its text
        log.exception("%s failed", method)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; it is in the server's log")
