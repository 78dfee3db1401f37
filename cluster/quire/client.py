"""A gRPC client, sync and async. `Client("host:50051").chat([...])`; the `stream` methods give deltas as they come."""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from quire_cluster.addresses import host_of, is_loopback
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


def _options(address: str) -> list[tuple[str, int]]:
    """Of a channel. A proxy that the environment names cannot lead back to this machine."""
    return [*_OPTIONS, ("grpc.enable_http_proxy", 0)] if is_loopback(host_of(address)) else _OPTIONS


@dataclass
class Output:
    """One choice: whole, or (in a stream) what is new of it."""

    index: int = 0
    text: str = ""
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
    prompt_logprobs: list[Any]

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.outputs[0].text


def _sampling(options: dict[str, Any]) -> pb.SamplingParams:
    """Raises InvalidParameter for what cannot be sent: an unknown name, another type, too large a number."""
    message = pb.SamplingParams()
    for name, value in options.items():
        try:
            message.MergeFrom(pb.SamplingParams(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidParameter(f"{name} cannot be sent: {error}", name) from error
    return message


def _metadata(api_key: str | None) -> list[tuple[str, str]]:
    """Raises InvalidParameter for a key that no header can carry."""
    if not api_key:
        return []
    if not (api_key.isascii() and api_key.isprintable()):
        raise InvalidParameter("api_key holds other characters than visible ASCII ones", "api_key")
    return [("authorization", f"Bearer {api_key}")]


def _generate_request(prompt: str | list[int], model: str, options: dict[str, Any]) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=model, priority=options.pop("priority", None), cache_salt=options.pop("cache_salt", None)
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    request.sampling.CopyFrom(_sampling(options))
    return request


def _chat_request(messages: list[dict[str, str]], model: str, options: dict[str, Any]) -> pb.ChatRequest:
    own = {
        name: options.pop(name, None)
        for name in ("priority", "cache_salt", "add_generation_prompt", "continue_final_message")
    }
    request = pb.ChatRequest(model=model, **own)
    for message in messages:
        request.messages.add(**message)
    request.sampling.CopyFrom(_sampling(options))
    return request


def _embed_request(inputs: Sequence[str | list[int]], dimensions: int | None) -> pb.EmbedRequest:
    request = pb.EmbedRequest(dimensions=dimensions)
    for given in inputs:
        if isinstance(given, str):
            request.inputs.add(text=given)
        else:
            request.inputs.add(token_ids=pb.TokenIds(ids=given))
    return request


def _delta(message: pb.GenerateResponse) -> Output:
    return Output(
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=list(message.logprobs),
        finish_reason=message.finish_reason if message.HasField("finish_reason") else None,
        stop_reason=message.stop_reason if message.HasField("stop_reason") else None,
    )


class _Gathered:
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
        delta = _delta(message)
        whole = self._outputs.setdefault(delta.index, Output(delta.index))
        whole.text += delta.text
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
            prompt_logprobs=self._prompt_logprobs,
        )


class _Base:
    _stub: Any

    def __init__(self, api_key: str | None) -> None:
        self._metadata = _metadata(api_key)

    def _generate(self, prompt: str | list[int], model: str, timeout: float | None, options: dict[str, Any]) -> Any:
        request = _generate_request(prompt, model, options)
        return self._stub.Generate(request, timeout=timeout, metadata=self._metadata)

    def _chat(self, messages: list[dict[str, str]], model: str, timeout: float | None, options: dict[str, Any]) -> Any:
        return self._stub.Chat(_chat_request(messages, model, options), timeout=timeout, metadata=self._metadata)


class Client(_Base):
    """Blocking. Options of `generate` and `chat` are the sampling parameters; errors are grpc.RpcError."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None) -> None:
        super().__init__(api_key)
        self._channel = grpc.insecure_channel(address, options=_options(address))
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up."""
        self._channel.close()

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
        self, messages: list[dict[str, str]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Answers a conversation."""
        return self._gather(self._chat(messages, model, timeout, options))

    def stream_chat(
        self, messages: list[dict[str, str]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Iterator[Output]:
        """The same, piece by piece."""
        return self._follow(self._chat(messages, model, timeout, options))

    def embed(self, inputs: Sequence[str | list[int]], *, dimensions: int | None = None) -> list[list[float]]:
        """A vector for each text (or token ids)."""
        request = _embed_request(inputs, dimensions)
        return [list(one.values) for one in self._stub.Embed(request, metadata=self._metadata).embeddings]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._stub.Tokenize(request, metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), metadata=self._metadata).text)

    def models(self) -> list[str]:
        """What is served."""
        return [model.id for model in self._stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata).models]

    @staticmethod
    def _gather(call: Any) -> Response:
        gathered = _Gathered()
        for message in call:
            gathered.add(message)
        return gathered.response()

    @staticmethod
    def _follow(call: Any) -> Iterator[Output]:
        try:
            for message in call:
                if not (message.HasField("usage") or message.prompt_logprobs):
                    yield _delta(message)
        finally:
            call.cancel()


class AsyncClient(_Base):
    """The same for asyncio."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None) -> None:
        super().__init__(api_key)
        self._channel = grpc.aio.insecure_channel(address, options=_options(address))
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hangs up."""
        await self._channel.close()

    async def generate(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Completes a text or token ids."""
        return await self._gather(self._generate(prompt, model, timeout, options))

    def stream(
        self, prompt: str | list[int], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Output]:
        """The same, piece by piece."""
        return self._follow(self._generate(prompt, model, timeout, options))

    async def chat(
        self, messages: list[dict[str, str]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> Response:
        """Answers a conversation."""
        return await self._gather(self._chat(messages, model, timeout, options))

    def stream_chat(
        self, messages: list[dict[str, str]], *, model: str = "", timeout: float | None = None, **options: Any
    ) -> AsyncIterator[Output]:
        """The same, piece by piece."""
        return self._follow(self._chat(messages, model, timeout, options))

    async def embed(self, inputs: Sequence[str | list[int]], *, dimensions: int | None = None) -> list[list[float]]:
        """A vector for each text (or token ids)."""
        response = await self._stub.Embed(_embed_request(inputs, dimensions), metadata=self._metadata)
        return [list(one.values) for one in response.embeddings]

    @staticmethod
    async def _gather(call: Any) -> Response:
        gathered = _Gathered()
        async for message in call:
            gathered.add(message)
        return gathered.response()

    @staticmethod
    async def _follow(call: Any) -> AsyncIterator[Output]:
        try:
            async for message in call:
                if not (message.HasField("usage") or message.prompt_logprobs):
                    yield _delta(message)
        finally:
            call.cancel()
