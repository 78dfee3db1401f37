"""What is fetched for a call and what is not: against a server of the test's own, and names that lead where it says."""

import asyncio
import base64
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import mutated
from quire_cluster.config import MediaConfig
from quire_cluster.gateway.media import Media
from quire_engine.errors import InvalidParameter
from quire_engine.multimodal.pictures import read_picture
from sites import LIMITS, PICTURE, WHAT, Answer, Site, answer, fetched, names, ok, refusal, to


def test_data_urls() -> None:
    async def run() -> None:
        media = Media(MediaConfig(), LIMITS)
        for data in (PICTURE, bytes(90_000)):
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            assert await media.read(url, WHAT) == data
        with pytest.raises(InvalidParameter, match="at most 100000"):
            await media.read(f"data:,{'a' * 100_001}", WHAT)
        await media.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.org/a.png", "--allowed-media-domains"),
        ("https://example.org/a.png", "--allowed-media-domains"),
        ("file:///etc/hostname", "--allowed-local-media-path"),
        ("ftp://example.org/a.png", "no data:"),
        ("gopher://x/", "no data:"),
        ("a.png", "no data:"),
        ("/etc/hostname", "no data:"),
        ("", "no data:"),
        ("iVBORw0KGgo=", "no data:"),
        ("javascript:alert(1)", "no data:"),
        (" http://example.org/", "no data:"),
        ("http://example.org/" + "a" * 9000, "8192"),
        ("http://example.org/a b", "white space"),
        ("http://example.org/\r\nHost: x", "white space"),
        ("http://example.org\\@127.0.0.1/", "white space"),
        ("http://example.org/\ud800", "white space"),
    ],
)
def test_nothing_is_open_unless_an_operator_opens_it(url: str, why: str) -> None:
    said, site = refusal({}, url, domains="")
    assert why in said
    assert site.connections == 0


def test_a_picture_comes_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without what the environment says of proxies and passwords, nor what the site would have kept."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def run() -> None:
        async with Site({"/a%2Fb.png?x=%2B+%20&y": ok("Set-Cookie: a=b; Path=/", "Content-Type: text/html")}) as site:
            config = MediaConfig(allowed_media_domains=f"127.0.0.1:{site.port}")
            media = Media(config, LIMITS)
            for _ in range(2):
                data = await media.read(f"{site.url}/a%2Fb.png?x=%2B+%20&y#part", WHAT)
                assert read_picture(data, WHAT, LIMITS).size == (40, 30)
            await media.close()
            assert site.connections == 2
            for request in site.requests:
                headers = dict(line.split(": ", 1) for line in request.lower().split("\r\n")[1:] if line)
                assert headers.keys() == {"host", "accept", "accept-encoding", "connection", "user-agent"}
                assert headers["accept-encoding"] == "identity"
                assert headers["host"] == f"127.0.0.1:{site.port}"

    asyncio.run(run())


def test_bodies_of_every_framing() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (PICTURE[:100], PICTURE[100:])) + b"0\r\n\r\n"
    answers: dict[str, bytes | Answer] = {
        "/length": ok(),
        "/chunked": answer("200 OK", "Transfer-Encoding: chunked", body=chunks),
        "/to-the-end": answer("200 OK", body=PICTURE),
        "/identity": ok("Content-Encoding: identity"),
    }

    async def run() -> None:
        async with Site(answers) as site:
            for path in answers:
                assert await fetched(site, site.url + path) == PICTURE

    asyncio.run(run())


async def forever(writer: asyncio.StreamWriter) -> None:
    """A body without end."""
    writer.write(answer("200 OK"))
    while True:
        writer.write(bytes(10_000))
        await writer.drain()


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n" * 1000)
        await writer.drain()


async def endless_header(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"y" * 1000)
        await writer.drain()


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def silence_after_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(ok()[:-50])
    await asyncio.sleep(60)


async def drip(writer: asyncio.StreamWriter) -> None:
    """Each byte comes in good time."""
    writer.write(answer("200 OK", "Content-Length: 90000"))
    for _ in range(90_000):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


