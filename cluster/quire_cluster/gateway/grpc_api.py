"""The gRPC API for clients, with the health service and reflection."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from quire_engine.errors import (
    ContextTooLong,
    DeadlineExceeded,
    InvalidParameter,
    LimitReached,
    QuireError,
)
from quire_engine.step import TokenLogprobs
from quire_engine.text.formats.chat import Answer
from quire_engine.text.messages import text_of
from quire_engine.text.params import SamplingParams
from quire_protos.v1 import governance_pb2_grpc, inference_pb2_grpc
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1.refusal_pb2 import RetryInfo, RichStatus

from quire_cluster.addresses import with_port
from quire_cluster.gateway import reflection
from quire_cluster.gateway.call_errors import CallErrors, status_code
from quire_cluster.gateway.calls import CallGuard, refuse
from quire_cluster.gateway.connection import Limits
from quire_cluster.gateway.fields import MAX_MESSAGES
from quire_cluster.gateway.generation import Call, Delta, Emitted, Generation
from quire_cluster.gateway.governance_api import SERVICE as GOVERNANCE
from quire_cluster.gateway.governance_api import GovernanceService
from quire_cluster.gateway.governed import leave
from quire_cluster.gateway.grpc_messages import conversation, read_json
from quire_cluster.gateway.images import NO_IMAGES, SeenImages
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.pooling import check_count, pooled, shortened, tokens_of
from quire_cluster.gateway.service import Service
from quire_cluster.gateway.texts import MAX_LISTED
from quire_cluster.gateway.tls import Tls
from quire_cluster.governance.callers import Caller, Permission
from quire_cluster.governance.checks.policing import InputCheck
from quire_cluster.governance.identity import CallerCheck, Identity, calling
from quire_cluster.governance.limits import Permit

MAX_REQUEST = 8 << 20  # bytes; a message of many small parts takes long to read, and the loop waits for it
MAX_ANSWER = 32 << 20
_FRAME = 64  # bytes around a vector, at most
_POSITIONS = 4096  # of which the log-probabilities go in one message
_METADATA = 16 << 10
_STREAMS = 1024  # of one connection
_IDLE = 600  # seconds without a call
_PINGS = 10  # seconds between them, at least
SERVICE = "quire.v1.Inference"
_SCALARS = [
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logprobs",
    "prompt_logprobs",
    "thinking_token_budget",
]
Asked = tuple[list[int], SeenImages, Answer | None]  # a prompt, its images, and how its answers are read
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def sampling_from_proto(message: pb.SamplingParams, *, max_tokens: int | None) -> SamplingParams:
    """Fields left out take their defaults; `max_tokens` is the default of this call. Raises InvalidParameter."""
    given: dict[str, Any] = {"max_tokens": max_tokens}
    given |= {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    for name in _LISTS:
        values = getattr(message, name)
        if len(values) > 100_000:
            raise InvalidParameter(f"{name} has {len(values)} entries", name)
        if values:
            given[name] = list(values)
    if message.logit_bias:
        given["logit_bias"] = dict(message.logit_bias)
    if message.HasField("structured_outputs"):
        given["structured_outputs"] = _structure(message.structured_outputs)
    return SamplingParams(**given)


def _structure(message: pb.StructuredOutputs) -> dict[str, Any]:
    kind = message.WhichOneof("kind")
    if kind is None:
        return {}
    return {kind: list(message.choice.texts) if kind == "choice" else getattr(message, kind)}


def _ids(given: Sequence[int], most: int, name: str) -> list[int]:
    """Counted before they are copied. Raises ContextTooLong."""
    if len(given) > most:
        raise ContextTooLong(f"{name} has {len(given)} token ids; at most {most} fit; shorten it", name)
    return list(given)


def _emitted(given: Sequence[pb.Emitted], most: int) -> dict[int, Emitted]:
    """By the choice. Raises InvalidParameter."""
    found: dict[int, Emitted] = {}
    if (total := sum(len(one.token_ids) for one in given)) > MAX_LISTED:
        raise InvalidParameter(f"resume has {total} tokens; at most {MAX_LISTED} are read", "resume")
    for one in given:
        if one.index in found:
            raise InvalidParameter(f"resume has answer {one.index} twice", "resume")
        found[one.index] = Emitted(_ids(one.token_ids, most, "resume"), one.finished)
    return found


async def _fail(context: Any, error: QuireError) -> NoReturn:
    """With the parameter's name, which over HTTP has a field of its own, and with the time until it may be repeated."""
    if isinstance(error, LimitReached):
        context.set_trailing_metadata((("grpc-status-details-bin", retry_details(error)),))
    name, said = error.parameter if isinstance(error, InvalidParameter) else None, str(error)
    await refuse(context, status_code(error), said if name is None or name in said else f"{name}: {said}")


