"""The OpenAI API, through the openai SDK as it is and through plain HTTP."""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
import torch
import transformers
from conftest import RunningServer, wait_until
from web import LIMIT, http


@pytest.fixture
def client(two_replicas: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{two_replicas.url}/v1", api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "w5 w17 w30"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 12, 15)
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "w5 w17 w30"}]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, stream=stream
        )
        if stream:
            parts = [chunk.choices[0].logprobs for chunk in answer if chunk.choices[0].logprobs]
            content = [entry for part in parts for entry in part.content or []]
        else:
            content = answer.choices[0].logprobs.content
        assert len(content) == 6
        for entry in content:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy takes the likeliest"
            assert entry.token == entry.top_logprobs[0].token
            assert entry.logprob <= 0


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["w5 w6", "w7 w8 w9"], n=2, seed=7, max_tokens=5, logprobs=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("w5w6")
    scores = answer.choices[3].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == 3 + 5
    assert scores.token_logprobs[0] is None
    assert answer.choices[0].text != answer.choices[1].text, "each choice draws for itself"
    again = client.completions.create(model="tiny", prompt=["w5 w6", "w7 w8 w9"], n=2, seed=7, max_tokens=5, echo=True)
    assert [c.text for c in again.choices] == [c.text for c in answer.choices], "a seed repeats"
    tokens = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, temperature=0)
    assert tokens.usage.prompt_tokens == 2
    streamed = client.completions.create(
        model="tiny", prompt=["w5 w6", "w7 w8 w9"], n=2, seed=7, max_tokens=5, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert ["w5w6" + texts[0], "w5w6" + texts[1], "w7w8w9" + texts[2], "w7w8w9" + texts[3]] == [
        c.text for c in answer.choices
    ]


def test_scores_of_prompts(client: openai.OpenAI, checkpoint: Callable[[str], Path]) -> None:
    """As lm-eval asks for them: a batch of token ids, echoed and scored, with nothing or one token generated."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.float32)
    names = dict(enumerate(("<pad>", "<s>", "</s>", "<unk>")))
    numbers = random.Random(1)
    prompts = [[numbers.randrange(4, 300) for _ in range(length)] for length in (1, 2, 17, 300)]
    for generated, width in ((0, 1), (0, 5), (1, 1)):
        answer = client.completions.create(
            model="tiny", prompt=prompts, max_tokens=generated, temperature=0, logprobs=width, echo=True, seed=1
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == generated * len(prompts)
        for prompt, choice in zip(prompts, answer.choices, strict=True):
            scores = choice.logprobs
            assert scores is not None
            with torch.inference_mode():
                truth = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            assert scores.tokens[: len(prompt)] == [f"w{token}" for token in prompt]
            assert len(scores.tokens) == len(prompt) + generated
            assert choice.text.startswith("".join(scores.tokens[: len(prompt)]))
            assert scores.token_logprobs[0] is None
            assert scores.top_logprobs[0] is None
            for place, token in enumerate(prompt[1:], 1):
                likely = truth[place - 1].topk(width)
                assert scores.token_logprobs[place] == pytest.approx(float(truth[place - 1, token]), abs=1e-4)
                top = scores.top_logprobs[place]
                assert max(top.values()) == pytest.approx(float(likely.values[0]), abs=1e-4)
                assert {names.get(one, f"w{one}") for one in [token, *likely.indices.tolist()]} == set(top)
            assert choice.finish_reason == "length"


def test_an_echo_without_an_output(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="w5 w6", max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("w5w6", None)
    only = client.completions.create(model="tiny", prompt="w5 w6", max_tokens=0, extra_body={"prompt_logprobs": 1})
    assert only.choices[0].text == ""
    assert len(only.choices[0].model_extra["prompt_logprobs"]) == 2


def test_a_stop_string_across_the_least_number_of_tokens(client: openai.OpenAI) -> None:
    """It counts if it ends after `min_tokens`, even if it begins before; one that ends before is text."""
    asked = {"model": "tiny", "prompt": "w5 w17", "temperature": 0, "max_tokens": 20}
    free = client.completions.create(**asked).choices[0].text
    words = re.findall(r"w\d+", free)
    early, across = words[1], words[4] + words[5]
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[early, across], stream=stream, extra_body={"min_tokens": 5})
        chunks = list(answer) if stream else [answer]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        first = "".join(words[:5])
        expected = min((place, stop) for stop in (early, across) for place in ends_after(free, stop, len(first)))
        assert text == free[: expected[0]]
        assert chunks[-1].choices[0].stop_reason == expected[1]


def ends_after(text: str, stop: str, least: int) -> list[int]:
    """Where `stop` begins in the text, of those places where it ends beyond `least` characters."""
    return [at for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > least]


def test_stop_strings(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="w5 w17", temperature=0, max_tokens=20).choices[0].text
    words = re.findall(r"w\d+", free)
    stop = words[6] + words[7][:2]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt="w5 w17", temperature=0, max_tokens=20, stop=[stop, "never"], stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == free[: free.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].stop_reason == stop
    kept = client.completions.create(
        model="tiny",
        prompt="w5 w17",
        temperature=0,
        max_tokens=20,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text.endswith(stop)


def test_a_top_p_of_0_leaves_the_likeliest_token(client: openai.OpenAI) -> None:
    """OpenAI's API takes it."""
    greedy, nucleus = (
        client.completions.create(model="tiny", prompt="w5 w17", max_tokens=12, seed=1, **options).choices[0].text
        for options in ({"temperature": 0}, {"temperature": 1, "top_p": 0})
    )
    assert nucleus == greedy


def test_errors_are_the_sdks_own(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "w5"}]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"frobnicate": 1})
    assert unknown.value.param == "frobnicate"
    assert [model.id for model in client.models.list()] == ["tiny"]


