"""The gRPC API, through our client, through generated stubs alone, and through reflection."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from conftest import RunningServer, wait_until
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from quire import AsyncClient, Client
from quire_protos.v1 import inference_pb2, inference_pb2_grpc
from web import http

ROOT = Path(__file__).parents[2]


@pytest.fixture
def client(two_replicas: RunningServer) -> Client:
    return Client(two_replicas.grpc)


def test_generate_equals_http(two_replicas: RunningServer, client: Client) -> None:
    over_http = http.post(
        f"{two_replicas.url}/v1/completions",
        json={"prompt": [5, 17, 30], "max_tokens": 12, "temperature": 0, "return_token_ids": True},
    ).json()["choices"][0]
    answer = client.generate([5, 17, 30], max_tokens=12, temperature=0, logprobs=2, prompt_logprobs=1)
    output = answer.outputs[0]
    assert output.token_ids == over_http["token_ids"]
    assert output.text == over_http["text"]
    assert output.finish_reason == "length"
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 12)
    assert [entry.chosen.token_id for entry in output.logprobs] == output.token_ids
    assert all(len(entry.top) == 2 and entry.chosen.rank == 1 for entry in output.logprobs)
    assert [entry.chosen.token_id for entry in answer.prompt_logprobs] == [17, 30]
    pieces = list(client.stream("w5 w17 w30", max_tokens=12, temperature=0))
    assert "".join(piece.text for piece in pieces) == output.text
    assert pieces[-1].finish_reason == "length"


def test_a_zero_is_a_zero(client: Client) -> None:
    """temperature 0 is greedy, not the default; left out it is 1."""
    greedy = {client.generate([5, 6], max_tokens=8, temperature=0).text for _ in range(3)}
    drawn = {client.generate([5, 6], max_tokens=8).text for _ in range(5)}
    assert len(greedy) == 1
    assert len(drawn) == 5


def test_chat_tokenize_detokenize_models(client: Client) -> None:
    answer = client.chat([{"role": "user", "content": "w5 w17 w30"}], max_tokens=4, temperature=0, n=2)
    assert [output.index for output in answer.outputs] == [0, 1]
    assert (
        answer.outputs[0].text
        == answer.outputs[1].text
        == client.generate("w5 w17 w30", max_tokens=4, temperature=0).text
    )
    assert client.tokenize("w5 w17") == [5, 17]
    assert client.detokenize([5, 17]) == "w5w17"
    assert client.models() == ["tiny"]


CODE = grpc.StatusCode
BAD = [
    ({"temperature": -1.0}, CODE.INVALID_ARGUMENT),
    ({"temperature": float("nan")}, CODE.INVALID_ARGUMENT),
    ({"n": 10**9}, CODE.INVALID_ARGUMENT),
    ({"max_tokens": 2**32 - 1}, CODE.INVALID_ARGUMENT),
    ({"max_tokens": 0}, CODE.INVALID_ARGUMENT),
    ({"stop": ["x"] * 10_000}, CODE.INVALID_ARGUMENT),
    ({"logit_bias": {300: 1.0}}, CODE.INVALID_ARGUMENT),
    ({"allowed_token_ids": [2**32 - 1]}, CODE.INVALID_ARGUMENT),
    ({"model": "other"}, CODE.NOT_FOUND),
    ({"timeout": 0.05, "max_tokens": 500, "ignore_eos": True}, CODE.DEADLINE_EXCEEDED),
]


@pytest.mark.parametrize(("options", "code"), BAD)
def test_status_codes(client: Client, options: dict, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        client.generate([5, 6], **options)
    assert failed.value.code() is code, failed.value.details()


def test_bad_prompts(client: Client) -> None:
    for prompt in ([], "", [300], [5] * 512, "w5 " * 4000, "w" * 2_000_000):
        with pytest.raises(grpc.RpcError) as failed:
            client.generate(prompt)
        assert failed.value.code() is CODE.INVALID_ARGUMENT, failed.value.details()
    with pytest.raises(grpc.RpcError) as failed:
        client.generate("w" * (33 << 20))
    assert failed.value.code() is CODE.RESOURCE_EXHAUSTED, "the message size is bounded"


def test_bytes_that_are_no_message_are_refused_and_leave_no_traceback(two_replicas: RunningServer) -> None:
    with grpc.insecure_channel(two_replicas.grpc) as channel:
        inference, reflection = "/quire.v1.Inference/", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        calls = [
            channel.unary_unary(f"{inference}Tokenize"),
            channel.unary_stream(f"{inference}Generate"),
            channel.unary_unary("/grpc.health.v1.Health/Check"),
            channel.stream_stream(reflection),
        ]
        for content in (b"\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd"):  # no message; a text that is not UTF-8
            for call in calls:
                with pytest.raises(grpc.RpcError) as failed:
                    streamed = isinstance(call, grpc.StreamStreamMultiCallable)
                    answer = call(iter([content]) if streamed else content, timeout=60)
                    list(answer) if not isinstance(answer, bytes) else None
                assert failed.value.code() is CODE.INVALID_ARGUMENT, failed.value.details()
                assert "generated from the .proto files" in failed.value.details()
    assert "Traceback" not in two_replicas.log


def test_cancelling_a_stream_frees_its_pages(two_replicas: RunningServer, client: Client) -> None:
    def running() -> float:
        text = http.get(f"{two_replicas.url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("quire:num_requests_running{")]
        return sum(float(line.split()[-1]) for line in lines)

    streams = [client.stream([5, 6, n + 7], max_tokens=480, ignore_eos=True) for n in range(8)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    wait_until(lambda: not running())


def test_64_streams(two_replicas: RunningServer) -> None:
    async def all_of_them() -> list[int]:
        async with AsyncClient(two_replicas.grpc) as client:
            answers = await asyncio.gather(
                *(client.generate([n + 5, 6], max_tokens=40, ignore_eos=True) for n in range(64))
            )
        return [len(answer.outputs[0].token_ids) for answer in answers]

    assert asyncio.run(all_of_them()) == [40] * 64


def test_a_generated_stub_needs_nothing_of_ours(two_replicas: RunningServer, tmp_path: Path) -> None:
    """As a user would: protoc over our .proto, and a process that cannot import the project."""
    (tmp_path / "inference.proto").write_text((ROOT / "protos/quire_protos/v1/inference.proto").read_text())
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--grpc_python_out=.", "inference.proto"],
        cwd=tmp_path,
        check=True,
    )
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "for name in ('quire', 'quire_protos', 'quire_engine', 'quire_cluster', 'torch', 'ray'):\n"
        "    sys.modules[name] = None\n"
        "import grpc, inference_pb2 as pb, inference_pb2_grpc\n"
        f"stub = inference_pb2_grpc.InferenceStub(grpc.insecure_channel('{two_replicas.grpc}'))\n"
        "request = pb.GenerateRequest(text='w5 w17', sampling=pb.SamplingParams(max_tokens=9, temperature=0))\n"
        "tokens = [t for m in stub.Generate(request) for t in m.token_ids]\n"
        "print(len(tokens))\n"
    )
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "9"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_and_health(two_replicas: RunningServer, version: str) -> None:
    with grpc.insecure_channel(two_replicas.grpc) as channel:
        own = f"grpc.reflection.{version}.ServerReflection"
        reflection = channel.stream_stream(
            f"/{own}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="quire.v1.Inference"),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=own),
        ]
        listed, described, itself = reflection(iter(requests))
        assert itself.HasField("file_descriptor_response")
        names = {service.name for service in listed.list_services_response.service}
        assert names == {
            "quire.v1.Inference",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = descriptor_pb2.FileDescriptorProto.FromString(
            described.file_descriptor_response.file_descriptor_proto[0]
        )
        methods = {method.name for service in file.service for method in service.method}
        assert methods == {"Generate", "Chat", "Tokenize", "Detokenize", "Embed", "ListModels"}
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as failed:
            health.List(health_pb2.HealthListRequest())
        assert failed.value.code() is CODE.UNIMPLEMENTED
        for service in ("", "quire.v1.Inference"):
            state = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert state == health_pb2.HealthCheckResponse.SERVING
    assert "Traceback" not in two_replicas.log


@pytest.mark.parametrize("finished", [True, False])
def test_the_prompts_scores_come_after_an_answer_that_was_whole(two_replicas: RunningServer, finished: bool) -> None:
    """They are sent last: a stream that broke before them had everything else."""
    with Client(two_replicas.grpc) as client:
        whole = client.generate([5, 17, 30], max_tokens=6, temperature=0, prompt_logprobs=2)
    held = inference_pb2.Emitted(token_ids=whole.outputs[0].token_ids, finished=finished)
    with grpc.insecure_channel(two_replicas.grpc) as channel:
        messages = list(
            inference_pb2_grpc.InferenceStub(channel).Generate(
                inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=[5, 17, 30]),
                    sampling=inference_pb2.SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=2),
                    resume=[held],
                )
            )
        )
    assert [token for message in messages for token in message.token_ids] == []
    scores = [position for message in messages for position in message.prompt_logprobs]
    assert scores == whole.prompt_logprobs
    assert [message.finish_reason for message in messages if message.HasField("finish_reason")] == (
        [] if finished else ["length"]
    )
    assert messages[-1].usage.completion_tokens == 6
