"""Tokens of identity providers, over a real server of keys; what is forged, stale or too much is refused."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import ValidationError
from quire_cluster.governance import tokens as module
from quire_cluster.governance.callers import Role
from quire_cluster.governance.tokens import Claims, TokenIssuer, Tokens
from quire_engine.errors import InvalidParameter, Unauthenticated, Unavailable
from web import LIMIT

ISSUER, AUDIENCE = "https://login.example.org", "quire"
RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
FAMILIES = {
    "RS256": (RSA, jwt.algorithms.RSAAlgorithm),
    "PS256": (RSA, jwt.algorithms.RSAAlgorithm),
    "ES256": (EC, jwt.algorithms.ECAlgorithm),
    "EdDSA": (ED, jwt.algorithms.OKPAlgorithm),
}


def jwk(kid: str, algorithm: str = "RS256", key: Any = None, **more: Any) -> dict[str, Any]:
    own, family = FAMILIES[algorithm]
    return json.loads(family.to_jwk((key or own).public_key())) | {"kid": kid} | more


def claims(**changes: Any) -> dict[str, Any]:
    """Where a change is None the claim is left out."""
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "tenant": "research", "role": "user"}
    return {name: value for name, value in (whole | {"exp": time.time() + 600} | changes).items() if value is not None}


def token(algorithm: str = "RS256", kid: str = "a", key: Any = None, headers: Any = None, **changes: Any) -> str:
    own, _ = FAMILIES[algorithm]
    return jwt.encode(claims(**changes), key or own, algorithm, {"kid": kid} | (headers or {}))


def by_hand(header: dict[str, Any], content: Any, signature: bytes = b"") -> str:
    pieces = (json.dumps(header).encode(), json.dumps(content).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(piece).rstrip(b"=").decode() for piece in pieces)


class Provider:
    """Serves keys, or says what `answer` has."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.answer: web.Response | None = None
        self.asked = 0
        self.pause = 0.0
        self.url = ""

    async def serve(self, request: web.Request) -> web.Response:
        self.asked += 1
        await asyncio.sleep(self.pause)
        return self.answer or web.json_response({"keys": self.keys})

    def issuer(self, **options: Any) -> TokenIssuer:
        return TokenIssuer(**({"issuer": ISSUER, "audience": AUDIENCE, "jwks": self.url} | options))


