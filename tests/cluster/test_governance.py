"""Who may call what: tenants, keys and roles, over HTTP and gRPC, at a real gateway over fake replicas."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from certificates import LOCAL, Authority, Pair
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from gateways import TOKENS, expected
from google.protobuf import json_format
from governed import TEST, Governed, bearer, governed
from quire_cluster.gateway.service import Service
from quire_cluster.governance import directory, tables
from quire_cluster.governance.callers import TenantConfig
from quire_engine.errors import InvalidParameter, QuireError
from quire_protos.v1 import governance_pb2 as pb
from quire_protos.v1 import inference_pb2
from sqlalchemy import update

MakeService = Callable[[], Service]
BODY = {"prompt": [5, 17, 30], "max_tokens": TOKENS}
CODE = grpc.StatusCode
# What each kind of caller gets: over HTTP of a route, over gRPC of a method.
CALLERS = ("none", "unknown", "revoked", "expired", "removed", "other", "user", "auditor", "admin")
USE = {"other": 404, "user": 200, "auditor": 403, "admin": 200}
LISTS = USE | {"other": 200}
NO_VECTORS = USE | {"user": 400, "admin": 400}  # of a model that gives text
READ = {"other": 403, "user": 403, "auditor": 200, "admin": 200}
CHANGE = {"other": 403, "user": 403, "auditor": 403, "admin": 200}
NOWHERE = dict.fromkeys(("other", "user", "auditor", "admin"), 404)
POST_ALONE = dict.fromkeys(("other", "user", "auditor", "admin"), 405)
_CHAT = {"messages": [{"role": "user", "content": "w5"}], "max_tokens": 2}
ROUTES: list[tuple[str, str, Any, dict[str, int]]] = [
    ("GET", "/v1/models", None, LISTS),
    ("GET", "/v1/models/a", None, USE),
    ("POST", "/v1/completions", BODY | {"model": "a"}, USE),
    ("POST", "/v1/completions", BODY | {"model": "a", "stream": True}, USE),
    ("POST", "/v1/chat/completions", _CHAT | {"model": "a"}, USE),
    ("POST", "/v1/embeddings", {"model": "a", "input": "w5"}, USE | {"user": 400, "admin": 400}),
    ("POST", "/v1/score", {"model": "a", "text_1": "w5", "text_2": "w6"}, USE | {"user": 400, "admin": 400}),
    *(
        (
            "POST",
            f"{root}/rerank",
            {"model": "a", "query": "w5", "documents": ["w6"]},
            USE | {"user": 400, "admin": 400},
        )
        for root in ("", "/v1", "/v2")
    ),
    ("POST", "/tokenize", {"model": "a", "prompt": "w5"}, USE),
    ("POST", "/detokenize", {"model": "a", "tokens": [5]}, USE),
    ("GET", "/metrics", None, READ),
    ("GET", "/nowhere", None, NOWHERE),
    ("GET", "/v1/completions", None, POST_ALONE),
    ("GET", "/quire.v1.Governance/openapi.json", None, READ),
    ("POST", "/quire.v1.Governance/Nothing", {}, NOWHERE),
    ("POST", "/quire.v1.Governance/AddTenant", {"name": "new"}, CHANGE),
    ("POST", "/quire.v1.Governance/SetTenant", {"tenant": {"name": "new", "weight": 2}}, CHANGE),
    ("POST", "/quire.v1.Governance/CreateKey", {"tenant": "new"}, CHANGE),
    ("POST", "/quire.v1.Governance/RotateKey", {"id": "$"}, CHANGE),
    ("POST", "/quire.v1.Governance/RevokeKey", {"id": "$"}, CHANGE),
    ("POST", "/quire.v1.Governance/RemoveTenant", {"name": "new"}, CHANGE),
    ("POST", "/quire.v1.Governance/ListTenants", {}, READ),
    ("POST", "/quire.v1.Governance/ListKeys", {}, READ),
    ("POST", "/quire.v1.Governance/GetUsage", {}, READ),
    ("POST", "/quire.v1.Governance/ListAudit", {}, READ),
    ("POST", "/quire.v1.Governance/VerifyAudit", {}, READ),
]
_OF_HTTP = {200: CODE.OK, 400: CODE.INVALID_ARGUMENT, 403: CODE.PERMISSION_DENIED, 404: CODE.NOT_FOUND}


async def callers(at: Governed) -> dict[str, str | None]:
    """A key of each kind."""
    for name, models in (("team", "a"), ("others", "b"), ("gone", "*"), ("staff", "*")):
        await at.tenant(name, models=models)
    made: dict[str, str | None] = {
        "none": None,
        "unknown": "qk-00000000-nobody",
        "revoked": await at.key("team"),
        "expired": await at.key("team"),
        "removed": await at.key("gone"),
        "other": await at.key("others"),
        "user": await at.key("team"),
        "auditor": await at.key("staff", role="auditor"),
        "admin": await at.key("staff", role="admin"),
    }
    await at.administration.revoke_key(str(made["revoked"])[:11], TEST)
    await at.administration.remove_tenant("gone", TEST)
    async with at.governor.database.transaction() as connection:
        expired = tables.keys.c.id == str(made["expired"])[:11]
        await connection.execute(update(tables.keys).where(expired).values(expires_at=1))
    await at.governor.directory.look()
    assert made.keys() == set(CALLERS)
    return made


def run(work: Any) -> None:
    asyncio.run(work)


def test_every_route_for_every_caller(service: MakeService, tmp_path: Path) -> None:
    """Over HTTP. Nothing but health and readiness answers who is not known."""

    async def work() -> None:
        async with governed(tmp_path, service, models=("a", "b")) as at:
            keys = await callers(at)
            named = {(method, path) for method, path, _, _ in ROUTES}
            for route in at.gateway.api.routes:
                if route.path not in ("/health", "/ready") and "{" not in route.path:
                    assert named & {(method, route.path) for method in route.methods or ()}, (
                        f"{route.path} is not tried"
                    )
            for method, path, body, expected_of in ROUTES:
                for kind, key in keys.items():
                    sent = json.loads(json.dumps(body).replace('"$"', f'"{await _fresh_id(at)}"')) if body else body
                    for headers in (bearer(key), {"x-api-key": key} if key else {}):
                        answer = await at.client.request(method, path, json=sent, headers=headers)
                        wanted = expected_of.get(kind, 401)
                        again = path.endswith(("AddTenant", "RevokeKey", "RemoveTenant", "RotateKey")) and wanted == 200
                        assert answer.status_code == wanted, (method, path, kind, answer.text)
                        if wanted == 401:
                            assert answer.json()["error"]["type"] == "authentication_error"
                            assert answer.headers["www-authenticate"] == "Bearer"
                        if again:
                            break  # the second time it would be another question
            for path in ("/health", "/ready"):
                assert (await at.client.get(path)).status_code == 200
            nonsense = await at.client.post(
                "/quire.v1.Governance/AddTenant", content=b"no JSON", headers=bearer(keys["user"])
            )
            assert nonsense.status_code == 403, "who may not is told so before anything is read"
            for body in (b"null", b"[]", b'"x"', b"{", b'{"tenant": "a", "tenant": "b"}'):
                wrong = await at.client.post(
                    "/quire.v1.Governance/ListTenants", content=body, headers=bearer(keys["admin"])
                )
                assert (wrong.status_code, "body" in wrong.json()["error"]["message"]) == (400, True), body
            await at.governor.writer.flush()
            found = [one.values for one in await at.governor.audit.list(kind="admin", limit=1000)]
            denied = {(one["action"], one["role"]) for one in found if one.get("refused") == "Forbidden"}
            assert {("AddTenant", "user"), ("AddTenant", "auditor"), ("ListAudit", "user")} <= denied

    run(work())


async def _fresh_id(at: Governed) -> str:
    facts, _ = await at.administration.create_key("team", TEST)
    return facts.id


def test_every_method_for_every_caller(service: MakeService, tmp_path: Path) -> None:
    """Over gRPC."""
    of_inference: dict[str, tuple[Any, dict[str, int]]] = {
        "Generate": ({"model": "a", "text": "w5"}, USE),
        "Chat": ({"model": "a", "messages": [{"role": "user", "content": "w5"}], "sampling": {"max_tokens": 2}}, USE),
        "Embed": ({"model": "a", "inputs": [{"text": "w5"}]}, NO_VECTORS),
        "Tokenize": ({"model": "a", "text": "w5"}, USE),
        "Detokenize": ({"model": "a", "token_ids": [5]}, USE),
        "ListModels": ({}, LISTS),
    }
    of_governance = {path.rpartition("/")[2]: (body, of) for _, path, body, of in ROUTES if "Governance/" in path}

    async def work() -> None:
        async with governed(tmp_path, service, models=("a", "b")) as at:
            keys = await callers(at)
            for file, known in ((inference_pb2, of_inference), (pb, of_governance)):
                [described] = file.DESCRIPTOR.services_by_name.values()
                async with grpc.aio.insecure_channel(at.address) as channel:
                    for name in described.methods_by_name:
                        assert name in known, f"{name} is not tried"
                    for name, (body, expected_of) in known.items():
                        if name not in described.methods_by_name:
                            continue
                        for kind, key in keys.items():
                            sent = json.dumps(body).replace('"$"', f'"{await _fresh_id(at)}"')
                            code = await _call(channel, described.methods_by_name[name], sent, bearer(key))
                            wanted = _OF_HTTP[expected_of[kind]] if kind in expected_of else CODE.UNAUTHENTICATED
                            assert code is wanted, (name, kind, code)

    run(work())


async def _call(channel: Any, method: Any, sent: str, headers: dict[str, str]) -> grpc.StatusCode:
    from google.protobuf.message_factory import GetMessageClass

    request = json_format.Parse(sent, GetMessageClass(method.input_type)())
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    stub = kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    call = stub(request, metadata=list(headers.items()), timeout=60)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODE.OK


def test_models_of_other_tenants_are_not_there(service: MakeService, tmp_path: Path) -> None:
    async def work() -> None:
        async with governed(tmp_path, service, models=("a", "b", "qwen3-4b")) as at:
            await at.tenant("team", models="qwen3-*,b")
            whole, narrow = await at.key("team"), await at.key("team", models=("qwen*", "a"))

            async def names(key: str) -> list[str]:
                answer = await at.client.get("/v1/models", headers=bearer(key))
                return [model["id"] for model in answer.json()["data"]]

            assert await names(whole) == ["b", "qwen3-4b"]
            assert await names(narrow) == ["qwen3-4b"], "a key's models are of its tenant's"
            answer = await at.client.post("/v1/completions", json=BODY | {"model": "a"}, headers=bearer(whole))
            unknown = await at.client.post("/v1/completions", json=BODY | {"model": "nope"}, headers=bearer(whole))
            assert answer.status_code == unknown.status_code == 404
            assert answer.json() == json.loads(unknown.text.replace("nope", "a")), "nor does it tell that there is one"
            alone = await at.client.post("/v1/completions", json=BODY, headers=bearer(narrow))
            assert (alone.status_code, alone.json()["model"]) == (200, "qwen3-4b"), "the only one need not be named"

    run(work())


def test_keys_live_and_end(service: MakeService, tmp_path: Path) -> None:
    async def work() -> None:
        async with governed(tmp_path, service) as at:
            await at.tenant("team")
            first = await at.key("team", lives=1000)

            async def status(key: str) -> int:
                await at.governor.directory.look()
                answer = await at.client.get("/v1/models", headers=bearer(key))
                assert key not in answer.text
                return answer.status_code

            assert await status(first) == 200
            assert await status(first[:-1]) == await status(first + "x") == await status(first[:11]) == 401
            facts, second = await at.administration.rotate_key(first[:11], TEST, overlap=500)
            assert facts.expires_at is not None
            assert facts.expires_at - facts.created_at == 1000, "it lives as long as the one before"
            assert await status(first) == await status(second) == 200, "both, for the overlap"
            old = next(one for one in await at.administration.keys("team") if one.id == first[:11])
            assert old.expires_at is not None
            assert old.expires_at - facts.created_at == 500
            _, third = await at.administration.rotate_key(second[:11], TEST, overlap=0)
            assert await status(second) == 401
            await at.administration.revoke_key(third[:11], TEST)
            assert await status(third) == 401
            for gone in (second, third):
                with pytest.raises(InvalidParameter):
                    await at.administration.rotate_key(gone[:11], TEST, overlap=0)
            with pytest.raises(InvalidParameter):
                await at.administration.revoke_key(third[:11], TEST)
            with pytest.raises(InvalidParameter):
                await at.administration.revoke_key(first, TEST)  # a whole key is no id, and is not repeated
            async with at.governor.database.transaction() as connection:
                rows = (await connection.execute(tables.keys.select())).all()
            kept = repr(rows)
            assert not any(key in kept or key[12:] in kept for key in (first, second, third)), "only hashes are kept"

    run(work())


def test_no_tenant_finds_what_another_sent(service: MakeService, tmp_path: Path) -> None:
    """The replica is told to keep their prompts apart, whatever salt they send."""

    async def work() -> None:
        async with governed(tmp_path, service) as at:
            for name, options in (("a", {}), ("b", {}), ("c", {"cache_group": "g"}), ("d", {"cache_group": "g"})):
                await at.tenant(name, **options)
            await at.tenant("g")  # a tenant of a group's name is not of the group
            salts: dict[tuple[str, str | None], bytes] = {}
            for name in "abcdg":
                key = await at.key(name)
                for salt in (None, "", "x", "a", "tenant", '["tenant", "a", ""]'):
                    body = BODY | ({"cache_salt": salt} if salt is not None else {})
                    answer = await at.client.post("/v1/completions", json=body, headers=bearer(key))
                    assert answer.status_code == 200
                    submitted = at.replicas["tiny"].submitted[-1]
                    salts[name, salt] = submitted.cache_salt
                    assert (submitted.tenant, submitted.weight) == (name, 1.0)
            for (one, first), left in salts.items():
                for (other, second), right in salts.items():
                    same_tenant = one == other or {one, other} == {"c", "d"}
                    assert (left == right) == (same_tenant and (first or "") == (second or "")), (
                        one,
                        first,
                        other,
                        second,
                    )
            assert all(salts.values()), "none is kept under no salt"

    run(work())


def test_without_its_database_a_gateway_goes_on_for_a_while(
    service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        ahead = 0.0

        @staticmethod
        def monotonic() -> float:
            return real() + Clock.ahead

        time = staticmethod(directory.time.time)

    real = directory.time.monotonic

    async def work() -> None:
        async with governed(tmp_path, service, text="grace: 100") as at:
            await at.tenant("team")
            key = await at.key("team")
            monkeypatch.setattr(directory, "time", Clock)
            database = tmp_path / "governance.db"
            database.rename(tmp_path / "away")
            database.mkdir()  # where no file can be opened
            with pytest.raises(QuireError):
                await at.governor.directory.look()
            answer = await at.client.post("/v1/completions", json=BODY, headers=bearer(key))
            assert answer.status_code == 200, "it knows the key"
            assert (await at.client.get("/v1/models", headers=bearer("qk-00000000-x"))).status_code == 401
            Clock.ahead = 101.0
            late = await at.client.post("/v1/completions", json=BODY, headers=bearer(key))
            assert (late.status_code, late.headers["retry-after"]) == (503, "5")
            database.rmdir()
            (tmp_path / "away").rename(database)
            await at.governor.directory.look()
            assert (await at.client.post("/v1/completions", json=BODY, headers=bearer(key))).status_code == 200
            await at.governor.writer.flush()
            report = await at.governor.audit.verify()
            assert report.fault is None
            found = await at.governor.audit.list(kind="request")
            assert len(found) == 2, "and what was served meanwhile is on record"

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_is_on_record_before_its_end_is_told(
    service: MakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def work() -> None:
        async with governed(tmp_path, service) as at:
            await at.tenant("team")
            key = await at.key("team")
            at.replicas["tiny"].cached = lambda submit: 2
            told = []
            append = at.governor.journal.append
            monkeypatch.setattr(at.governor.journal, "append", lambda one: (told.append(one), append(one)))
            body = BODY | {"stream": stream, "user": "u-1", "n": 2, "request_id": "mine"}
            async with at.client.stream("POST", "/v1/completions", json=body, headers=bearer(key)) as answer:
                async for line in answer.aiter_lines():
                    if stream and '"finish_reason":"length"' in line and told == []:
                        assert line.count('"index"') == 1, "one of two may have ended"
                    if "[DONE]" in line or '"usage":{' in line:
                        assert len(told) == 1
            [record] = told
            assert (record.kind, record.tenant, record.key) == ("request", "team", key[:11])
            await at.governor.writer.flush()
            [kept] = await at.governor.audit.list(kind="request")
            seen = kept.values
            assert (seen["request_id"], seen["user"], seen["model"]) == ("mine", "u-1", "tiny")
            assert (seen["prompt_tokens"], seen["cached_tokens"], seen["output_tokens"]) == (3, 2, 2 * TOKENS)
            assert (seen["finish"], seen["route"]) == (["length"] * 2, "/v1/completions")
            assert (seen["address"], len(seen["model_digest"])) == ("127.0.0.1", 64)
            assert (await at.governor.audit.verify()).fault is None

    run(work())


def test_content_is_kept_where_it_is_asked_for(service: MakeService, tmp_path: Path) -> None:
    (tmp_path / "content.key").write_text("a" * 43 + "=")

    async def work() -> None:
        async with governed(tmp_path, service, text="audit: {content_key: content.key}") as at:
            await at.tenant("team")
            sent = {"prompt": "w5 w17", "max_tokens": 3}
            answer = await at.client.post("/v1/completions", json=sent, headers=bearer(await at.key("team")))
            assert b"w5w17" not in at.governor.journal.path.read_bytes()
            await at.governor.writer.flush()
            [kept] = await at.governor.audit.list(kind="request")
            found = json.loads(await at.governor.audit.content(kept.seq))
            assert found["answers"] == [answer.json()["choices"][0]["text"]]
            assert found["prompt"] == "w5w17", "as the tokens are spelled"
            assert (await at.governor.audit.verify()).fault is None

    run(work())


def test_what_is_no_tenant() -> None:
    for name in ("", "a b", "ü", "-a", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidParameter):
            TenantConfig().tenant(name)
    for options in (
        {"weight": 0},
        {"weight": float("nan")},
        {"requests_per_minute": 0},
        {"monthly_tokens": -1},
        {"models": ""},
        {"models": "a,,b"},
        {"cache_group": "a b"},
    ):
        with pytest.raises(InvalidParameter):
            TenantConfig(**options)


def test_the_answer_is_that_of_an_open_server(service: MakeService, tmp_path: Path) -> None:
    async def work() -> None:
        async with governed(tmp_path, service) as at:
            await at.tenant("team")
            prompt = [5, 17, 30]
            body = {"prompt": prompt, "max_tokens": TOKENS, "return_token_ids": True}
            answer = await at.client.post("/v1/completions", json=body, headers=bearer(await at.key("team")))
            assert answer.json()["choices"][0]["token_ids"] == expected(prompt)

    run(work())


def test_limits_are_met_before_any_work(service: MakeService, tmp_path: Path) -> None:
    """Each by its own error, and what was let in and is over counts no more."""

    async def work() -> None:
        async with governed(tmp_path, service) as at:
            replica = at.replicas["tiny"]
            limits: dict[str, dict[str, int]] = {
                "requests": {"requests_per_minute": 2},
                "tokens": {"tokens_per_minute": 100},
                "slots": {"concurrent_requests": 1},
                "prompts": {"longest_prompt": 2},
                "answers": {"longest_answer": 5},
                "month": {"monthly_tokens": 70},
                "free": {},
            }
            for name, options in limits.items():
                await at.tenant(name, **options)
            keys = {name: await at.key(name) for name in limits}

            async def ask(name: str, **changes: Any) -> httpx.Response:
                return await at.client.post("/v1/completions", json=BODY | changes, headers=bearer(keys[name]))

            def refused(answer: httpx.Response, kind: str, code: str) -> None:
                assert answer.status_code == 429, answer.text
                assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == (kind, code)
                assert int(answer.headers["retry-after"]) >= 1

            first = await ask("requests")
            assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == (
                "2",
                "1",
            )
            assert (await ask("requests", stream=True)).headers["x-ratelimit-remaining-requests"] == "0"
            sent = len(replica.submitted)
            refused(await ask("requests"), "rate_limit_error", "rate_limit_exceeded")
            assert len(replica.submitted) == sent, "nothing was done for it"

            used = 3 + TOKENS
            answer = await ask("tokens")
            assert answer.headers["x-ratelimit-limit-tokens"] == "100"
            assert (await ask("tokens", max_tokens=60)).status_code == 200, "60 and 3 are left of 100"
            refused(await ask("tokens"), "rate_limit_error", "rate_limit_exceeded")
            assert (await ask("tokens", max_tokens=100)).status_code == 400, "it could never begin"
            assert "longest_prompt" in (await ask("prompts")).json()["error"]["message"]
            assert (await ask("answers", max_tokens=6)).status_code == 400
            capped = await at.client.post(
                "/v1/chat/completions", json={"messages": _CHAT["messages"]}, headers=bearer(keys["answers"])
            )
            assert capped.json()["usage"]["completion_tokens"] == 5, "where nothing is said, it is the longest"

            replica.holds = lambda submit: True
            held = asyncio.ensure_future(ask("slots"))
            while len(replica.submitted) == sent or replica.submitted[-1].tenant != "slots":
                await asyncio.sleep(0.01)
            refused(await ask("slots"), "rate_limit_error", "rate_limit_exceeded")
            async with grpc.aio.insecure_channel(at.address) as channel:
                [described] = inference_pb2.DESCRIPTOR.services_by_name.values()
                method = described.methods_by_name["Generate"]
                code = await _call(channel, method, '{"text": "w5"}', bearer(keys["slots"]))
                assert code is CODE.RESOURCE_EXHAUSTED
            held.cancel()  # the client leaves
            await asyncio.gather(held, return_exceptions=True)
            replica.holds = lambda submit: False
            while (answer := await ask("slots")).status_code == 429:
                await asyncio.sleep(0.01)
            assert answer.status_code == 200, "its place is free"

            assert (await ask("month")).status_code == (await ask("month")).status_code == 200
            assert 2 * used <= 70 < 3 * used
            spent = await ask("month")
            refused(spent, "insufficient_quota", "insufficient_quota")
            assert spent.headers["x-should-retry"] == "false"
            await at.governor.writer.flush()
            await at.governor._budget.look()
            refused(await ask("month"), "insufficient_quota", "insufficient_quota")
            assert at.governor._budget.used("month") == 2 * used, "each counts once"
            for _ in range(20):
                assert (await ask("free")).status_code == 200
            await at.governor.writer.flush()
            found = await at.governor.audit.list(kind="refused", limit=1000)
            assert {"LimitReached", "InvalidParameter", "ContextTooLong"} == {one.values["refused"] for one in found}

    run(work())


def test_a_provider_s_token_is_as_good_as_a_key(service: MakeService, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key()))
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [public | {"kid": "k", "alg": "ES256"}]}))
    text = """
