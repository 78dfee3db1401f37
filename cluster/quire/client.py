"""A gRPC client, sync and async. `Client("host:50051").chat([...])`; the `stream` methods give deltas as they come.

It takes the addresses of several gateways, or a DNS name of theirs. Calls take turns among them; one that finds its
gateway gone goes to another, and a stream that breaks goes on there after the tokens that have come: the same tokens.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
from quire_cluster.addresses import host_of, is_loopback
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

from quire.messages import Gathered, Output, Response, chat_request, delta_of, embed_request, generate_request

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 15_000),  # a gateway whose host vanished without a word is found
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # as long as an answer waits
    ("grpc.lb_policy_name", "round_robin"),  # among the addresses of a name
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_SHUNNED = 5.0  # seconds that an address is left out after it failed, while there are others
_PATIENCE = 30.0  # seconds without progress that a call which had begun is tried again for
_LEAST_ATTEMPTS = 3  # behind one address may be a load balancer
_PAUSES = (0.05, 1.0)  # seconds before it is: the first, and the longest
_CUT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
Addresses = str | Sequence[str]
Certificate = tuple[str, str]  # files in PEM: a certificate, and its key


def _credentials(tls: bool | str, certificate: Certificate | None) -> Any:
    """Of channels; None where they are not encrypted. Raises InvalidParameter for files that cannot be read."""
    if tls is False:
        if certificate is not None:
            raise InvalidParameter("a certificate is shown over TLS alone; give tls=True, or a file of CAs", "tls")
        return None
    ca = _pem(tls, "tls") if isinstance(tls, str) else None
    if certificate is None:
        return grpc.ssl_channel_credentials(ca)
    chain, key = (_pem(file, "certificate") for file in certificate)
    return grpc.ssl_channel_credentials(ca, key, chain)


def _pem(file: str, parameter: str) -> bytes:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InvalidParameter(f"{parameter}: {file} cannot be read ({error.strerror})", parameter) from error
    if b"-----BEGIN" not in content:
        raise InvalidParameter(f"{parameter}: {file} is no PEM file", parameter)
    return content


def _options(address: str) -> list[tuple[str, Any]]:
    """Of a channel. A proxy that the environment names cannot lead back to this machine."""
    return [*_OPTIONS, ("grpc.enable_http_proxy", 0)] if is_loopback(host_of(address)) else _OPTIONS


def _metadata(api_key: str | None) -> list[tuple[str, str]]:
    """Raises InvalidParameter for a key that no header can carry."""
    if not api_key:
        return []
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidParameter("api_key holds other characters than visible ASCII ones", "api_key")
    return [("authorization", f"Bearer {api_key}")]


def _is_broken(call: Any) -> bool:
    """Whether a gateway, or the way to it, is gone. A stream that was reset bears another status than that, which no
    server has sent."""
    details = call.details() or ""
    cut = "Stream removed" in details or "RST_STREAM" in details or "Cancelling all calls" in details
    return call.code() is grpc.StatusCode.UNAVAILABLE or (call.code() in _CUT and cut)


class _Place:
    """One address, with its channel."""

    def __init__(self, address: str, channel: Any) -> None:
        self.address = address
        self.channel = channel
        self.stub: Any = inference_pb2_grpc.InferenceStub(channel)
        self.shunned_until = 0.0


class _Places:
    """The addresses in turn, those that failed a moment ago left out while there are others."""

    def __init__(self, addresses: Addresses, library: Any, credentials: Any) -> None:
        """`library`: grpc, or grpc.aio. `credentials`: None: nothing is encrypted."""
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        names = [address.strip() for address in given if address.strip()]
        if not names:
            raise InvalidParameter("no address was given; give one as localhost:50051", "addresses")
        self._all = [
            _Place(
                name,
                library.insecure_channel(name, options=_options(name))
                if credentials is None
                else library.secure_channel(name, credentials, options=_options(name)),
            )
            for name in names
        ]
        self._turn = secrets.randbelow(len(names))

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[_Place]:
        return iter(self._all)

    def next(self) -> _Place:
        self._turn += 1
        now = time.monotonic()
        rotated = [self._all[(self._turn + step) % len(self._all)] for step in range(len(self._all))]
        return min(rotated, key=lambda place: max(now, place.shunned_until))


class _Attempts:
    """A call, over as many gateways as it takes: where it goes next, and after how long."""

    def __init__(self, places: _Places, timeout: float | None) -> None:
        self._places = places
        self._until = None if timeout is None else time.monotonic() + timeout
        self._tried = 0
        self._was_full = False
        self._progress = time.monotonic()
        self._pause = _PAUSES[0]
        self.begun = False
        self.place = places.next()

    @property
    def time_left(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def advanced(self) -> None:
        """Something has come."""
        self.begun = True
        self._tried, self._progress, self._pause = 0, time.monotonic(), _PAUSES[0]

    def failed(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt, at another place. Raises `error` where there is none: it is the
        call's own, or every address has failed, and what has begun does not go on for long."""
        call: Any = error
        full = call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        now = time.monotonic()
        if not (_is_broken(call) or full):
            raise error
        self._tried += 1
        if full:  # others may be, too: one of them is asked
            may = len(self._places) > 1 and not self._was_full
            self._was_full = True
        else:
            self.place.shunned_until = now + _SHUNNED
            may = self._tried < max(len(self._places), _LEAST_ATTEMPTS)
            may = may or (self.begun and now - self._progress < _PATIENCE)
        if not may or self.time_left == 0.0:
            raise error
        pause, self._pause = self._pause, min(2 * self._pause, _PAUSES[1])
        self.place = self._places.next()
        return pause if self._tried >= len(self._places) else 0.0