@contextlib.asynccontextmanager
async def served(provider: Provider, **options: Any) -> AsyncIterator[Tokens]:
    app = web.Application()
    app.router.add_get("/keys", provider.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/keys"
    tokens = Tokens([provider.issuer(**options)])
    try:
        yield tokens
    finally:
        await tokens.close()
        await runner.cleanup()


def run(main: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(LIMIT):
            await main

    asyncio.run(within())


async def refused(tokens: Tokens, given: str) -> str:
    with pytest.raises(Unauthenticated) as error:
        await tokens.verify(given)
    return str(error.value)


class Clock:
    """In place of the module's `time`: stands `ahead` seconds ahead."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


# ---- who is who they say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", FAMILIES)
def test_a_good_token_says_who_calls(algorithm: str) -> None:
    async def main() -> None:
        provider = Provider(jwk("a", algorithm), jwk("b", "ES256"))
        async with served(provider, roles={"boss": "admin"}, tenant_claim="org", role_claim="job") as tokens:
            expires = int(time.time()) + 600
            given = token(algorithm, exp=expires, org="sales", job="boss")
            expected = Claims(issuer=ISSUER, subject="ada", tenant="sales", role=Role.ADMIN, expires=expires)
            for _ in range(3):
                assert await tokens.verify(given) == expected
            assert provider.asked == 1

    run(main())


def test_keys_may_lie_in_a_file(tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "keys.json"
        file.write_text(json.dumps({"keys": [jwk("a")]}))
        tokens = Tokens([TokenIssuer(issuer=ISSUER, audience=AUDIENCE, jwks=str(file))])
        assert (await tokens.verify(token())).subject == "ada"
        nowhere = Tokens([TokenIssuer(issuer=ISSUER, audience=AUDIENCE, jwks=str(tmp_path / "no"))])
        with pytest.raises(Unavailable, match="cannot be had now"):
            await nowhere.verify(token())

    run(main())


def test_each_issuer_has_its_own_keys(tmp_path: Path) -> None:
    """One cannot speak for another."""

    async def main() -> None:
        issuers = []
        for name, key in (("one", RSA), ("two", OTHER_RSA)):
            file = tmp_path / name
            file.write_text(json.dumps({"keys": [jwk("a", key=key)]}))
            issuers.append(TokenIssuer(issuer=name, audience=AUDIENCE, jwks=str(file)))
        tokens = Tokens(issuers)
        assert (await tokens.verify(token(iss="one"))).issuer == "one"
        assert (await tokens.verify(token(iss="two", key=OTHER_RSA))).issuer == "two"
        assert "signature" in await refused(tokens, token(iss="two"))
        assert "issuer" in await refused(tokens, token(iss="three"))

    run(main())
    with pytest.raises(InvalidParameter, match="same name"):
        Tokens([TokenIssuer(issuer="one", audience="a", jwks="f"), TokenIssuer(issuer="one", audience="b", jwks="g")])


# ---- who is not ---------------------------------------------------------------------------------------------------


def forgeries() -> dict[str, tuple[str, str]]:
    """A token, and what its sender is told."""
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = by_hand({"alg": "HS256", "kid": "a"}, claims()).rpartition(".")[0]
    hs256 = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
    good = token()
    other = token(sub="eve")
    return {
        "alg none": (by_hand({"alg": "none", "kid": "a"}, claims()), "algorithm"),
        "no alg": (by_hand({"kid": "a"}, claims()), "algorithm"),
        "HS256 with the public key": (f"{signed}.{hs256}", "algorithm"),
        "ES256 by name alone": (by_hand({"alg": "ES256", "kid": "a"}, claims(), bytes(64)), "not for its algorithm"),
        "another's signature": (token(key=OTHER_RSA), "signature"),
        "content of another": (".".join([*other.split(".")[:2], good.split(".")[2]]), "signature"),
        "issuer": (token(iss="https://evil.example.org"), "issuer"),
        "issuer as a list": (by_hand({"alg": "RS256"}, claims(iss=[ISSUER])), "issuer"),
        "audience": (token(aud="another"), "audience"),
        "no audience": (token(aud=None), "no claim aud"),
        "expired": (token(exp=time.time() - 120), "expired"),
        "no exp": (token(exp=None), "no claim exp"),
        "exp beyond numbers": (token(exp=10**400), "exp"),
        "endless exp": (token(exp=float("inf")), "cannot be verified"),
        "nbf": (token(nbf=time.time() + 600), "not valid yet"),
        "no subject": (token(sub=None), "no claim sub"),
        "empty subject": (token(sub=""), "no subject"),
        "subject that SQLite cannot take": (token(sub="a\ud800"), "no subject that can be written"),
        "subject that PostgreSQL cannot take": (token(sub="a\0"), "no subject that can be written"),
        "no tenant": (token(tenant=None), "no tenant"),
        "tenant as a list": (token(tenant=["research"]), "no tenant"),
        "role": (token(role="root"), "no role"),
        "role as a list": (token(role=["admin"]), "no role"),
        "kid of nobody": (token(kid="../../etc/passwd"), "not known"),
        "kid of another key": (token(kid="b"), "not for its algorithm"),
        "jku": (token(kid="x", key=OTHER_RSA, headers={"jku": "http://127.0.0.1:1/keys"}), "not known"),
        "jwk": (token(key=OTHER_RSA, headers={"jwk": jwk("a", key=OTHER_RSA)}), "signature"),
        "x5u": (token(key=OTHER_RSA, headers={"x5u": "http://127.0.0.1:1/x", "x5c": ["AAAA"]}), "signature"),
        "a key of the server": ("qk-1a2b3c4d-secret", "neither"),
        "no text": ("", "neither"),
        "no ASCII": ("é.é.é", "neither"),
        "half a token": (good[: len(good) // 2], "neither"),
        "deep": (by_hand({"alg": "RS256"}, 0)[:-3] + base64.urlsafe_b64encode(b"[" * 9000).decode() + ".", "neither"),
    }


@pytest.mark.parametrize("name", forgeries())
def test_a_forgery_is_refused(name: str) -> None:
    given, why = forgeries()[name]

    async def main() -> None:
        async with served(Provider(jwk("a"), jwk("b", "ES256"))) as tokens:
            assert (await tokens.verify(token())).subject == "ada"
            for _ in range(2):
                assert why in await refused(tokens, given)

    run(main())


def test_a_token_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with served(Provider(jwk("a"))) as tokens:
            monkeypatch.setattr(module, "jwt", None)
            assert "characters" in await refused(tokens, "a" * (1 << 20))

    run(main())


def test_algorithms_are_those_of_the_configuration() -> None:
    async def main() -> None:
        async with served(Provider(jwk("a"), jwk("b", "ES256")), algorithms=["ES256"]) as tokens:
            assert "algorithm" in await refused(tokens, token())
            assert (await tokens.verify(token("ES256", "b"))).subject == "ada"
        async with served(Provider(jwk("a", alg="PS256"))) as tokens:
            assert "not for its algorithm" in await refused(tokens, token())

    run(main())
    for options in ({"algorithms": ["HS256"]}, {"algorithms": ["none"]}, {"algorithms": []}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            TokenIssuer(**({"issuer": ISSUER, "audience": AUDIENCE, "jwks": "file"} | options))
    for url in ("http://example.org/keys", "ftp://127.0.0.1/keys", "http://localhost.example.org/keys"):
        with pytest.raises(ValidationError, match="neither a file nor an https URL"):
            TokenIssuer(issuer=ISSUER, audience=AUDIENCE, jwks=url)


# ---- as time goes on ----------------------------------------------------------------------------------------------


def test_a_token_that_is_known_expires_nevertheless(clock: Clock) -> None:
    async def main() -> None:
        async with served(Provider(jwk("a"))) as tokens:
            given = token(exp=time.time() + 100)
            await tokens.verify(given)
            clock.ahead = 159.0
            assert (await tokens.verify(given)).subject == "ada"  # clocks may differ by a minute
            clock.ahead = 161.0
            assert "expired" in await refused(tokens, given)

    run(main())


def test_keys_change(clock: Clock) -> None:
    """A new one is fetched where a token names it; one that is taken back verifies nothing, not even what is known."""

    async def main() -> None:
        provider = Provider(jwk("a"))
        async with served(provider) as tokens:
            old, new = token(), token(kid="b", key=OTHER_RSA)
            await tokens.verify(old)
            provider.keys = [jwk("b", key=OTHER_RSA)]
            assert "not known" in await refused(tokens, new)  # within 30 s of the fetch before
            assert (await tokens.verify(old)).subject == "ada"
            clock.ahead = 31.0
            assert (await tokens.verify(new)).subject == "ada"
            assert "not known" in await refused(tokens, old)
            assert provider.asked == 2

    run(main())


def test_keys_that_are_taken_back_are_missed_in_the_background(clock: Clock) -> None:
    async def main() -> None:
        provider = Provider(jwk("a"))
        async with served(provider) as tokens:
            given = token(exp=time.time() + 3600)
            await tokens.verify(given)
            provider.keys = [jwk("b", key=OTHER_RSA)]
            clock.ahead = 301.0
            with pytest.raises(Unauthenticated, match="not known"):
                while await tokens.verify(given):  # without waiting for the provider
                    await asyncio.sleep(0.01)

    run(main())


def test_keys_are_kept_while_their_provider_is_away(clock: Clock) -> None:
    async def main() -> None:
        provider = Provider(jwk("a"))
        async with served(provider, keys_kept=1000) as tokens:
            known, fresh = token(exp=time.time() + 9999), token(exp=time.time() + 9998)
            await tokens.verify(known)
            for answer in (web.Response(status=503), web.Response(text="words"), web.json_response({"keys": []})):
                provider.answer = answer
                clock.ahead += 310.0
                asked = provider.asked
                while provider.asked == asked:
                    assert (await tokens.verify(known)).subject == "ada"
                    await asyncio.sleep(0.01)
                assert (await tokens.verify(token(exp=time.time() + 9000 + clock.ahead))).subject == "ada"
                while next(keys for _, keys in tokens._issuers.values())._fetching is not None:
                    await asyncio.sleep(0.01)
            clock.ahead = 1001.0
            for given in (known, fresh):
                with pytest.raises(Unavailable, match="cannot be had now"):
                    await tokens.verify(given)
            provider.answer = None
            clock.ahead = 1032.0
            while True:
                with contextlib.suppress(Unavailable):
                    assert (await tokens.verify(known)).subject == "ada"
                    break
                await asyncio.sleep(0.01)

    run(main())


def test_unknown_keys_make_no_storm_of_fetches(clock: Clock) -> None:
    """10,000 at once, while the provider is slow; a token of a key that is known does not wait for it."""

    async def main() -> None:
        provider = Provider(jwk("a"))
        async with served(provider) as tokens:
            await tokens.verify(token())
            clock.ahead = 31.0
            provider.pause = 0.5
            unsigned = [by_hand({"alg": "RS256", "kid": f"k{number}"}, claims()) for number in range(10_000)]
            asked = asyncio.gather(*(refused(tokens, one) for one in unsigned))
            while provider.asked == 1:
                await asyncio.sleep(0.01)
            assert (await tokens.verify(token(sub="bob"))).subject == "bob"
            assert not asked.done()
            assert all("not known" in why for why in await asked)
            assert provider.asked == 2
            assert len(tokens._known) == 2

    run(main())


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(module, "_MOST_KNOWN", 3)
        async with served(Provider(jwk("a", "ES256"))) as tokens:
            given = [token("ES256", sub=f"s{number}") for number in range(5)]
            for one in given:
                await tokens.verify(given[0])
                await tokens.verify(one)
            assert len(tokens._known) == 3
            assert hashlib.sha256(given[0].encode()).digest() in tokens._known

    run(main())


# ---- what providers say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "words"},
        {"text": "[" * 100_000},
        {"text": '{"keys": 5}'},
        {"text": "[]"},
        {"body": b"\xff\xfe\x00"},
        {"text": json.dumps({"keys": [jwk("a")] * 3000})},
        {"text": json.dumps({"keys": [jwk("a")], "x": "y" * (1 << 20)})},
        {"text": json.dumps({"keys": [jwk("a", use="enc"), {"kty": "oct", "k": "AAAA", "kid": "a"}, 5, None]})},
        {"status": 302, "headers": {"Location": "http://127.0.0.1:1/keys"}},
        {"text": json.dumps({"keys": [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA)) | {"kid": "a"}]})},
    ],
)
def test_an_answer_without_keys_verifies_nothing(answer: dict[str, Any]) -> None:
    async def main() -> None:
        provider = Provider()
        async with served(provider) as tokens:
            provider.answer = web.Response(**answer)
            with pytest.raises(Unavailable, match="cannot be had now"):
                await tokens.verify(token())

    run(main())


def test_keys_that_nobody_can_read_hide_no_others() -> None:
    async def main() -> None:
        others = [{"kty": "RSA", "kid": "x", "n": "!", "e": "AQAB"}, {"kty": "EC", "crv": "P-999", "kid": "y"}]
        more = [jwk("enc", use="enc"), {"kty": "oct", "k": "AAAA", "kid": "h"}, {"kty": "OKP", "kid": "z"}, 7]
        async with served(Provider(*others, *more, jwk("a"), jwk("b", "EdDSA"))) as tokens:
            assert (await tokens.verify(token())).subject == "ada"
            assert (await tokens.verify(token("EdDSA", "b"))).subject == "ada"
            assert "not known" in await refused(tokens, token(kid="enc"))

    run(main())
