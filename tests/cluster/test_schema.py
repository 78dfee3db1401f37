"""The schemas of the OpenAI API, walked field by field."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from gateways import models_of
from pydantic.fields import FieldInfo
from quire_cluster.gateway import schema
from quire_cluster.gateway.bodies import parse
from quire_cluster.gateway.fields import Strict, WithoutEffect
from quire_cluster.gateway.http import Api
from quire_cluster.gateway.service import Service
from quire_cluster.observability.metrics import Metrics
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.weights.resolve import find_model
from starlette.applications import Starlette
from starlette.routing import Route

MESSAGES = [{"role": "user", "content": "x"}]
LEAST: dict[type[Strict], dict[str, Any]] = {
    schema.CompletionRequest: {"prompt": "x"},
    schema.ChatCompletionRequest: {"messages": MESSAGES},
    schema.EmbeddingRequest: {"input": "x"},
    schema.ScoreRequest: {"text_1": "x", "text_2": "y"},
    schema.RerankRequest: {"query": "x", "documents": ["y"]},
    schema.TokenizeRequest: {},
    schema.DetokenizeRequest: {"tokens": [1]},
    schema.StreamOptions: {},
    schema.ResponseFormat: {"type": "text"},
    schema.JsonSchemaFormat: {},
}
FIELDS = [(kind, name, field) for kind in LEAST for name, field in kind.model_fields.items()]
NAMES = [f"{kind.__name__}.{name}" for kind, name, _ in FIELDS]


def kinds() -> set[type[Strict]]:
    return {one for one in vars(schema).values() if isinstance(one, type) and issubclass(one, Strict)}


def test_every_schema_is_walked() -> None:
    assert LEAST.keys() == {kind for kind in kinds() if kind.model_fields and kind.__name__[0] != "_"} - {
        Strict,
        schema.OfModel,
    }


@pytest.mark.parametrize(("kind", "name", "field"), FIELDS, ids=NAMES)
def test_null_is_left_out(kind: type[Strict], name: str, field: FieldInfo) -> None:
    body = LEAST[kind]
    if field.is_required():
        with pytest.raises(InvalidParameter, match=name):
            parse(kind, orjson.dumps(body | {name: None}))
    else:
        assert parse(kind, orjson.dumps(body | {name: None})) == parse(kind, orjson.dumps(body))


@pytest.mark.parametrize(("kind", "name", "field"), FIELDS, ids=NAMES)
def test_integers_are_bounded(kind: type[Strict], name: str, field: FieldInfo) -> None:
    """A value that no answer could come of is refused, or makes sampling parameters that are: never another error."""
    for value in (2**31, -(2**31) - 1, 2**63, 2**64, 10**30, [2**31], [-1], [[2**40]], {"5": 2**40}, {str(2**40): 1}):
        try:
            request = parse(kind, json.dumps(LEAST[kind] | {name: value}).encode())
            if isinstance(request, (schema.CompletionRequest, schema.ChatCompletionRequest)):
                params = request.sampling()
                for bounded in ("n", "max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs"):
                    assert -1 <= (getattr(params, bounded) or 0) < 2**31
                assert -(2**31) <= request.priority < 2**31, "as the protocol has it"
        except InvalidParameter as error:
            assert len(str(error)) < 400


def test_a_name_without_a_value_asks_for_nothing() -> None:
    """Clients made from OpenAI's schema write a null for each field that they know."""
    body = {"messages": MESSAGES}
    unset = {
        "functions": None,
        "audio": None,
        "web_search_options": None,
        "stream": True,
        "stream_options": {"x": None},
    }
    parsed = parse(schema.ChatCompletionRequest, orjson.dumps(body | unset))
    given = body | {"stream": True, "stream_options": {}}
    assert parsed == parse(schema.ChatCompletionRequest, orjson.dumps(given))


def test_unknown_fields_are_named_wherever_they_are() -> None:
    for body, name in (({"audience": []}, "audience"), ({"stream": True, "stream_options": {"x": 1}}, "x")):
        with pytest.raises(InvalidParameter, match=rf"\b{name} is not a parameter"):
            parse(schema.ChatCompletionRequest, orjson.dumps({"messages": MESSAGES} | body))