class _Stream(_Attempts):
    """A call whose answer comes piece by piece: the request, and what has come of its answers."""

    def __init__(self, places: _Places, timeout: float | None, method: str, request: Any) -> None:
        super().__init__(places, timeout)
        self._method = method
        self._request = request
        if not request.sampling.HasField("seed"):  # else no other gateway could go on with it
            request.sampling.seed = secrets.randbits(63)
        self.complete = False
        self._held: dict[int, pb.Emitted] = {}
        self._scored = 0  # positions of the prompt whose log-probabilities have come
        self._known = 0  # of those, how many this attempt has yet to tell again

    def open(self, metadata: list[tuple[str, str]]) -> Any:
        """At the place whose turn it is."""
        self._known = self._scored
        del self._request.resume[:]
        self._request.resume.extend(self._held[index] for index in sorted(self._held))
        return getattr(self.place.stub, self._method)(self._request, timeout=self.time_left, metadata=metadata)

    def take(self, message: pb.GenerateResponse) -> None:
        """Something has come; what had come before is taken out of it."""
        self.advanced()
        again = min(self._known, len(message.prompt_logprobs))
        if message.HasField("usage") or message.prompt_logprobs:
            self.complete = message.HasField("usage")
            self._known -= again
            self._scored += len(message.prompt_logprobs) - again
            del message.prompt_logprobs[:again]
            return
        held = self._held.setdefault(message.index, pb.Emitted(index=message.index))
        held.token_ids.extend(message.token_ids)
        held.finished = held.finished or message.HasField("finish_reason")


class _Base:
    def __init__(
        self,
        library: Any,
        addresses: Addresses,
        api_key: str | None,
        tls: bool | str,
        certificate: Certificate | None,
    ) -> None:
        self._metadata = _metadata(api_key)
        self._places = _Places(addresses, library, _credentials(tls, certificate))

    def _generate(self, prompt: str | list[int], model: str, timeout: float | None, options: dict[str, Any]) -> _Stream:
        return _Stream(self._places, timeout, "Generate", generate_request(prompt, model, options))

    def _chat(
        self, messages: Sequence[Mapping[str, Any]], model: str, timeout: float | None, options: dict[str, Any]
    ) -> _Stream:
        return _Stream(self._places, timeout, "Chat", chat_request(messages, model, options))