CHAT = {"messages": [{"role": "user", "content": "w5 w6"}]}
TEXT = {"prompt": "w5 w6"}
BAD = [
    ("chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    ("chat/completions", CHAT | {"n": 10**9}, 400, "n"),
    ("chat/completions", CHAT | {"n": 0}, 400, "n"),
    ("chat/completions", CHAT | {"max_tokens": 10**12}, 400, "max_tokens"),
    ("chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    ("chat/completions", CHAT | {"max_tokens": 512}, 400, "max_tokens"),
    ("chat/completions", CHAT | {"min_tokens": 512}, 400, "min_tokens"),
    ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens"),
    ("completions", TEXT | {"max_tokens": 0, "logprobs": 1}, 400, "max_tokens"),
    ("chat/completions", CHAT | {"stop": ["x"] * 10_000}, 400, "stop"),
    ("chat/completions", CHAT | {"stop": ["x" * 100_000]}, 400, "stop"),
    ("chat/completions", CHAT | {"stop": [""]}, 400, "stop"),
    ("chat/completions", CHAT | {"top_p": -0.1}, 400, "top_p"),
    ("chat/completions", CHAT | {"top_k": -2}, 400, "top_k"),
    ("chat/completions", CHAT | {"min_p": 2}, 400, "min_p"),
    ("chat/completions", CHAT | {"seed": 2**70}, 400, None),
    ("chat/completions", CHAT | {"presence_penalty": 3}, 400, "presence_penalty"),
    ("chat/completions", CHAT | {"repetition_penalty": 0}, 400, "repetition_penalty"),
    ("chat/completions", CHAT | {"logit_bias": {"300": 1}}, 400, "logit_bias"),
    ("chat/completions", CHAT | {"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("chat/completions", CHAT | {"logit_bias": {"5": 1e9}}, 400, "logit_bias"),
    ("chat/completions", CHAT | {"logit_bias": {str(i): 1 for i in range(100_000)}}, 400, "logit_bias"),
    ("chat/completions", CHAT | {"allowed_token_ids": [-1]}, 400, "allowed_token_ids"),
    ("chat/completions", CHAT | {"allowed_token_ids": []}, 400, "allowed_token_ids"),
    ("chat/completions", CHAT | {"allowed_token_ids": [10**20]}, 400, None),
    ("chat/completions", CHAT | {"stop_token_ids": [10**6]}, 400, "stop_token_ids"),
    ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs"),
    ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", CHAT | {"min_tokens": 20, "max_tokens": 10}, 400, "min_tokens"),
    ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    ("chat/completions", CHAT | {"response_format": {"type": "grammar"}}, 400, "response_format"),
    ("chat/completions", CHAT | {"structured_outputs": {"choices": ["a"]}}, 400, "structured_outputs"),
    ("chat/completions", CHAT | {"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ("chat/completions", CHAT | {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 400, "chat_template_kwargs"),
    ("chat/completions", CHAT | {"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs"),
    ("chat/completions", CHAT | {"chat_template_kwargs": {"padding": "x"}}, 400, "chat_template_kwargs"),
    ("chat/completions", CHAT | {"chat_template_kwargs": {"x" * 100_000: 1}}, 400, "chat_template_kwargs"),
    ("chat/completions", CHAT | {"reasoning_effort": "high"}, 400, "reasoning_effort"),
    ("chat/completions", CHAT | {"functions": []}, 400, "functions"),
    ("chat/completions", CHAT | {"top_k": 2**31}, 400, "top_k"),
    ("chat/completions", CHAT | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("chat/completions", CHAT | {"temperature": "hot"}, 400, "temperature"),
    ("chat/completions", CHAT | {"stream": "yes"}, 400, "stream"),
    ("chat/completions", CHAT | {"priority": 2**40}, 400, "priority"),
    ("chat/completions", CHAT | {"request_id": "a b\n"}, 400, "request_id"),
    ("chat/completions", CHAT | {"model": "x" * 10_000}, 404, "model"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ("chat/completions", {}, 400, "messages"),
    ("completions", {}, 400, "prompt"),
    ("completions", {"prompt": []}, 400, "prompt"),
    ("completions", {"prompt": [[]]}, 400, "prompt"),
    ("completions", {"prompt": [300]}, 400, "prompt"),
    ("completions", {"prompt": [-1]}, 400, "prompt"),
    ("completions", {"prompt": [10**30]}, 400, None),
    ("completions", {"prompt": [5] * 512}, 400, "prompt"),
    ("completions", {"prompt": "w5 " * 3000}, 400, "prompt"),
    ("completions", {"prompt": "w" * 3_000_000}, 400, "prompt"),
    ("completions", TEXT | {"best_of": 3}, 400, "best_of"),
    ("completions", TEXT | {"suffix": "x"}, 400, "suffix"),
    ("completions", TEXT | {"bad_words": [""]}, 400, "bad_words"),
    ("completions", TEXT | {"prompt_logprobs": 1, "stream": True}, 400, "stream"),
]


@pytest.mark.parametrize(("route", "body", "status", "parameter"), BAD)
def test_bad_input(two_replicas: RunningServer, route: str, body: dict, status: int, parameter: str | None) -> None:
    answer = http.post(f"{two_replicas.url}/v1/{route}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == parameter or parameter is None, error
    assert len(error["message"]) < 500
    assert "Traceback" not in error["message"]
    assert str(Path.home()) not in error["message"]


def test_malformed_bodies(two_replicas: RunningServer) -> None:
    url = f"{two_replicas.url}/v1/chat/completions"
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"a":' * 5000,
        json.dumps("x").encode(),
    ):
        answer = http.post(url, content=body)
        assert answer.status_code == 400, (body[:20], answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    nan = b'{"messages": [{"role": "user", "content": "w5"}], "temperature": NaN}'
    assert http.post(url, content=nan).status_code == 400
    assert http.get(f"{two_replicas.url}/nowhere").status_code == 404
    assert http.get(url).status_code == 405


def test_a_body_of_100_megabytes_is_refused_unread(two_replicas: RunningServer) -> None:
    sent = 0

    def body() -> object:
        nonlocal sent
        for _ in range(1600):
            sent += 1 << 16
            yield b"x" * (1 << 16)

    url = f"{two_replicas.url}/v1/completions"
    try:
        answer = http.post(url, content=body(), headers={"content-length": str(100 << 20)})
        assert answer.status_code == 413
        assert "bytes" in answer.json()["error"]["message"]
    except httpx.WriteError:
        pass  # it hung up on the rest, which is as good
    assert sent < 100 << 20
    assert http.get(f"{two_replicas.url}/health").status_code == 200


def test_bad_input_leaves_other_streams_alone(two_replicas: RunningServer) -> None:
    """A victim alone equals a victim beside everything above."""
    url = two_replicas.url
    body = {"prompt": [9, 8, 7], "max_tokens": 300, "seed": 3, "ignore_eos": True, "return_token_ids": True}

    async def victim(client: httpx.AsyncClient) -> list[int]:
        return (await client.post(f"{url}/v1/completions", json=body)).json()["choices"][0]["token_ids"]

    async def both() -> tuple[list[int], list[int]]:
        async with httpx.AsyncClient(timeout=LIMIT) as client:
            alone = await victim(client)
            beside = asyncio.ensure_future(victim(client))
            hostile = [client.post(f"{url}/v1/{route}", json=bad) for route, bad, _, _ in BAD]
            legal = [
                client.post(f"{url}/v1/completions", json=TEXT | extra)
                for extra in (
                    {"allowed_token_ids": [5], "bad_words": ["w5"]},
                    {"repetition_penalty": 100, "frequency_penalty": 2, "presence_penalty": -2},
                    {"logit_bias": {str(i): -100 for i in range(300)}},
                    {"temperature": 1000, "min_p": 1},
                    {"top_k": 1 << 40},
                    {"min_tokens": 1 << 40, "max_tokens": None},
                    {"prompt_logprobs": 20, "logprobs": 20},
                )
            ]
            answers = await asyncio.gather(*hostile, *legal)
            assert all(answer.status_code < 500 or "no token" in answer.text for answer in answers)
            return alone, await beside

    alone, beside = asyncio.run(both())
    assert len(alone) == 300
    assert alone == beside


def test_tokenize_and_detokenize(two_replicas: RunningServer) -> None:
    url = two_replicas.url
    answer = http.post(f"{url}/tokenize", json={"prompt": "w5 w299 what", "return_token_strs": True}).json()
    assert answer["tokens"] == [5, 299, 3]
    assert answer["token_strs"] == ["w5", "w299", "<unk>"]
    assert http.post(f"{url}/detokenize", json={"tokens": [5, 299]}).json() == {"prompt": "w5w299"}
    assert http.post(f"{url}/detokenize", json={"tokens": [300]}).status_code == 400


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(float(value) for value in re.findall(rf"^quire:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE))


def test_metrics(two_replicas: RunningServer) -> None:
    url = two_replicas.url
    before = http.get(f"{url}/metrics").text
    body = {"prompt": [200 + i for i in range(50)], "max_tokens": 8, "ignore_eos": True, "n": 2}
    assert http.post(f"{url}/v1/completions", json=body).status_code == 200
    after = before

    def grown(name: str) -> float:
        return metric(after, name) - metric(before, name)

    def told() -> bool:  # replicas report now and then
        nonlocal after
        after = http.get(f"{url}/metrics").text
        return grown("request_success_total") == 2 and not metric(after, "num_requests_running")

    wait_until(told)

    assert grown("prompt_tokens_total") == 50
    assert grown("generation_tokens_total") == 16
    assert grown("request_success_total") == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("inter_token_latency_seconds_count") == 14
    assert metric(after, "kv_cache_usage_perc") == 0
    for name in ("num_requests_waiting", "cache_config_info", "num_preemptions_total", "prefix_cache_queries_total"):
        assert f"quire:{name}" in after


async def wait_until_idle(client: httpx.AsyncClient, url: str) -> float:
    """The share of pages in use once no request is left in any engine (reports come four times a second)."""
    until = time.monotonic() + LIMIT
    quiet = 0
    while quiet < 3:
        await asyncio.sleep(0.3)
        text = (await client.get(f"{url}/metrics")).text
        busy = metric(text, "num_requests_running") + metric(text, "num_requests_waiting")
        quiet = 0 if busy else quiet + 1
        assert time.monotonic() < until, text
    return metric(text, "kv_cache_usage_perc")


def test_64_streams(two_replicas: RunningServer) -> None:
    async def one(client: httpx.AsyncClient, number: int) -> int:
        body = {"prompt": [number + 5, 6], "max_tokens": 40, "stream": True, "ignore_eos": True}
        count = 0
        async with client.stream("POST", f"{two_replicas.url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                count += line.startswith("data: {")
            assert line == "" or line == "data: [DONE]"
        return count

    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=LIMIT, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    assert min(asyncio.run(all_of_them())) >= 20


def test_500_cancelled_requests_leave_no_page_behind(two_replicas: RunningServer) -> None:
    url = two_replicas.url
    generator = random.Random(0)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": [4 + (number * 7 + i) % 290 for i in range(40)], "max_tokens": 400, "ignore_eos": True}
        body["stream"] = number % 2 == 0
        try:
            async with asyncio.timeout(generator.uniform(0.0, 0.4)):
                await client.post(f"{url}/v1/completions", json=body)
        except TimeoutError:
            pass

    async def storm() -> None:
        async with httpx.AsyncClient(timeout=LIMIT, limits=httpx.Limits(max_connections=None)) as client:
            assert await wait_until_idle(client, url) == 0
            for start in range(0, 500, 50):
                await asyncio.gather(*(one(client, start + i) for i in range(50)))
            assert await wait_until_idle(client, url) == 0

    asyncio.run(storm())
    answer = http.post(f"{url}/v1/completions", json=TEXT)
    assert answer.status_code == 200