issuers:
  - issuer: https://login.example
    audience: quire
    jwks: keys.json
    role_claim: groups
    roles: {staff: admin, people: user}
"""

    def token(key: Any = private, **changes: Any) -> str:
        whom = {"iss": "https://login.example", "aud": "quire", "sub": "ann", "exp": 1 << 33}
        claims = whom | {"tenant": "team", "groups": "people"}
        return jwt.encode(claims | changes, key, "ES256", {"kid": "k"})

    async def work() -> None:
        async with governed(tmp_path, service, text=text) as at:
            await at.tenant("team")
            await at.key("team")

            async def status(path: str, given: str) -> int:
                return (await at.client.get(path, headers=bearer(given))).status_code

            assert await status("/v1/models", token()) == 200
            assert await status("/metrics", token()) == 403
            assert await status("/metrics", token(groups="staff")) == 200
            for changes in ({"tenant": "nobody"}, {"groups": "boss"}, {"exp": 1}, {"aud": "other"}):
                assert await status("/v1/models", token(**changes)) == 401
            assert await status("/v1/models", token(key=ec.generate_private_key(ec.SECP256R1()))) == 401
            answer = await at.client.post("/v1/completions", json=BODY, headers=bearer(token()))
            assert answer.status_code == 200
            await at.governor.writer.flush()
            [kept] = await at.governor.audit.list(kind="request")
            assert (kept.values["tenant"], kept.values["key"]) == ("team", "subject:ann")

    run(work())


def test_a_client_is_known_by_its_certificate(service: MakeService, tmp_path: Path) -> None:
    """Over gRPC."""
    authority = Authority(tmp_path)
    server = authority.issue("server", *LOCAL)
    known, unknown = (authority.issue(name, x509.DNSName(f"{name}.example")) for name in ("batch", "stranger"))
    options = {
        "ssl_certfile": str(server.certificate),
        "ssl_keyfile": str(server.key),
        "ssl_ca_certs": str(authority.file),
    }

    async def work() -> None:
        text = "clients: [{name: batch.example, tenant: team}]"
        async with governed(tmp_path, service, text=text, **options) as at:
            await at.tenant("team")
            key = await at.key("team", role="auditor")

            async def code(pair: Pair, sent: str | None = None) -> grpc.StatusCode:
                credentials = grpc.ssl_channel_credentials(
                    authority.file.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
                )
                async with grpc.aio.secure_channel(f"localhost:{at.gateway.grpc_port}", credentials) as channel:
                    [described] = inference_pb2.DESCRIPTOR.services_by_name.values()
                    return await _call(channel, described.methods_by_name["ListModels"], "{}", bearer(sent))

            assert await code(known) is CODE.OK
            assert await code(unknown) is CODE.UNAUTHENTICATED
            assert await code(unknown, "qk-00000000-x") is CODE.UNAUTHENTICATED
            assert await code(known, key) is CODE.PERMISSION_DENIED, "a key goes before the certificate"

    run(work())