class Client(_Base):
    """Blocking. Options of `generate` and `chat` are the sampling parameters; errors are grpc.RpcError."""

    def __init__(
        self,
        addresses: Addresses = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: bool | str = False,
        certificate: Certificate | None = None,
    ) -> None:
        """`addresses`: of gateways; one, several (also as one text, with commas), or a DNS name of theirs. `tls`: True,
        or a PEM file of the CAs that gateways' certificates are of, in place of the well-known ones. `certificate`:
        the client's own, for gateways that want one. Raises InvalidParameter."""
        super().__init__(grpc, addresses, api_key, tls, certificate)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up."""
        for place in self._places:
            place.channel.close()

    def generate(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Completes a text or token ids."""
        return self._gather(self._generate(prompt, model, timeout, options))

    def stream(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Iterator[Output]:
        """The same, piece by piece. Closing the iterator cancels the request."""
        return self._follow(self._generate(prompt, model, timeout, options))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Answers a conversation."""
        return self._gather(self._chat(messages, model, timeout, options))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Iterator[Output]:
        """The same, piece by piece."""
        return self._follow(self._chat(messages, model, timeout, options))

    def embed(
        self, inputs: Sequence[str | list[int]], *, model: str = "", dimensions: int | None = None
    ) -> list[list[float]]:
        """A vector for each text (or token ids)."""
        answer = self._ask("Embed", embed_request(inputs, model, dimensions))
        return [list(one.values) for one in answer.embeddings]

    def tokenize(self, text: str, *, model: str = "", add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(model=model, text=text, add_special_tokens=add_special_tokens)
        return list(self._ask("Tokenize", request).token_ids)

    def detokenize(self, token_ids: list[int], *, model: str = "") -> str:
        """The text of token ids."""
        return str(self._ask("Detokenize", pb.DetokenizeRequest(model=model, token_ids=token_ids)).text)

    def models(self) -> list[str]:
        """What is served."""
        return [model.id for model in self._ask("ListModels", pb.ListModelsRequest()).models]

    def _ask(self, method: str, request: Any) -> Any:
        attempts = _Attempts(self._places, None)
        while True:
            try:
                return getattr(attempts.place.stub, method)(request, metadata=self._metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.failed(error))

    def _messages(self, stream: _Stream, call: Any) -> Iterator[pb.GenerateResponse]:
        while True:
            try:
                for message in call:
                    stream.take(message)
                    yield message
                return
            except grpc.RpcError as error:
                if stream.complete:
                    return
                pause = stream.failed(error)
            finally:
                call.cancel()
            time.sleep(pause)
            call = stream.open(self._metadata)

    def _gather(self, stream: _Stream) -> Response:
        gathered = Gathered()
        for message in self._messages(stream, stream.open(self._metadata)):
            gathered.add(message)
        return gathered.response()

    def _follow(self, stream: _Stream) -> Iterator[Output]:
        """The call has begun when this returns."""
        messages = self._messages(stream, stream.open(self._metadata))
        return (delta_of(one) for one in messages if not (one.HasField("usage") or one.prompt_logprobs))


class AsyncClient(_Base):
    """The same for asyncio."""

    def __init__(
        self,
        addresses: Addresses = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: bool | str = False,
        certificate: Certificate | None = None,
    ) -> None:
        """`addresses`: of gateways; one, several (also as one text, with commas), or a DNS name of theirs. `tls`: True,
        or a PEM file of the CAs that gateways' certificates are of, in place of the well-known ones. `certificate`:
        the client's own, for gateways that want one. Raises InvalidParameter."""
        super().__init__(grpc.aio, addresses, api_key, tls, certificate)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hangs up."""
        for place in self._places:
            await place.channel.close()

    async def generate(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Completes a text or token ids."""
        return await self._gather(self._generate(prompt, model, timeout, options))

    def stream(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Output]:
        """The same, piece by piece. Closing the iterator cancels the request."""
        return self._follow(self._generate(prompt, model, timeout, options))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Answers a conversation."""
        return await self._gather(self._chat(messages, model, timeout, options))

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Output]:
        """The same, piece by piece."""
        return self._follow(self._chat(messages, model, timeout, options))

    async def embed(
        self, inputs: Sequence[str | list[int]], *, model: str = "", dimensions: int | None = None
    ) -> list[list[float]]:
        """A vector for each text (or token ids)."""
        attempts, request = _Attempts(self._places, None), embed_request(inputs, model, dimensions)
        while True:
            try:
                answer = await attempts.place.stub.Embed(request, metadata=self._metadata)
                return [list(one.values) for one in answer.embeddings]
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.failed(error))

    async def _messages(self, stream: _Stream, call: Any) -> AsyncGenerator[pb.GenerateResponse]:
        while True:
            try:
                async for message in call:
                    stream.take(message)
                    yield message
                return
            except grpc.RpcError as error:
                if stream.complete:
                    return
                pause = stream.failed(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause)
            call = stream.open(self._metadata)

    async def _gather(self, stream: _Stream) -> Response:
        gathered = Gathered()
        async for message in self._messages(stream, stream.open(self._metadata)):
            gathered.add(message)
        return gathered.response()

    def _follow(self, stream: _Stream) -> AsyncIterator[Output]:
        """The call has begun when this returns."""
        return self._deltas(self._messages(stream, stream.open(self._metadata)))

    async def _deltas(self, messages: AsyncGenerator[pb.GenerateResponse]) -> AsyncIterator[Output]:
        async with aclosing(messages):
            async for message in messages:
                if not (message.HasField("usage") or message.prompt_logprobs):
                    yield delta_of(message)