IGNORED = {
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "user": "me",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "verbosity": "low",
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}


def test_what_asks_for_nothing_is_accepted() -> None:
    request = parse(schema.ChatCompletionRequest, orjson.dumps({"messages": MESSAGES} | IGNORED))
    request.sampling()
    assert request.template_variables(frozenset()) == {}
    assert request.template_variables(frozenset({"verbosity"})) == {"verbosity": "low"}
    cached = [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}]
    [message] = parse(schema.ChatCompletionRequest, orjson.dumps({"messages": cached})).messages
    assert message.for_template()["content"] == [{"type": "text", "text": "x"}]


@pytest.mark.parametrize(
    "body",
    [
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"web_search_options": {}},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "grammar"}},
        {"logit_bias": {"x": 1}},
        {"reasoning_effort": "high"},
        {"chat_template": "{{ 1 }}"},
        {"structured_outputs": {"choices": ["a"]}},
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}},
        {"guided_json": {}},
    ],
    ids=lambda body: next(iter(body)),
)
def test_what_would_change_the_answer_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(body))):
        request = parse(schema.ChatCompletionRequest, orjson.dumps({"messages": MESSAGES} | body))
        request.sampling()
        request.tool_use()
        request.template_variables(frozenset())


def test_the_old_names_of_tools_are_refused_with_the_new_ones() -> None:
    for old, new in {"functions": "tools", "function_call": "tool_choice"}.items():
        with pytest.raises(InvalidParameter, match=f"{old} is not served; write {new}"):
            parse(schema.ChatCompletionRequest, orjson.dumps({"messages": MESSAGES, old: "auto"}))


def test_routes_and_fields_beyond_openai_are_in_the_docs(checkpoint: Callable[[str], Path]) -> None:
    """OpenAI's are those that its own client knows."""
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    config = EngineConfig(model=str(checkpoint("llama")))
    app = Api(
        models_of(Service.load(find_model(config), config, names=["tiny"], chat_template=None, metrics=Metrics()))
    ).app()
    assert isinstance(app, Starlette)
    for route in app.routes:
        assert isinstance(route, Route)
        assert re.search(rf"[ `]{re.escape(route.path.replace(':path', ''))}`", text), route.path
    for kind, theirs in (
        (schema.CompletionRequest, openai.types.completion_create_params.CompletionCreateParamsBase),
        (schema.ChatCompletionRequest, openai.types.chat.completion_create_params.CompletionCreateParamsBase),
    ):
        for name in kind.model_fields.keys() - theirs.__annotations__.keys() - {"stream"}:
            assert re.search(rf"`(\w+\.)?{name}`", text), name


@pytest.mark.parametrize(
    "body", [{"suffix": "x"}, {"best_of": 2}, {"best_of": 2, "n": 3}, {"guided_regex": "a"}], ids=str
)
def test_what_would_change_a_text_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(body))):
        parse(schema.CompletionRequest, orjson.dumps({"prompt": "x"} | body)).sampling()


def test_the_table_of_fields_without_effect() -> None:
    """docs/api.md lists what the schemas mark, for each route."""
    routes = {
        schema.CompletionRequest: "completions",
        schema.ChatCompletionRequest: "chat",
        schema.EmbeddingRequest: "embeddings",
        schema.ScoreRequest: "score",
        schema.RerankRequest: "rerank",
    }
    marked: dict[str, set[str]] = {}
    for kind, route in routes.items():
        of_kind = dict(kind.model_fields)
        if "stream_options" in of_kind:
            of_kind |= {f"stream_options.{name}": field for name, field in schema.StreamOptions.model_fields.items()}
        for name, field in of_kind.items():
            if any(isinstance(one, WithoutEffect) for one in field.metadata):
                marked.setdefault(name, set()).add(route)
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    section = text.partition("## Fields without effect")[2].partition("\n## ")[0]
    listed = {name: set(routes.split(", ")) for name, routes in re.findall(r"^\| `(\S+)` \| ([^|]+) \|", section, re.M)}
    assert listed == marked
