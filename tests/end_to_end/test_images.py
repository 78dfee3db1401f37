"""Images over every way in, with a tiny model whose answers transformers gives as well."""

import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import RunningServer, processes, wait_until
from openai import OpenAI
from PIL import Image
from quire import LLM, AsyncClient, Client, SamplingParams
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import inference_pb2 as pb
from shown import NEW_TOKENS, Shower, truth
from vlms import VLMS, make_vlm, picture
from web import LIMIT, http

PICTURES = picture(1, 96, 60), picture(2, 50, 120)
PARTS = ["One: ", PICTURES[0], " two: ", PICTURES[1], " differ in?"]


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def part_of(part: str | Image.Image) -> dict[str, Any]:
    """As OpenAI's clients write it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return image_url("data:image/png;base64," + base64.b64encode(file_of(part)).decode())


def image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def conversation(parts: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part_of(part) for part in parts]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A checkpoint with M-RoPE, and its greedy tokens about PARTS."""
    folder = tmp_path_factory.mktemp("seeing")
    whole = make_vlm("qwen2_5_vl", folder)
    with torch.no_grad():
        return folder, truth(whole, Shower(folder).show(PARTS))[1]


@pytest.fixture(scope="module")
def seeing(model: tuple[Path, list[int]]) -> Iterator[RunningServer]:
    server = RunningServer(
        str(model[0]), "-dp", "2", "--served-model-name", "seeing", "--allowed-local-media-path", str(model[0])
    )
    yield server
    assert server.stop() == 0, server.log


def ask(server: RunningServer, content: list[dict[str, Any]], **body: Any) -> httpx.Response:
    asked = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return http.post(f"{server.url}/v1/chat/completions", json=asked | body)


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["choices"][0]["token_ids"]
    return found


def _image_tokens(folder: Path, tokens: list[int]) -> int:
    return tokens.count(json.loads((folder / "config.json").read_text())["image_token_id"])


def test_openai_client(seeing: RunningServer, model: tuple[Path, list[int]]) -> None:
    _, wanted = model
    client = OpenAI(base_url=f"{seeing.url}/v1", api_key="x", timeout=LIMIT, max_retries=0)
    options: dict[str, Any] = {
        "model": "seeing",
        "messages": conversation(PARTS),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].model_dump()["token_ids"] == wanted
    details = whole.usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == _image_tokens(model[0], whole.choices[0].prompt_token_ids) > 0
    stream = client.chat.completions.create(**options, stream=True)
    choices = [choice.model_dump() for chunk in stream for choice in chunk.choices]
    streamed = [token for choice in choices for token in choice.get("token_ids") or ()]
    assert streamed == wanted
    [listed] = client.models.list().data
    assert listed.model_dump()["input_modalities"] == ["text", "image"]


def test_every_way_in(seeing: RunningServer, model: tuple[Path, list[int]], tmp_path: Path) -> None:
    """By URL, as bytes, as a path and as a PIL image; from the folder that is open, too."""
    folder, wanted = model
    files = [folder / f"{number}.png" for number in range(2)]
    for file, image in zip(files, PICTURES, strict=True):
        file.write_bytes(file_of(image))
    named = iter(files)
    by_file = [part_of(part) if isinstance(part, str) else image_url(next(named).as_uri()) for part in PARTS]
    answer = ask(seeing, by_file)
    assert tokens_of(answer) == wanted
    options: dict[str, Any] = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, "timeout": LIMIT}
    with Client(seeing.grpc) as client:
        for given in (PICTURES, [file_of(image) for image in PICTURES], files):
            images = iter(given)
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": next(images)}
                for part in PARTS
            ]
            found = client.chat([{"role": "user", "content": content}], **options)
            assert found.outputs[0].token_ids == wanted
        [raw] = list(client._ask("ListModels", pb.ListModelsRequest()).models)
        assert list(raw.input_modalities) == ["text", "image"]
    command = [sys.executable, "-m", "quire.cli.main", "chat", "--address", seeing.grpc, "--temperature", "0"]
    command += ["--image", str(files[0]), "--max-tokens", "4", "What is this?"]
    said = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT).stdout.decode(errors="replace")
    content = [part_of(PICTURES[0]), part_of("What is this?")]
    assert said.rstrip("\n") == ask(seeing, content, max_tokens=4, ignore_eos=False).json()["choices"][0]["message"][
        "content"
    ].rstrip("\n")