def retry_details(error: LimitReached) -> bytes:
    """google.rpc.Status with a google.rpc.RetryInfo."""
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(math.ceil(error.retry_after * 1000) * 1_000_000)
    status = RichStatus(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=str(error))
    status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=info.SerializeToString())
    return status.SerializeToString()


def _user() -> Caller:
    """Who calls. Raises Forbidden where it may not use models."""
    caller = calling()
    caller.check(Permission.USE)
    return caller


def _salt(request: Any) -> bytes:
    return calling().tenant.salt(request.cache_salt)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Inference over all models."""

    def __init__(self, models: Models, write_timeout: float) -> None:
        """`write_timeout`: seconds that a client may leave a message of a stream unread."""
        self._models = models
        self._write_timeout = write_timeout

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Text or token ids in, tokens out."""

        async def asked(service: Service, params: SamplingParams, check: InputCheck | None) -> Asked:
            if request.WhichOneof("prompt") == "text":
                return *await service.prompt(request.text, list(request.images), _salt(request), check), None
            if request.images:
                raise InvalidParameter("images stand in a text; send the prompt as one", "images")
            if check is not None:
                check.no_token_ids("prompt")
            return _ids(request.token_ids.ids, service.max_model_len, "prompt"), NO_IMAGES, None

        await self._write(self._run("Generate", request, asked, 16, context), context)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:
        """A conversation in, the answer out."""

        async def asked(service: Service, params: SamplingParams, check: InputCheck | None) -> Asked:
            if not 1 <= len(request.messages) <= MAX_MESSAGES:
                raise InvalidParameter(
                    f"there are {len(request.messages)} messages; from 1 to {MAX_MESSAGES} are read", "messages"
                )
            messages, tools, use = await asyncio.to_thread(conversation, request)
            going_on = request.continue_final_message
            opening = request.add_generation_prompt if request.HasField("add_generation_prompt") else not going_on
            if going_on and opening:
                raise InvalidParameter(
                    "continue_final_message and add_generation_prompt exclude each other",
                    "continue_final_message",
                )
            variables = {}
            if request.HasField("chat_template_kwargs"):
                variables = read_json(request.chat_template_kwargs, "chat_template_kwargs", "chat_template_kwargs")
                if not isinstance(variables, dict):
                    raise InvalidParameter("chat_template_kwargs are no JSON object", "chat_template_kwargs")
            prompt, seen = await service.render(
                messages,
                add_generation_prompt=opening,
                continue_final_message=going_on,
                variables=variables,
                tools=tools or None,
                salt=_salt(request),
                check=check,
            )
            continued = text_of(messages[-1]["content"]) if going_on else None
            return prompt, seen, await service.answer(prompt, use, params, continued=continued)

        await self._write(self._run("Chat", request, asked, None, context), context)

    async def _write(self, responses: AsyncGenerator[pb.GenerateResponse], context: Any) -> None:
        """One after the other. A client that makes no room for the next in time loses the call."""
        async with contextlib.aclosing(responses):
            async for response in responses:
                try:
                    async with asyncio.timeout(self._write_timeout):
                        await context.write(response)
                except TimeoutError:
                    break
            else:
                return
        await _fail(context, DeadlineExceeded(f"the answer was left unread for {self._write_timeout:g} s"))

    async def _run(
        self,
        route: str,
        request: Any,
        asked: Callable[[Service, SamplingParams, InputCheck | None], Awaitable[Asked]],
        max_tokens: int | None,
        context: Any,
    ) -> AsyncGenerator[pb.GenerateResponse]:
        service: Service | None = None
        generation: Generation | None = None
        permit: Permit | None = None
        try:
            service = await self._models.find(request.model, _user())
            service.check_generates()
            params = sampling_from_proto(request.sampling, max_tokens=max_tokens)
            left = context.time_remaining()
            check = service.input_check()
            tokens, seen, answer = await asked(service, params, check)
            sampling = await service.sampling(params, answer)
            emitted = _emitted(request.resume, service.max_model_len)
            permit = await service.admit(calling(), [tokens], params)
            call = Call(
                route=route,
                caller=calling(),
                priority=request.priority,
                deadline=time.monotonic() + left if left is not None and left < 1e8 else 0.0,
                cache_salt=request.cache_salt or None,
                longest_answer=permit.longest_answer if permit is not None else None,
                verdicts=check.verdicts if check is not None else (),
            )
            if emitted:
                generation = await service.resume(tokens, sampling, emitted, call, seen=seen)
            else:
                generation = service.start(tokens, sampling, call, seen=seen)
            while deltas := await generation.deltas():
                for delta in deltas:
                    if delta.error is not None:
                        raise delta.error
                    yield _response(service, generation, delta)
            async for response in _last(service, generation):
                yield response
        except QuireError as error:
            if generation is None:
                self._models.refused(error, route=route, model=request.model)
            await _fail(context, error)
        finally:
            if service is not None and generation is not None:
                service.finished(generation)
            leave(permit, [generation] if generation is not None else [])

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """A vector per input."""
        left = context.time_remaining()
        deadline = time.monotonic() + left if left is not None and left < 1e8 else 0.0
        try:
            service = await self._models.find(request.model, _user())
            dimensions = request.dimensions if request.HasField("dimensions") else None
            check_count(len(request.inputs))
            _check_answer(service, len(request.inputs), dimensions)
            longest, check = service.max_model_len, service.input_check()
            tokens = await tokens_of(
                service,
                [
                    one.text if one.WhichOneof("input") == "text" else _ids(one.token_ids.ids, longest, "inputs")
                    for one in request.inputs
                ],
                check,
            )
            verdicts = check.verdicts if check is not None else ()
            call = Call(route="Embed", caller=calling(), deadline=deadline, verdicts=verdicts)
            vectors = await pooled(service, tokens, call, scores=False)
            embeddings = await asyncio.to_thread(
                lambda: [pb.Embedding(values=shortened(vector, dimensions)) for vector in vectors]
            )
        except QuireError as error:
            self._models.refused(error, route="Embed", model=request.model)
            await _fail(context, error)
        return pb.EmbedResponse(embeddings=embeddings, usage=pb.Usage(prompt_tokens=sum(map(len, tokens))))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids of a text."""
        try:
            service = await self._models.find(request.model, _user())
            special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            tokens = await service.texts.encode(request.text, add_special_tokens=special)
        except QuireError as error:
            await _fail(context, error)
        return pb.TokenizeResponse(token_ids=tokens, max_model_len=service.max_model_len)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """The text of token ids."""
        try:
            service = await self._models.find(request.model, _user())
            text = await service.texts.decode(_ids(request.token_ids, MAX_LISTED, "token_ids"))
        except QuireError as error:
            await _fail(context, error)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """What is served."""
        try:
            caller = _user()
        except QuireError as error:
            await _fail(context, error)
        described = [self._models.described(name, caller) for name in self._models.names(caller)]
        return pb.ListModelsResponse(
            models=[
                pb.Model(**{name: one[name] for name in ("id", "max_model_len", "state", "input_modalities")})
                for one in described
            ]
        )


def _response(service: Service, generation: Generation, delta: Delta) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=generation.facts.request_id,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        reasoning=delta.shown.reasoning,
    )
    for part in delta.shown.calls:
        call = response.calls.add(index=part.index, arguments=part.arguments)
        if part.name is not None:
            call.name, call.id = part.name, generation.call_id(delta.index, part.index)
    for scores in delta.logprobs:
        response.logprobs.append(_position(service, scores, 0))
    if delta.finish_reason is not None:
        response.finish_reason = delta.finish_reason
        if delta.stop_reason is not None:
            response.stop_reason = str(delta.stop_reason)
    return response


async def _last(service: Service, generation: Generation) -> AsyncGenerator[pb.GenerateResponse]:
    """The prompt's scores, in as many messages as they need, and the usage."""
    response = pb.GenerateResponse(request_id=generation.facts.request_id)
    scored = [(scores, at) for scores in generation.choices[0].prompt_logprobs for at in range(len(scores.chosen))]
    for start in range(0, len(scored), _POSITIONS):
        share = scored[start : start + _POSITIONS]
        positions = await asyncio.to_thread(_positions, service, share)
        response.prompt_logprobs.extend(positions)
        if start + _POSITIONS < len(scored):
            yield response
            response = pb.GenerateResponse(request_id=generation.facts.request_id)
    response.usage.prompt_tokens = len(generation.facts.prompt)
    response.usage.completion_tokens = generation.num_output_tokens
    response.usage.cached_tokens = generation.cached_tokens
    response.usage.reasoning_tokens = generation.num_reasoning_tokens
    response.usage.image_tokens = generation.facts.seen.num_tokens
    for choice in generation.choices:
        for one in generation.verdicts(choice.index):
            response.verdicts.add(
                index=choice.index, policy=one.rule, action=one.action, stage=one.stage, kind=one.kind, count=one.count
            )
    yield response


