"""The demo model: equal to transformers token by token, and served by the command that needs no argument."""

import openai
import pytest
import torch
from conftest import RunningServer
from quire import LLM, SamplingParams
from quire_engine.config import DEMO_MODEL
from quire_engine.weights.resolve import resolve
from transformers import AutoModelForCausalLM
from web import http

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "Q: What is 12 * 12?\nA:",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
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


@pytest.mark.timeout(900)  # transformers alone takes a minute or two
@pytest.mark.parametrize(("count", "length"), [(5, 32), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_transformers(count: int, length: int) -> None:
    """Alone and batched together. transformers reads and dequantizes the file by itself."""
    files = resolve(DEMO_MODEL)
    assert files.gguf_path is not None
    model = AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=files.gguf_path.name, dtype=torch.float32)
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    with LLM() as llm:
        batched = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:count], params, use_tqdm=False)]
        alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS[:count]]
        tokens = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:count]]
    for prompt, one, many in zip(tokens, alone, batched, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        expected = out[0, len(prompt) :].tolist()
        assert one == expected
        assert many == expected


@pytest.fixture(scope="module")
def server() -> RunningServer:
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
    text = "This is a long story about nothing at all. " * 300
    body = {"prompt": text, "max_tokens": 4, "temperature": 0}
    first = http.post(f"{server.url}/v1/completions", json=body).json()
    second = http.post(f"{server.url}/v1/completions", json=body).json()
    assert first["usage"]["prompt_tokens"] > 2000
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] - 16