def test_offline(model: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, wanted = model
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    lines = [
        {
            "custom_id": str(number),
            "url": "/v1/chat/completions",
            "body": {"messages": conversation(parts), "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
        }
        for number, parts in enumerate((PARTS, ["no image"]))
    ]
    broken = image_url("data:image/png;base64,AAAA")
    lines.append(lines[0] | {"custom_id": "2", "body": {"messages": [{"role": "user", "content": [broken]}]}})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    with LLM(folder, device="cpu", kv_cache_memory_bytes=1 << 22) as llm:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in PARTS
        ]
        [chatted] = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
        assert chatted.outputs[0].token_ids == wanted
        assert chatted.prompt is not None
        text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", chatted.prompt)
        prompt = {"prompt": text, "multi_modal_data": {"image": list(PICTURES)}}
        [generated] = llm.generate(prompt, params, use_tqdm=False)
        assert generated.outputs[0].token_ids == wanted
        for path, why in ((tmp_path, "is no file"), ("/dev/zero", "is no file"), (tmp_path / "none.png", "No such")):
            with pytest.raises(InvalidParameter, match=why):
                llm.generate(prompt | {"multi_modal_data": {"image": path}}, params, use_tqdm=False)
        said = chatted.outputs[0].text
    command = [sys.executable, "-m", "quire.cli.main", "run-batch", str(source), "-o", str(target)]
    subprocess.run([*command, "--model", str(folder), "--device", "cpu"], check=True, timeout=LIMIT)
    results = [json.loads(line)["response"] for line in target.read_text().splitlines()]
    assert [result["status_code"] for result in results] == [200, 200, 400]
    assert results[0]["body"]["choices"][0]["message"]["content"] == said
    assert "part 0 of message 0" in results[2]["body"]["error"]["message"]


@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_over_two_workers(split: str, tmp_path: Path) -> None:
    """With deepstack, which adds to what several layers give."""
    whole = make_vlm("qwen3_vl", tmp_path)
    wanted = truth(whole, Shower(tmp_path).show(PARTS))[1]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    options: dict[str, Any] = {split: 2, "device": "cpu", "cpu_threads": 1, "kv_cache_memory_bytes": 1 << 22}
    with LLM(tmp_path, **options) as llm:
        [found] = llm.chat(conversation(PARTS), params, use_tqdm=False)
        assert found.outputs[0].token_ids == wanted


def bad_contents() -> dict[str, tuple[list[dict[str, Any]], str]]:
    png = file_of(PICTURES[0])
    data = "data:image/png;base64,"

    def of(content: bytes) -> dict[str, Any]:
        return image_url(data + base64.b64encode(content).decode())

    good = part_of(PICTURES[0])
    return {
        "no image": ([good, of(b"hello")], "part 1 of message 0"),
        "truncated": ([of(png[: len(png) // 2])], "part 0 of message 0"),
        "svg": ([of(b"<svg xmlns='http://www.w3.org/2000/svg'/>")], "PNG, JPEG, WebP and GIF"),
        "bomb": ([of(file_of(Image.new("1", (50_000, 50_000))))], "50000 x 50000 pixels"),
        "narrow": ([of(file_of(Image.new("L", (4000, 4))))], "the longer side"),
        "not open": ([image_url("http://127.0.0.1:1/a.png")], "--allowed-media-domains"),
        "elsewhere": ([image_url("file:///etc/passwd")], "part 0 of message 0"),
        "another type": ([{"type": "input_audio", "input_audio": {}}], "'input_audio' are not supported"),
        "a path": ([{"type": "image", "image": "/etc/passwd"}], "parts of type 'image' are not supported"),
        "no object": ([{"type": "image_url", "image_url": data}], "must be an object with a url"),
        "too many": ([good] * 17, "at most 16"),
        "a placeholder": ([part_of("<|image_pad|>"), good], "stands for an image"),
        "too long": ([good, part_of("x" * 600)], "context"),
    }


def test_bad_images_cost_their_requests_alone(seeing: RunningServer, model: tuple[Path, list[int]]) -> None:
    workers = processes(seeing, "Worker")
    for what, (content, why) in bad_contents().items():
        answer = ask(seeing, content)
        assert answer.status_code == 400, (what, answer.text)
        assert why in answer.json()["error"]["message"], (what, answer.text)
    assert tokens_of(ask(seeing, [part_of(part) for part in PARTS])) == model[1]
    assert processes(seeing, "Worker") == workers


def test_malformed_files(seeing: RunningServer, model: tuple[Path, list[int]]) -> None:
    """Bytes of good files are changed, cut, doubled: each is an image all the same, or a 400."""
    chosen = random.Random(0)
    files = [file_of(picture(3, 40, 30), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")]
    found = set()
    for number in range(200):
        file = bytearray(files[number % 4])
        for _ in range(chosen.randint(1, 6)):
            at = chosen.randrange(len(file))
            change = chosen.randrange(3)
            if change == 0:
                file[at] = chosen.randrange(256)
            elif change == 1:
                del file[at : at + chosen.randint(1, 20)]
            else:
                file[at:at] = bytes(chosen.randrange(256) for _ in range(chosen.randint(1, 20)))
        url = "data:image/png;base64," + base64.b64encode(bytes(file)).decode()
        answer = ask(seeing, [image_url(url)], max_tokens=1)
        assert answer.status_code in (200, 400), answer.text
        found.add(answer.status_code)
    assert found == {200, 400}
    assert tokens_of(ask(seeing, [part_of(part) for part in PARTS])) == model[1]


def kill_amid_streams(server: RunningServer, wanted: list[int]) -> None:
    """Each of two workers in its turn, while six streams about images run: they go on at the other replica, which is
    sent the pixels then, with the tokens that they have undisturbed, of which the first ones are `wanted`."""
    victims = processes(server, "Worker")
    assert len(victims) == 2
    options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 200, "timeout": LIMIT}

    async def run(disturb: Callable[[], None]) -> list[list[int]]:
        begun = asyncio.Barrier(7)

        async def one(client: AsyncClient, number: int) -> list[int]:
            parts = PARTS if number == 0 else [f"{number}: ", *PARTS]
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
                for part in parts
            ]
            tokens: list[int] = []
            async for output in client.stream_chat([{"role": "user", "content": content}], **options):
                if not tokens:
                    await begun.wait()
                tokens += output.token_ids
            return tokens

        async with AsyncClient(server.grpc) as client:
            streams = [asyncio.ensure_future(one(client, number)) for number in range(6)]
            await begun.wait()
            disturb()
            return await asyncio.gather(*streams)

    undisturbed = asyncio.run(run(lambda: None))
    assert undisturbed[0][:NEW_TOKENS] == wanted
    for victim in victims:  # the one or the other has the streams, or both
        assert asyncio.run(run(partial(os.kill, victim, signal.SIGKILL))) == undisturbed
        wait_until(lambda: len(processes(server, "Worker")) == 2)
    assert "go on elsewhere" in server.log


def test_a_killed_worker_costs_no_token(seeing: RunningServer, model: tuple[Path, list[int]]) -> None:
    kill_amid_streams(seeing, model[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VLMS if name != "qwen2_5_vl"])
def test_a_killed_worker_of_each_family(name: str, tmp_path: Path) -> None:
    whole = make_vlm(name, tmp_path)
    wanted = truth(whole, Shower(tmp_path).show(PARTS))[1]
    server = RunningServer(str(tmp_path), "-dp", "2")
    try:
        kill_amid_streams(server, wanted)
    finally:
        assert server.stop() == 0, server.log


def test_counters(seeing: RunningServer) -> None:
    """What was encoded and what was found, as operators see it."""
    content = [part_of(picture(77, 80, 80)), part_of("What?")]

    def count(name: str) -> float:
        text = http.get(f"{seeing.url}/metrics").text
        return sum(map(float, re.findall(rf"^quire:{name}_total\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)))

    before = count("encoder_images"), count("encoder_seconds")
    assert ask(seeing, content, max_tokens=1).status_code == 200
    wait_until(lambda: count("encoder_images") > before[0] and count("encoder_seconds") > before[1])
    assert ask(seeing, [part_of("And: "), *content], max_tokens=1).status_code == 200
    assert count("mm_cache_queries") >= count("mm_cache_hits")


def test_a_model_of_texts_says_so(two_replicas: RunningServer) -> None:
    answer = http.post(
        f"{two_replicas.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": [part_of(PICTURES[0])]}], "model": "tiny"},
    )
    assert answer.status_code == 400
    assert "takes no images" in answer.json()["error"]["message"]
