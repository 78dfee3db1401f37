"""HTTP as RFC 9110 and 9112 have it, byte by byte, and the limits that hold before anyone shows a key."""

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import psutil
import pytest
from conftest import KEYS, RunningServer, wait_until
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc
from web import http

KEY = f"Authorization: Bearer {KEYS[0]}\r\n"
BODY = json.dumps({"prompt": [5, 6], "max_tokens": 2, "temperature": 0}).encode()
PATIENCE = 60.0


class Wire:
    """A connection to the HTTP server, and what comes back over it."""

    def __init__(self, server: RunningServer, *, narrow: bool = False) -> None:
        """`narrow`: neither system keeps much of what is not read."""
        self.socket = socket.socket()
        if narrow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        self._got = b""

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def send(self, *parts: str | bytes) -> "Wire":
        self.socket.sendall(b"".join(part.encode() if isinstance(part, str) else part for part in parts))
        return self

    def _until(self, end: bytes) -> bytes:
        while end not in self._got:
            more = self.socket.recv(1 << 16)
            assert more, f"it hung up after {self._got!r}"
            self._got += more
        part, _, self._got = self._got.partition(end)
        return part

    def answer(self, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer. `head`: to a HEAD request."""
        first, *lines = self._until(b"\r\n\r\n").decode().split("\r\n")
        status = int(first.split()[1])
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
        if status == 100 or head:
            return status, headers, b""
        length = int(headers["content-length"])
        while len(self._got) < length:
            more = self.socket.recv(1 << 16)
            assert more, "it hung up within a body"
            self._got += more
        body, self._got = self._got[:length], self._got[length:]
        return status, headers, body

    def ended(self) -> bool:
        """Whether the server hangs up, sooner or later, whatever it says before."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True


@pytest.fixture
def wire(guarded: RunningServer) -> Iterator[Wire]:
    connection = Wire(guarded)
    with contextlib.closing(connection.socket):
        yield connection


def post(*extra: str, body: bytes = BODY, target: str = "/v1/completions") -> str:
    return f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{KEY}{''.join(extra)}Content-Length: {len(body)}\r\n\r\n"


def is_completion(answer: tuple[int, dict[str, str], bytes]) -> bool:
    status, _, body = answer
    assert status == 200, body
    return json.loads(body)["usage"]["completion_tokens"] == 2


H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


def test_an_offer_of_http_2_is_not_taken(wire: Wire) -> None:
    """As Java's HttpClient makes it, with the body in the same segment, in one of its own, in pieces, and chunked."""
    for offer in (H2C, "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"):
        assert is_completion(wire.send(post(offer), BODY).answer())
        wire.send(post(offer))
        time.sleep(0.05)
        assert is_completion(wire.send(BODY).answer())
        for byte in post(offer).encode() + BODY:
            wire.send(bytes([byte]))
        assert is_completion(wire.answer())
        chunks = post(offer).replace(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
        assert is_completion(wire.send(chunks, f"{len(BODY):x}\r\n", BODY, "\r\n0\r\n\r\n").answer())
        get = f"GET /health HTTP/1.1\r\nHost: localhost\r\n{offer}\r\n"
        wire.send(get, get, post(offer), BODY, get)
        assert [wire.answer()[0] for _ in range(2)] == [200, 200]
        assert is_completion(wire.answer())
        assert wire.answer()[0] == 200


def test_continue_comes_before_a_body_that_is_wanted_only(wire: Wire, guarded: RunningServer) -> None:
    assert wire.send(post("Expect: 100-continue\r\n")).answer()[0] == 100
    assert is_completion(wire.send(BODY).answer())
    without = Wire(guarded)
    status, _, _ = without.send(post("Expect: 100-continue\r\n").replace(KEY, "")).answer()
    assert status == 401, "the key is looked at first"
    too_much = post("Expect: 100-continue\r\n").replace(f"Length: {len(BODY)}", f"Length: {1 << 40}")
    assert Wire(guarded).send(too_much).answer()[0] == 413


def test_chunked_bodies(wire: Wire) -> None:
    chunked = post().replace(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
    wire.send(chunked)
    for byte in BODY:
        wire.send("1;extension=x\r\n", bytes([byte]), "\r\n")
    assert is_completion(wire.send("0\r\nTrailer: x\r\nExpect: 100-continue\r\n\r\n").answer())
    assert is_completion(wire.send(post(), BODY).answer()), "and the connection goes on"


def test_head_of_what_can_be_got(wire: Wire) -> None:
    for route in ("/health", "/v1/models", "/metrics"):
        status, headers, _ = wire.send(f"HEAD {route} HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n").answer(head=True)
        assert status == 200
        assert int(headers["content-length"]) > 0
    assert wire.send("HEAD /v1/completions HTTP/1.1\r\nHost: localhost\r\n", KEY, "\r\n").answer(head=True)[0] == 405


def test_requests_in_a_row_are_answered_in_order(wire: Wire) -> None:
    wire.send(post(), BODY, f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n", post(), BODY)
    assert is_completion(wire.answer())
    assert json.loads(wire.answer()[2])["object"] == "list"
    assert is_completion(wire.answer())


def test_targets(wire: Wire, guarded: RunningServer) -> None:
    assert Wire(guarded).send("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n").answer()[0] == 501
    absolute = post(target="http://localhost/v1/completions")
    assert is_completion(wire.send(absolute, BODY).answer())
    assert wire.send("GET /health?x=/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()[0] == 200
    status, headers, _ = wire.send("GET /health HTTP/1.0\r\n\r\n").answer()
    assert (status, headers["connection"]) == (200, "close"), "as load balancers ask"
    assert wire.ended()


def test_a_chunk_that_is_none_is_said(wire: Wire) -> None:
    """Its head was read, and an answer is due."""
    chunked = post().replace(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked")
    wire.send(chunked)
    time.sleep(0.05)
    status, headers, _ = wire.send("zz\r\n").answer()
    assert (status, headers["connection"]) == (400, "close")
    assert wire.ended()


def test_who_leaves_with_requests_in_line_leaves_no_work(guarded: RunningServer) -> None:
    """The request that runs is told, not the last one alone."""
    before = count(guarded, "request_success_total")
    long = json.dumps({"prompt": [5, 6], "max_tokens": 480, "ignore_eos": True, "n": 64}).encode()
    wire = Wire(guarded)
    wire.send(post(body=long), long, *[post(body=BODY), BODY] * 40)
    assert wire.ended()
    wait_until(lambda: count(guarded, "request_success_total") > before)
    wait_until(lambda: count(guarded, "num_requests_running") == 0)
    assert "Exception in ASGI application" not in guarded.log


def test_bodies_are_read_as_they_are(wire: Wire) -> None:
    packed = gzip.compress(BODY)
    status, headers, body = wire.send(post("Content-Encoding: gzip\r\n", body=packed), packed).answer()
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert "gzip" in json.loads(body)["error"]["message"]
    assert is_completion(wire.send(post("Content-Encoding: identity\r\n"), BODY).answer())


@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\r\n\r\n",  # no Host
        "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n x: folded\r\n\r\n",
        "GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
        "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
)
def test_what_is_no_request(wire: Wire, head: str) -> None:
    status, _, body = wire.send(head.encode("latin-1")).answer()
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


# ---- limits -----------------------------------------------------------------------------------------------------


def test_headers_are_bounded(guarded: RunningServer) -> None:
    start = "GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for rest in ("x: " + "y" * 70_000 + "\r\n\r\n", "".join(f"x{i}: y\r\n" for i in range(9000)) + "\r\n"):
        status, headers, _ = Wire(guarded).send(start, rest).answer()
        assert (status, headers["connection"]) == (431, "close")
    endless = Wire(guarded).send(start, "x: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            endless.send("y" * 4096)
    assert endless.ended()
    assert Wire(guarded).send("GET /", "y" * 70_000, " HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()[0] == 431
    assert Wire(guarded).send(start, "x: " + "y" * 30_000 + "\r\n\r\n").answer()[0] == 200


def test_silence_and_slowness_are_hung_up_on(guarded: RunningServer) -> None:
    silent = [Wire(guarded) for _ in range(8)]
    slow_head = Wire(guarded).send("GET /health HTTP/1.1\r\n")
    slow_body = Wire(guarded).send(post(body=b"x" * 1000))
    with contextlib.suppress(ConnectionError):
        for _ in range(int(PATIENCE / 0.2)):
            slow_head.send("x: y\r\n")
            slow_body.send("x")
            time.sleep(0.2)
    assert slow_head.answer()[0] == 408 if slow_head._got else slow_head.ended()
    assert slow_body.ended()
    assert all(connection.ended() for connection in silent)


def test_connections_are_bounded_and_health_still_answers(guarded: RunningServer) -> None:
    crowd = [Wire(guarded).send("GET / HTTP/1.1\r\n") for _ in range(45)]
    status, headers, body = Wire(guarded).send(f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{KEY}\r\n").answer()
    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
    assert "connections" in json.loads(body)["error"]["message"]
    assert Wire(guarded).send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()[0] == 200
    more = [Wire(guarded) for _ in range(80)]
    assert any(connection.ended() for connection in more)
    assert all(connection.ended() for connection in crowd)


def test_idle_connections_make_room(guarded: RunningServer) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    wait_until(lambda: open_connections(guarded) == 0)
    idle = [Wire(guarded).send("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(40)]
    assert [connection.answer()[0] for connection in idle] == [200] * 40
    assert http.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def open_connections(server: RunningServer, client: int | None = None) -> int:
    """Of the HTTP server, or those with the port `client` at the other end."""
    port = int(server.url.rsplit(":", 1)[1])
    return sum(
        one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED and client in (None, one.raddr.port)
        for one in psutil.Process(server.process.pid).net_connections("tcp")
    )


LONG = {"n": 4, "max_tokens": 300, "ignore_eos": True, "logprobs": 20}


def count(server: RunningServer, name: str) -> float:
    """The sum of a metric over its labels."""
    text = http.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEYS[0]}"}).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"quire:{name}[{{ ]", line))


def test_a_stream_that_nobody_reads_is_let_go(guarded: RunningServer) -> None:
    content = json.dumps(LONG | {"prompt": [5, 6], "stream": True}).encode()
    before = count(guarded, "request_success_total")
    wire = Wire(guarded, narrow=True).send(post(body=content), content)
    assert wire._until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    wait_until(lambda: open_connections(guarded, wire.port) == 0, PATIENCE)
    wait_until(lambda: count(guarded, "request_success_total") == before + 4, PATIENCE)
    wait_until(lambda: count(guarded, "num_requests_running") == 0, PATIENCE)


def test_a_call_whose_answers_nobody_reads_is_let_go(guarded: RunningServer) -> None:
    before = count(guarded, "request_success_total")
    narrow = [("grpc.http2.lookahead_bytes", 16384), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(guarded.grpc, options=narrow) as channel:
        stub, key = inference_pb2_grpc.InferenceStub(channel), [("authorization", f"Bearer {KEYS[0]}")]
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), sampling=pb.SamplingParams(**LONG | {"n": 2}))
        stream = stub.Generate(request, metadata=key)
        next(stream)
        wait_until(lambda: count(guarded, "request_success_total") == before + 2, PATIENCE)
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stub.ListModels(pb.ListModelsRequest(), metadata=key).models


def test_metadata_and_messages_are_bounded(guarded: RunningServer) -> None:
    models = pb.ListModelsRequest()
    with grpc.insecure_channel(guarded.grpc, options=[("grpc.max_metadata_size", 1 << 20)]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        key = ("authorization", f"Bearer {KEYS[0]}")
        assert stub.ListModels(models, metadata=[key, ("x", "y" * 8000)]).models
        with pytest.raises(grpc.RpcError) as large:
            stub.ListModels(models, metadata=[key, ("x", "y" * 40_000)])
        assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as longer:
            stub.Tokenize(pb.TokenizeRequest(text="w" * (33 << 20)), metadata=[key])
        assert longer.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_slow_reader_is_not(guarded: RunningServer) -> None:
    content = json.dumps(LONG | {"prompt": [5, 6], "stream": True}).encode()
    wire = Wire(guarded, narrow=True).send(post(body=content), content)
    got = b""
    while not got.endswith(b"\r\n0\r\n\r\n"):
        more = wire.socket.recv(1 << 14)
        assert more, "it was hung up on"
        got += more
        time.sleep(0.002)
    assert b"data: [DONE]" in got


def test_silent_grpc_connections_end(guarded: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", int(guarded.grpc.rsplit(":", 1)[1])), timeout=PATIENCE) as silent:
        while silent.recv(1 << 16):
            pass


@pytest.mark.parametrize(
    ("method", "streams"),
    [
        ("/quire.v1.Inference/ListModels", False),
        ("/quire.v1.Inference/Generate", True),
        ("/grpc.health.v1.Health/Check", False),
        ("/grpc.health.v1.Health/Watch", True),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", True),
    ],
)
def test_a_call_without_its_message_ends(guarded: RunningServer, method: str, streams: bool) -> None:
    """One that never sends it, one that says there is none, one that leaves, and one without a key, which need not send
    it."""
    key = [("authorization", f"Bearer {KEYS[0]}")]
    done = threading.Event()

    def never() -> Iterator[bytes]:
        done.wait(PATIENCE)
        yield from ()

    def code(
        messages: Iterator[bytes], metadata: list[tuple[str, str]], timeout: float | None = None
    ) -> grpc.StatusCode:
        with grpc.insecure_channel(guarded.grpc) as channel:
            call = channel.stream_stream(method) if streams else channel.stream_unary(method)
            with pytest.raises(grpc.RpcError) as ended:
                answer = call(messages, metadata=metadata, timeout=timeout)
                list(answer) if streams else answer
        return ended.value.code()

    try:
        assert code(never(), key) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert code(never(), key, 1.0) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert code(iter(()), key) is grpc.StatusCode.INVALID_ARGUMENT
        if "Health" not in method:
            assert code(never(), []) is grpc.StatusCode.UNAUTHENTICATED
    finally:
        done.set()
    assert "Traceback" not in guarded.log


def test_open_files(guarded: RunningServer) -> None:
    soft, hard = psutil.Process(guarded.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == hard or soft >= 1 << 20
