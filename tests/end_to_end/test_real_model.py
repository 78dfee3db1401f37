"""The demo model: equal to transformers token by token, and served by the command that needs no argument."""

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import torch
from conftest import RunningServer, held, wait_until
from quire import LLM, AsyncClient, SamplingParams
from quire_engine.config import DEMO_MODEL
from quire_engine.weights.resolve import resolve
from transformers import AutoModelForCausalLM
from web import http

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Q: What is 12 * 12?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "import numpy as np\n\nx = np.",
    "El gato se sienta en la",
    "1, 1, 2, 3, 5, 8, 13,",
    "<html>\n<head>\n<title>",
    "In 1492, Christopher Columbus",
    "Roses are red,\nviolets are",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "To make a good cup of tea, first",
    "SELECT name, age FROM users WHERE",
    "Photosynthesis is the process by which",
    "E = mc^2 means that",
    "Knock knock.\nWho's there?\n",
    "# Introduction\n\nMachine learning",
    "A",
]


# What transformers makes of the first five, greedily; the two best tokens are never closer than 0.009.
EXPECTED = json.loads(Path(__file__).with_name("smollm2_tokens.json").read_text())


def greedy(prompts: list[str], length: int, num_alone: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ours: the prompts in tokens, what comes of all of them in one batch, and of the first ones alone."""
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    with LLM(cpu_threads=1) as llm:
        batched = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts[:num_alone]]
        return [llm.tokenizer.encode(prompt) for prompt in prompts], batched, alone


def test_greedy_tokens_are_those_of_transformers() -> None:
    """Alone and batched together."""
    _, batched, alone = greedy(PROMPTS[: len(EXPECTED)], len(EXPECTED[0]), 1)
    assert batched == EXPECTED
    assert alone == EXPECTED[:1]


@pytest.mark.slow
@pytest.mark.timeout(900)  # transformers alone takes a minute or two
def test_greedy_tokens_equal_transformers() -> None:
    """transformers reads and dequantizes the file by itself."""
    files = resolve(DEMO_MODEL)
    assert files.gguf_path is not None
    model = AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=files.gguf_path.name, dtype=torch.float32)
    tokens, batched, alone = greedy(PROMPTS, 64, len(PROMPTS))
    for prompt, one, many in zip(tokens, alone, batched, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected = out[0, len(prompt) :].tolist()
        assert one == expected
        assert many == expected
    assert [one[: len(told)] for one, told in zip(alone, EXPECTED, strict=False)] == EXPECTED


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer()
    yield running
    assert running.stop() == 0, running.log


def test_it_answers(server: RunningServer) -> None:
    assert http.get(f"{server.url}/ready").status_code == 200
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_prompt_of_thousands_of_tokens(server: RunningServer) -> None:
    """In chunks; the second time nearly all of it comes from the prefix cache."""
    text = "This is a long story about nothing at all. " * 210
    body = {"prompt": text, "max_tokens": 4, "temperature": 0}
    first = http.post(f"{server.url}/v1/completions", json=body).json()
    second = http.post(f"{server.url}/v1/completions", json=body).json()
    assert first["usage"]["prompt_tokens"] > 2000
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] - 16


def test_nothing_is_left_behind(server: RunningServer) -> None:
    """Its terminal closes during a stream: the stream finishes, and then no process, no memory segment and no folder is
    left. The last test of this server; others end theirs with SIGTERM."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    assert len(below) > 3
    left = held(below)
    assert any(path.parent == Path("/tmp") for path in left)

    async def stream() -> int:
        count = 0
        async with AsyncClient(server.grpc) as client:
            async for output in client.stream([5, 6, 7], max_tokens=60, ignore_eos=True):
                if count == 0:
                    server.process.send_signal(signal.SIGHUP)
                count += len(output.token_ids)
        return count

    assert asyncio.run(stream()) == 60
    assert server.wait() == 0, server.log
    wait_until(lambda: not any(process.is_running() for process in below))
    assert not [path for path in left if path.exists()]