HOSTILE: dict[str, tuple[bytes | Answer, str]] = {
    "endless body": (forever, "at most 100000"),
    "too long, as it says": (answer("200 OK", "Content-Length: 100001"), "has 100001 bytes"),
    "too long in chunks": (
        answer("200 OK", "Transfer-Encoding: chunked", body=b"%x\r\n" % 200_000 + bytes(200_000)),
        "at most 100000",
    ),
    "endless headers": (endless_headers, "broke off"),
    "endless header": (endless_header, "broke off"),
    "silence": (silence, "too long"),
    "silence after the headers": (silence_after_headers, "too long"),
    "drops": (drip, "too long"),
    "hangs up": (hang_up, "broke off"),
    "hangs up within": (answer("200 OK", "Content-Length: 5000", body=bytes(100)), "broke off"),
    "packed": (ok("Content-Encoding: gzip", body=bytes(30)), "packed"),
    "packed twice": (ok("Content-Encoding: br, gzip", body=bytes(30)), "packed"),
    "no content": (answer("204 No Content"), "204"),
    "a part": (answer("206 Partial Content", "Content-Length: 3", body=b"abc"), "206"),
    "not modified": (answer("304 Not Modified"), "304"),
    "not found": (answer("404 Not Found", body=b"SECRET"), "404"),
    "wants a password": (answer("401 Unauthorized", 'WWW-Authenticate: Basic realm="SECRET"'), "401"),
    "broken": (answer("500 Internal Server Error", body=b"SECRET"), "500"),
    "multiple choices": (answer("300 Multiple Choices", "Location: /good"), "300"),
    "leads on to a long URL": (to("/" + "secret" * 1500), "broke off"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6 SECRET\r\n", "broke off"),
    "nothing": (b"", "broke off"),
    "a bad length": (answer("200 OK", "Content-Length: -5"), "broke off"),
    "two lengths": (answer("200 OK", "Content-Length: 5", "Content-Length: 6", body=b"abcdef"), "broke off"),
    "bad chunks": (answer("200 OK", "Transfer-Encoding: chunked", body=b"zz\r\nabc"), "broke off"),
    "a bad status": (answer("abc OK"), "broke off"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(name: str) -> None:
    said_by_site, why = HOSTILE[name]
    said, _ = refusal({"/x": said_by_site}, "http://127.0.0.1:PORT/x", timeout=0.6, read_timeout=0.3)
    assert why in said
    assert "SECRET" not in said


def test_damaged_answers() -> None:
    """Are read or refused, and nothing else."""
    draw = random.Random(1)
    chunked = b"%x;a=b\r\n%s\r\n0\r\nA: b\r\n\r\n" % (len(PICTURE), PICTURE)
    good = [ok("Content-Type: image/png"), answer("200 OK", "Transfer-Encoding: chunked", body=chunked), to("/x")]
    outcomes: set[bool] = set()

    async def run() -> None:
        async with Site({}) as site:
            for number in range(300):
                site.answers["/x"] = mutated(good[number % 3], draw)
                try:
                    await fetched(site, f"{site.url}/x", timeout=2.0, read_timeout=0.3)
                    outcomes.add(True)
                except InvalidParameter as error:
                    assert str(error).startswith(f"{WHAT}: ")
                    outcomes.add(False)

    asyncio.run(run())
    assert outcomes == {True, False}


def test_a_page_is_fetched_and_then_no_picture() -> None:
    """What it is, its content says, whatever the server says."""

    async def run() -> None:
        async with Site({"/a.png": ok("Content-Type: image/png", body=b"<html>a page</html>")}) as site:
            data = await fetched(site, f"{site.url}/a.png")
            with pytest.raises(InvalidParameter, match="HTML"):
                read_picture(data, WHAT, LIMITS)

    asyncio.run(run())


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirections_are_followed(status: str) -> None:
    answers: dict[str, bytes | Answer] = {
        "/0": to("/1?a=%2F", status),
        "/1?a=%2F": to("folder/2", status),
        "/folder/2": to("//127.0.0.1:PORT/3", status),
        "/3": to("http://127.0.0.1:PORT/4", status),
        "/4": to("HTTP://127.0.0.1:PORT/5#part", status),
        "/5": ok(),
        "/6": to("/0", status),
    }

    async def run() -> None:
        async with Site(answers) as site:
            for path, said in answers.items():
                answers[path] = said.replace(b"PORT", str(site.port).encode()) if isinstance(said, bytes) else said
            assert await fetched(site, f"{site.url}/0") == PICTURE
            assert site.paths == ["/0", "/1?a=%2F", "/folder/2", "/3", "/4", "/5"]
            with pytest.raises(InvalidParameter, match="more than 5 times"):
                await fetched(site, f"{site.url}/6")

    asyncio.run(run())


ELSEWHERE = [
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1/secret",
    "http://127.0.0.1:1/secret",
    "https://127.0.0.1:PORT1/secret",
    "http://localhost:PORT/secret",
    "http://[::1]:PORT/secret",
    "http://[::ffff:169.254.169.254]/secret",
    "http://2130706433:PORT/secret",
    "http://0.0.0.0:PORT/secret",
    "http://user:password@127.0.0.1:PORT/secret",
    "http://inside.example:PORT/secret",
    "//10.0.0.1/secret",
    "file:///secret",
    "ftp://127.0.0.1:PORT/secret",
    "data:image/png;base64,c2VjcmV0",
    "gopher://127.0.0.1:PORT/secret",
    "http://127.0.0.1:99999/secret",
    "http://127.0.0.1:PORT\\@secret/",
    "",
    "/sec ret",
    "http://[secret",
]


@pytest.mark.parametrize("location", ELSEWHERE)
def test_redirections_elsewhere_are_not_followed(location: str) -> None:
    async def run() -> str:
        async with Site({"/secret": ok()}) as site:
            here = location.replace("PORT1", str(site.port + 1)).replace("PORT", str(site.port))
            site.answers["/x"] = to(here)
            with pytest.raises(InvalidParameter) as refused:
                await fetched(site, f"{site.url}/x", resolve=names({"inside.example": ["127.0.0.1"]}))
            assert site.paths == ["/x"]
            return str(refused.value)

    said = asyncio.run(run())
    assert "leads on" in said
    assert not re.search(r"secret|169\.254|inside|::", said)


SPELLINGS = [
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001"),
    *("127.0.0.1.", "0", "0.0.0.0", "１２７.0.0.1", "127。0。0。1", "%31%32%37.0.0.1"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[fe80::1%25lo]"),
    *("[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]"),
    *("localhost", "LOCALHOST.", "loopback.example", "mapped.example", "nat64.example", "every.example"),
    *("127.0.0.1.nip.example", "user@127.0.0.1", "example.org@127.0.0.1"),
    *("a" * 64 + ".example", "a..example", "-", ""),
]
LEADING_INSIDE = {
    "localhost": ["127.0.0.1", "::1"],
    "loopback.example": ["127.0.0.1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "every.example": ["0.0.0.0", "::", "::1", "fe80::1%lo", "169.254.169.254", "224.0.0.1"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
}


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_an_open_server_fetches_nothing_from_inside(spelled: str) -> None:
    """With `*` and any port."""
    said, site = refusal(
        {"/x": ok()}, f"http://{spelled}:PORT/x", domains="*:*", resolve=names(LEADING_INSIDE), timeout=5.0
    )
    assert site.connections == 0
    assert "::" not in said or "::" in spelled


def test_a_name_that_leads_inside_looks_like_one_that_is_not_there() -> None:
    known = {"inside.example": ["10.1.2.3"]}
    said = [
        refusal({}, f"http://{name}.example/x", domains="*", resolve=names(known))[0] for name in ("inside", "absent")
    ]
    assert said[0] == said[1]


def test_a_name_leads_to_the_address_that_was_checked() -> None:
    """And is not looked up again for the connection. Of several addresses those inside are left out."""
    asked: list[str] = []

    async def run() -> None:
        async with Site({"/x": to("/y"), "/y": ok()}) as site:
            turns = [["127.0.0.1"], ["10.255.255.1", "127.0.0.1", "::1"], ["169.254.169.254"]]

            async def resolve(name: str, port: int) -> list[str]:
                asked.append(name)
                return turns[len(asked) - 1]

            domains = "pictures.example:PORT, 127.0.0.1:PORT"
            assert await fetched(site, "http://Pictures.Example.:PORT/x", domains=domains, resolve=resolve) == PICTURE
            assert [line for request in site.requests for line in request.split("\r\n") if line.startswith("Host")] == [
                f"Host: pictures.example:{site.port}"
            ] * 2
            assert site.paths == ["/x", "/y"]
            with pytest.raises(InvalidParameter, match="no address that may be fetched from"):
                await fetched(site, "http://pictures.example:PORT/x", domains=domains, resolve=resolve)
            assert site.connections == 2

    asyncio.run(run())
    assert asked == ["pictures.example"] * 3


@pytest.mark.parametrize(
    ("domains", "url", "may"),
    [
        ("localhost:PORT", "http://localhost:PORT/x", True),
        ("localhost", "http://localhost:PORT/x", False),
        ("localhost:*", "http://LocalHost.:PORT/x", True),
        ("127.0.0.1:PORT", "http://localhost:PORT/x", False),
        ("127.0.0.0/8:PORT", "http://127.0.0.1:PORT/x", True),
        ("127.0.0.1:PORT", "http://[::ffff:127.0.0.1]:PORT/x", True),
        ("[::1]:PORT", "http://127.0.0.1:PORT/x", False),
        ("127.0.0.1", "http://127.0.0.1:PORT/x", False),
        ("127.0.0.1:1", "http://127.0.0.1:PORT/x", False),
        ("inside.example:PORT", "http://inside.example:PORT/x", False),
        ("inside.example:PORT, 127.0.0.1", "http://inside.example:PORT/x", False),
        ("inside.example:PORT, 127.0.0.1:PORT", "http://inside.example:PORT/x", True),
        ("bücher.example:PORT, 127.0.0.1:PORT", "http://BÜCHER.example:PORT/x", True),
        ("xn--bcher-kva.example:PORT, 127.0.0.1:PORT", "http://bücher.example:PORT/x", True),
        ("*:PORT, 127.0.0.1:PORT", "http://inside.example:PORT/x", True),
        ("*:*, 10.0.0.0/8", "http://inside.example:PORT/x", False),
        ("example:PORT, 127.0.0.1:PORT", "http://inside.example:PORT/x", False),
        ("localhost:PORT", "http://evil.localhost:PORT/x", False),
        ("inside.example.:PORT, 127.0.0.1:PORT", "http://inside.example:PORT/x", True),
    ],
)
def test_what_the_list_opens(domains: str, url: str, may: bool) -> None:
    known = {"inside.example": ["127.0.0.1"], "xn--bcher-kva.example": ["127.0.0.1"], "evil.localhost": ["127.0.0.1"]}
    resolve = None if "ocal" in url and "evil" not in url else names(known)

    async def run() -> None:
        async with Site({"/x": ok()}) as site:
            if may:
                assert await fetched(site, url, domains=domains, resolve=resolve) == PICTURE
            else:
                with pytest.raises(InvalidParameter):
                    await fetched(site, url, domains=domains, resolve=resolve)
                assert site.connections == 0

    asyncio.run(run())


def test_so_many_are_fetched_at_a_time() -> None:
    running: list[int] = [0]

    async def slow(writer: asyncio.StreamWriter) -> None:
        running.append(running[-1] + 1)
        await asyncio.sleep(0.05)
        running.append(running[-1] - 1)
        writer.write(ok())
        await writer.drain()

    async def run() -> None:
        async with Site({"/x": slow}) as site:
            media = Media(MediaConfig(allowed_media_domains=f"127.0.0.1:{site.port}"), LIMITS)
            found = await asyncio.gather(*(media.read(f"{site.url}/x", WHAT) for _ in range(60)))
            assert found == [PICTURE] * 60
            assert 2 <= max(running) <= 16
            await media.close()

    asyncio.run(run())


def test_a_name_server_that_hangs_does_not_hold_up_a_call() -> None:
    async def resolve(name: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    said, _ = refusal({}, "http://example.org/x", domains="*", resolve=resolve, timeout=0.2)
    assert "too long" in said


def test_who_leaves_is_not_waited_for_and_closing_ends_all() -> None:
    async def run() -> None:
        async with Site({"/x": silence, "/y": ok()}) as site:
            media = Media(
                MediaConfig(allowed_media_domains=f"127.0.0.1:{site.port}"), LIMITS, timeout=50, read_timeout=50
            )
            leaving, *staying = (asyncio.create_task(media.read(f"{site.url}/x", WHAT)) for _ in range(10))
            while site.open < 10:
                await asyncio.sleep(0.01)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await media.read(f"{site.url}/y", WHAT) == PICTURE
            waiting = [asyncio.create_task(media.read(f"{site.url}/x", WHAT)) for _ in range(20)]
            while site.connections < 18:  # all that run at a time, and two that are done
                await asyncio.sleep(0.01)
            await media.close()
            for task in (*staying, *waiting):
                with pytest.raises(InvalidParameter):
                    await task
            assert site.paths.count("/x") == 17

    asyncio.run(run())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("name", ["pictures.example", "other.example"])
def test_https_trusts_the_certificate_of_the_name_alone(name: str, tmp_path: Path) -> None:
    """In a process of its own, which trusts the test's certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=pictures.example"]
    command += ["-addext", "subjectAltName=DNS:pictures.example"]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import asyncio, ssl\n"
        "from sites import *\n"
        "async def run():\n"
        "    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        f"    tls.load_cert_chain({str(certificate)!r}, {str(key)!r})\n"
        "    async with Site({'/x': ok()}, tls) as site:\n"
        f"        resolve = names({{{name!r}: ['127.0.0.1']}})\n"
        f"        domains = '{name}:PORT, 127.0.0.1:PORT'\n"
        f"        return await fetched(site, 'https://{name}:PORT/x', domains=domains, resolve=resolve)\n"
        "try:\n"
        "    print(asyncio.run(run()) == PICTURE)\n"
        "except InvalidParameter as error:\n"
        "    print(error)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    for trusted, expected in (
        ({"SSL_CERT_FILE": str(certificate)}, "True" if name == "pictures.example" else "no connection"),
        ({}, "no connection"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | trusted, capture_output=True, text=True, check=True
        )
        assert expected in done.stdout
        assert done.stderr == ""
