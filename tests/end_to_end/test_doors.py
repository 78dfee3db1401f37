"""Who gets into a running server, and HTTP from sites that have no business."""

from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest
from conftest import KEYS, RunningServer, listeners
from doors import CODE, METHODS, call, guarded_kinds
from quire import Client
from quire_protos.v1 import engine_pb2
from web import http

# Every kind of process that may listen, and with what.
LISTENERS = {
    "server": "HTTP and gRPC for clients; Ray's port of the driver",
    "gcs_server": "Ray's store",
    "raylet": "Ray's node manager and its object manager",
    "ray::RuntimeEnvAgent": "Ray's agent, in HTTP",
    "ray::Controller": "Ray's port of an actor",
    "ray::Replica": "Ray's port of an actor; sessions",
    "ray::Worker": "Ray's port of an actor; the rendezvous of several ranks, gloo and NCCL",
    "monitor.py": "Ray's autoscaler",
}


def ray_token(root: psutil.Process) -> str:
    [raylet] = [process for process in root.children(recursive=True) if process.name() == "raylet"]
    path = Path(raylet.environ()["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    return path.read_text()


def test_nothing_listens_beyond_this_host_and_nothing_answers_without_a_key(guarded: RunningServer) -> None:
    root = psutil.Process(guarded.process.pid)
    token = ray_token(root)
    public = {int(address.rsplit(":", 1)[1]) for address in (guarded.url, guarded.grpc)}
    seen, inside = guarded_kinds(root, token)
    assert seen | {"monitor.py"} == LISTENERS.keys(), "else the list is out of date (another server may have its port)"
    kinds = {kind for kind, port in inside if port not in public}
    assert kinds == {"server", "gcs_server", "raylet", "ray::Controller", "ray::Replica", "ray::Worker"}


def test_the_key_of_the_cluster_is_not_that_of_a_session(guarded: RunningServer) -> None:
    root = psutil.Process(guarded.process.pid)
    token = ray_token(root)
    tried = 0
    for kind, _, port in listeners(root):
        if kind == "ray::Replica" and call(port, "quire.v1.Engine/Session") is CODE.UNAUTHENTICATED:
            for wrong in (token, KEYS[0], "Bearer", ""):
                assert call(port, "quire.v1.Engine/Session", wrong) in (CODE.UNAUTHENTICATED, CODE.UNIMPLEMENTED)
            tried += 1
    assert tried >= 1
    assert engine_pb2.DESCRIPTOR.services_by_name["Engine"].full_name == "quire.v1.Engine"


def test_ray_lets_in_who_has_the_token(guarded: RunningServer) -> None:
    """Which shows that the calls above are refused for the want of it alone."""
    root = psutil.Process(guarded.process.pid)
    token = ray_token(root)
    [store] = [port for kind, _, port in listeners(root) if kind == "gcs_server"]
    assert call(store, METHODS[0], token) is CODE.OK
    assert call(store, METHODS[0], "0" * 64) is CODE.UNAUTHENTICATED


def test_secrets_are_on_no_command_line(guarded: RunningServer) -> None:
    root = psutil.Process(guarded.process.pid)
    token = ray_token(root)
    for process in [root, *root.children(recursive=True)]:
        command = " ".join(process.cmdline())
        assert not any(secret in command for secret in (token, *KEYS)), command


def test_every_route_but_health_wants_a_key(guarded: RunningServer) -> None:
    for method, route in (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("OPTIONS", "/v1/models"),
    ):
        for wrong in (
            {},
            {"authorization": KEYS[0]},
            {"authorization": f"Basic {KEYS[0]}"},
        ):
            answer = http.request(method, guarded.url + route, headers=wrong)
            assert answer.status_code == 401, (route, wrong)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    for route in ("/health", "/ready"):
        assert http.get(guarded.url + route).status_code == 200
    for key in KEYS:
        for scheme in ("Bearer", "bearer", "BEARER "):
            headers = {"authorization": f"{scheme} {key}"}
            assert http.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong").models.list()


def test_every_call_but_health_wants_a_key(guarded: RunningServer) -> None:
    with Client(guarded.grpc) as without, Client(guarded.grpc, api_key=KEYS[1]) as with_key:
        for try_it in (without.models, lambda: without.tokenize("w5"), lambda: without.generate([5, 6])):
            with pytest.raises(grpc.RpcError) as failed:
                try_it()
            assert failed.value.code() is CODE.UNAUTHENTICATED
        assert len(with_key.generate([5, 6], max_tokens=3, ignore_eos=True).outputs[0].token_ids) == 3


def test_models_one_by_one(guarded: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS[0])
    assert [client.models.retrieve(model.id).id for model in client.models.list()] == ["tiny", "org/tiny"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("org/other")
    assert missing.value.code == "model_not_found"
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    nowhere = http.get(f"{guarded.url}/v1/nowhere", headers=headers)
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, None)
    wrong = http.get(f"{guarded.url}/v1/completions", headers=headers)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert set(httpx.put(f"{guarded.url}/health", headers=headers).headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_names_and_sites(guarded: RunningServer) -> None:
    port = guarded.url.rsplit(":", 1)[1]
    key = {"authorization": f"Bearer {KEYS[0]}"}

    def get(**headers: str) -> httpx.Response:
        return http.get(f"{guarded.url}/v1/models", headers=key | headers)

    names = "localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"
    for host in (*names, "models.example", "[2001:db8::1]", f"[2001:db8::1]:{port}"):
        assert get(host=host).status_code == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "0.0.0.0", "[", "x" * 5000, ""):
        answer = get(host=host)
        assert answer.status_code == 403, host
        assert "--allowed-hosts" in answer.json()["error"]["message"]
        assert http.get(f"{guarded.url}/health", headers={"host": host}).status_code == 403
    for origin in ("https://app.example", guarded.url, "http://localhost:3000"):
        assert get(origin=origin).status_code == 200, origin
    for origin in ("https://evil.example", "null", "https://app.example.evil.example", "http://app.example", ""):
        answer = get(origin=origin)
        assert answer.status_code == 403, origin
        assert "--allowed-origins" in answer.json()["error"]["message"]


def test_scripts_of_an_allowed_site(guarded: RunningServer) -> None:
    url = f"{guarded.url}/v1/chat/completions"
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    asks |= {"access-control-request-headers": "authorization,content-type,x-stainless-os"}
    allowed = http.options(url, headers=asks)
    assert allowed.status_code == 200, "a browser sends no key with this question"
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    refused = http.options(url, headers=asks | {"origin": "https://evil.example"})
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    answer = http.post(url, headers={"origin": "https://app.example"}, json={})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example", "else its page cannot read why"
