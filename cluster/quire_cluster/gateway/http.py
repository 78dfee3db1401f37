"""The OpenAI HTTP API."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import orjson
from quire_engine.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidParameter,
    LimitReached,
    PoisonRequest,
    PolicyStop,
    QueueFull,
    QuireError,
    RequestError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from quire_cluster.gateway import pooling
from quire_cluster.gateway.bodies import BodyTooLarge, read
from quire_cluster.gateway.chat import ChatCompletions
from quire_cluster.gateway.completions import MAX_PROMPTS, Completions
from quire_cluster.gateway.events import while_connected
from quire_cluster.gateway.models import Models
from quire_cluster.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    OfModel,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from quire_cluster.governance.callers import Permission
from quire_cluster.governance.identity import calling

log = logging.getLogger(__name__)
ModelBody = TypeVar("ModelBody", bound=OfModel)


class BadMethod(RequestError):
    """Not a route."""


def http_status(error: QuireError) -> int:
    """The status that an error stands for."""
    if isinstance(error, BodyTooLarge):
        return 413
    if isinstance(error, UnknownModel):
        return 404
    if isinstance(error, Unauthenticated):
        return 401
    if isinstance(error, Forbidden):
        return 403
    if isinstance(error, QueueFull | LimitReached):
        return 429
    if isinstance(error, DeadlineExceeded):
        return 408
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, Unavailable) else 500


def error_body(error: QuireError, status: int) -> dict[str, Any]:
    """OpenAI's shape."""
    kinds = {
        404: "not_found_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
        401: "authentication_error",
        403: "permission_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    parameter = error.parameter if isinstance(error, InvalidParameter) else None
    codes: dict[type[QuireError], str] = {
        UnknownModel: "model_not_found",
        QueueFull: "queue_full",
        LimitReached: "rate_limit_exceeded",
        PolicyStop: "content_filter",
    }
    code = codes.get(type(error))
    if _spent(error):
        kind = code = "insufficient_quota"
    return {"error": {"message": str(error), "type": kind, "param": parameter, "code": code}}


def _spent(error: QuireError) -> bool:
    """The month's budget is: that is another thing to OpenAI than a limit which is soon away."""
    return isinstance(error, LimitReached) and error.limit == "monthly_tokens"


def json_response(content: Any, status: int = 200) -> Response:
    """orjson's fast path."""
    return Response(orjson.dumps(content), status, media_type="application/json")


def error_response(error: QuireError) -> Response:
    """With Retry-After where trying again can help."""
    status = http_status(error)
    response = json_response(error_body(error, status), status)
    if status in (429, 503):
        wait = error.retry_after if isinstance(error, Unavailable | LimitReached) else 1.0
        response.headers["Retry-After"] = str(math.ceil(wait))
    if isinstance(error, LimitReached):
        response.headers.update(error.headers)
    if isinstance(error, PoisonRequest) or _spent(error):
        response.headers["x-should-retry"] = "false"  # OpenAI's clients try again after any other 500 or 429
    if status == 413:
        response.headers["Connection"] = "close"
    return response


class Api:
    """The routes over all models."""

    def __init__(self, models: Models, more: Sequence[Route] = ()) -> None:
        """`more`: routes besides."""
        self._models = models
        self.routes = [
            Route("/v1/models", self._guarded(self.models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self.model), methods=["GET"]),
            Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self.embeddings), methods=["POST"]),
            Route("/v1/score", self._guarded(self.score), methods=["POST"]),
            *(Route(f"{root}/rerank", self._guarded(self.rerank), methods=["POST"]) for root in ("", "/v1", "/v2")),
            Route("/tokenize", self._guarded(self.tokenize), methods=["POST"]),
            Route("/detokenize", self._guarded(self.detokenize), methods=["POST"]),
            *more,
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/metrics", self._guarded(self.metrics, Permission.READ), methods=["GET"]),
        ]

    def app(self) -> ASGIApp:
        """The ASGI application, without doors."""
        handlers: dict[Any, Any] = {404: self._no_route, 405: self._no_route}
        return Starlette(routes=self.routes, exception_handlers=handlers)

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]], needs: Permission = Permission.USE
    ) -> Callable[[Request], Awaitable[Response]]:
        """For callers who may. Errors become OpenAI's; what is not ours to tell stays in the log."""

        async def handle(request: Request) -> Response:
            try:
                calling().check(needs)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except QuireError as error:
                model = getattr(request.state, "model", None)
                self._models.refused(error, route=request.url.path, model=model)
                return error_response(error)
            except Exception:  # a bug of ours: the caller gets its 500, and the log the cause
                log.exception("a request to %s failed", request.url.path)
                return json_response(error_body(QuireError("internal error; it is in the server's log"), 500), 500)

        return handle

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "the routes raise no other for these"
        status = error.status_code
        response = json_response(
            error_body(BadMethod(f"{request.method} {request.url.path} is not served"), status), status
        )
        response.headers.update(error.headers or {})  # Allow
        return response

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        models = self._models
        caller = calling()
        return json_response({"object": "list", "data": [models.described(n, caller) for n in models.names(caller)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        name = request.path_params["name"]
        if not name:
            return await self.models(request)
        return json_response(self._models.described(name, calling()))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = await self._read(request, CompletionRequest, prompts=MAX_PROMPTS)
        return await Completions(await self._models.find(body.model, calling()), body, request).respond()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = await self._read(request, ChatCompletionRequest)
        return await ChatCompletions(await self._models.find(body.model, calling()), body, request).respond()

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        body = await self._read(request, EmbeddingRequest, prompts=pooling.MAX_INPUTS)
        service = await self._models.find(body.model, calling())
        return json_response(await while_connected(request, pooling.embeddings(service, body, calling())))

    async def score(self, request: Request) -> Response:
        """POST /v1/score"""
        body = await self._read(request, ScoreRequest, prompts=pooling.MAX_INPUTS)
        service = await self._models.find(body.model, calling())
        return json_response(await while_connected(request, pooling.score(service, body, calling())))

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank, /v2/rerank and /rerank"""
        body = await self._read(request, RerankRequest, prompts=pooling.MAX_INPUTS)
        service = await self._models.find(body.model, calling())
        return json_response(await while_connected(request, pooling.rerank(service, body, calling())))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        body = await self._read(request, TokenizeRequest)
        service = await self._models.find(body.model, calling())
        if (body.prompt is None) == (body.messages is None):
            raise InvalidParameter("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens, _ = await service.render(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=False,
            )
        else:
            tokens = await service.texts.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        content: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            content["token_strs"] = await service.texts.spellings(tokens)
        return json_response(content)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        body = await self._read(request, DetokenizeRequest)
        service = await self._models.find(body.model, calling())
        return json_response({"prompt": await service.texts.decode(body.tokens)})

    async def _read(self, request: Request, kind: type[ModelBody], *, prompts: int = 1) -> ModelBody:
        """A body that so many prompts fit in."""
        body = await read(request, kind, self._models.largest_body(prompts))
        request.state.model = body.model
        return body

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the first replica starts, and then while every replica is there and makes progress."""
        trouble = self._models.trouble
        return json_response({"status": trouble or "ok"}, 503 if trouble else 200)

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 while requests are served, and by how many replicas."""
        models = self._models
        if models.ready:
            return json_response({"status": "ready", "replicas": models.replicas})
        return json_response({"status": "draining" if models.draining else "starting"}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self._models.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
