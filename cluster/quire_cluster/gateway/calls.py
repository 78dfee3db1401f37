"""What no gRPC method foresees: messages that are none, and failures that are not the caller's to read."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

log = logging.getLogger(__name__)


class CallGuard(grpc.aio.ServerInterceptor):
    """Around every method: bytes that are not its message are INVALID_ARGUMENT; any error but a refusal is INTERNAL,
    and told to the log alone. gRPC itself would answer UNKNOWN, with the error's own text. A call whose first message
    is not there in time is DEADLINE_EXCEEDED."""

    def __init__(self, first_message: float) -> None:
        """`first_message`: seconds until it is there."""
        self._first_message = first_message

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method with a guard around it, which reads its messages. To gRPC every method takes a stream of them: it
        would wait for the only one of the others by itself, for as long as the client likes."""
        handler = await continuation(details)
        if handler is None:
            return None
        read, write = handler.request_deserializer, handler.response_serializer

        async def first(requests: AsyncIterator[bytes], context: Any) -> bytes:
            try:
                async with asyncio.timeout(self._first_message):
                    return await anext(requests)
            except TimeoutError:
                why = f"the request's message took more than {self._first_message:g} s"
                await refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, why)
            except StopAsyncIteration:  # the client has left, sent what is too large, or nothing
                why = f"{details.method} takes a message; send one"
                await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, why)

        async def read_all(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            yield read(await first(requests, context))
            async for request in requests:
                yield read(request)

        async def answer(requests: AsyncIterator[bytes], context: Any) -> Any:
            async with _guarded(details.method, context):
                request = read(await first(requests, context))
                return await (handler.unary_unary or handler.unary_stream)(request, context)

        async def converse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            async with _guarded(details.method, context):
                async for response in handler.stream_stream(read_all(requests, context), context):
                    yield response

        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(converse, None, write)
        if handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(answer, None, write)
        return grpc.stream_unary_rpc_method_handler(answer, None, write)


async def refuse(context: Any, code: grpc.StatusCode, why: str) -> NoReturn:
    """The call's end, if it has none yet."""
    try:
        await context.abort(code, why)
    except grpc.aio.InternalError:  # the call has ended already: so this ends as gRPC ends what runs then
        raise asyncio.CancelledError from None
    raise AssertionError("abort() raises")


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
    except NotImplementedError:  # generated code's, of a method that a service of another library leaves out
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served")
    except Exception:  # a bug of ours: gRPC itself would tell the caller its text
        log.exception("%s failed", method)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; it is in the server's log")