def _positions(service: Service, scored: list[tuple[TokenLogprobs, int]]) -> list[pb.PositionLogprobs]:
    return [_position(service, scores, at) for scores, at in scored]


def _position(service: Service, scores: TokenLogprobs, at: int) -> pb.PositionLogprobs:
    text = service.tokenizer.token_text

    def entry(token: int, value: float, rank: int) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=token, token=text(token), logprob=value, rank=rank)

    pairs = zip(scores.top_ids[at].tolist(), scores.top_logprobs[at].tolist(), strict=True)
    return pb.PositionLogprobs(
        chosen=entry(int(scores.chosen[at]), float(scores.logprobs[at]), int(scores.ranks[at])),
        top=[entry(token, value, rank + 1) for rank, (token, value) in enumerate(pairs)],
    )


def _check_answer(service: Service, count: int, dimensions: int | None) -> None:
    """Raises InvalidParameter for vectors that one message could not hold, before they are computed."""
    size = min(dimensions or service.vector_size, service.vector_size)
    most = max(1, (MAX_ANSWER - _FRAME) // (4 * size + _FRAME)) if size else count
    if count > most:
        raise InvalidParameter(
            f"{count} vectors of {size} numbers are more than one answer holds; send at most {most} inputs at once",
            "inputs",
        )


class GrpcServer:
    """The server with its health and reflection services."""

    def __init__(
        self,
        models: Models,
        limits: Limits,
        *,
        identity: Identity | None,
        governance: GovernanceService | None = None,
        shared_port: bool = False,
        tls: Tls | None = None,
    ) -> None:
        """`identity`: knows who may call more than the health service; None: anybody. `governance`: of administrators.
        `shared_port`: other gateways of this host may listen on the same one. `tls`: None: calls are not encrypted."""
        self._tls = tls
        doors: list[Any] = [CallerCheck(identity, open_services=[health.SERVICE_NAME])] if identity is not None else []
        errors: list[Any] = []
        if governance is not None:
            errors = [CallErrors(GOVERNANCE, lambda method, message: governance.check(method))]
        self._server = grpc.aio.server(
            interceptors=[*doors, CallGuard(limits.body), *errors],
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST),
                ("grpc.max_send_message_length", MAX_ANSWER),
                ("grpc.so_reuseport", int(shared_port)),
                ("grpc.max_metadata_size", _METADATA),
                ("grpc.absolute_max_metadata_size", _METADATA),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.server_handshake_timeout_ms", int(limits.head * 1000)),
                ("grpc.max_connection_idle_ms", _IDLE * 1000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),  # for TCP's acknowledgement
                ("grpc.http2.ping_timeout_ms", 20_000),  # for the client's answer
                ("grpc.http2.min_ping_interval_without_data_ms", _PINGS * 1000),
            ],
            maximum_concurrent_rpcs=limits.connections,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(models, limits.write), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = [SERVICE, health.SERVICE_NAME]
        if governance is not None:
            governance_pb2_grpc.add_GovernanceServicer_to_server(governance, self._server)
            services.append(GOVERNANCE.full_name)
        reflection.enable(tuple(services), self._server)

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; the port it got. Raises InvalidParameter when the port is taken."""
        address = with_port(host, port)
        try:
            if self._tls is None:
                bound = int(self._server.add_insecure_port(address))
            else:
                bound = int(self._server.add_secure_port(address, self._tls.grpc_credentials()))
        except RuntimeError as error:  # it says no more than that
            raise InvalidParameter(
                f"cannot listen on {address}; choose another with --grpc-port", "grpc_port"
            ) from error
        await self._server.start()
        await self.set_serving(False)
        return bound

    async def wait(self) -> None:
        """Until it has stopped. Raises what it failed with."""
        await self._server.wait_for_termination()

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, state)

    async def stop(self, grace: float) -> None:
        """Refuses new calls, and ends the running ones after `grace` seconds."""
        await self._server.stop(grace)
