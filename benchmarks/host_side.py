"""What the host costs: its share of a step without a device, and the whole stack around a model of width 64.

python benchmarks/host_side.py scheduler
python benchmarks/host_side.py steps
python benchmarks/host_side.py streams [--streams 1,64,256]
python benchmarks/host_side.py gaps
"""

import argparse
import contextlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from quire_engine.batch import Batcher
from quire_engine.config import SchedulerLimits
from quire_engine.engine import Engine
from quire_engine.request import EngineSampling, Request
from quire_engine.sampling.sampler import Sampler
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepResult
from quire_kernels.torch_backend import TorchBackend


def host_share(running: int, steps: int = 200) -> dict[str, float]:
    """Median seconds per step of what the host does for `running` decoding requests, without a device: schedule,
    batch (the step's arrays, packed into the buffer that one copy would take), commit. Steps overlap, as on a GPU."""
    limits = SchedulerLimits(
        vocab_size=32000,
        num_pages=running * 40,
        block_size=16,
        max_model_len=640,
        max_num_seqs=running,
        max_num_batched_tokens=8192,
        max_num_queued_reqs=running,
        steps_in_flight=2,
    )
    device = torch.device("cpu")
    scheduler = Scheduler(limits)
    sampler = Sampler(running + 1, 32000, device, TorchBackend())
    batcher = Batcher(limits, device, sampler)
    generator = random.Random(0)
    for number in range(running):
        prompt = [generator.randrange(1000) for _ in range(generator.randrange(16, 64))]
        params = EngineSampling(max_tokens=500, stop_token_ids=(2,))
        scheduler.add(Request(number, prompt, len(prompt), params))
    inputs = torch.empty(1 << 22, dtype=torch.uint8)
    times: dict[str, list[float]] = {"schedule": [], "batch": [], "commit": []}
    results: deque[StepResult] = deque()
    for _ in range(steps):
        begun = time.perf_counter()
        plan = scheduler.schedule(0.0)
        planned = time.perf_counter()
        assert plan is not None
        sampler.set_rows(plan.new_rows)
        batching = time.perf_counter()
        batcher.set_pages(plan)
        batcher.upload.into(inputs, batcher.arrays(plan, batcher.shape(plan)))
        batched = time.perf_counter()
        results.append(StepResult(np.full(int(plan.draws.sum()), 7, np.int32)))
        committing = time.perf_counter()
        if len(results) == limits.steps_in_flight:
            scheduler.commit(results.popleft())
        times["commit"].append(time.perf_counter() - committing)
        times["schedule"].append(planned - begun)
        times["batch"].append(batched - batching)
    return {name: sorted(found)[steps // 2] for name, found in times.items()}


def whole_step(requests: int, steps: int = 200) -> float:
    """Median seconds of an engine's step around a GPU that is not here: schedule, batch, upload, drawing, commit, and
    Python's way to each launch; neither the driver's share nor the waiting for results."""
    sys.path.append(str(Path(__file__).parent / "engine"))
    from dry_gpu import dry_runner
    from shapes import SHAPES
    from triton.runtime.jit import JITFunction

    with (
        tempfile.TemporaryDirectory() as folder,
        dry_runner(Path(folder), SHAPES["Llama-3.1-8B"] | {"num_hidden_layers": 1}, max_model_len=2048) as (runner, _),
    ):
        engine = Engine(runner)
        for number in range(requests):
            params = EngineSampling(temperature=0.0, max_tokens=steps + 64)
            engine.add(Request(number, [4 + number] * 64, 64, params))
        while engine.scheduler.num_waiting or engine.steps < 32:
            engine.step()
        times = []
        with (
            mock.patch.object(JITFunction, "run", lambda *arguments, **named: None),
            mock.patch.object(torch.Tensor, "clamp", lambda tensor, *limits: tensor),  # on meta it is Python's
        ):
            for _ in range(steps):
                begun = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begun)
    return statistics.median(times)


def null_checkpoint(folder: Path) -> None:
    """One layer of width 64, random: next to no arithmetic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """`quire serve` as a process; its address."""
    command = [sys.executable, "-m", "quire.cli.main", "serve", *arguments, "--port", "0", "--grpc-port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        yield next(m[1] for line in server.stdout if (m := re.search(r"OpenAI API +(http://\S+)/v1", line)))
    finally:
        server.terminate()
        server.wait()


def streams(counts: list[int]) -> None:
    """`quire serve` as a process, the load generator as another."""
    with tempfile.TemporaryDirectory() as folder:
        null_checkpoint(Path(folder))
        with serving(folder) as url:
            load = [sys.executable, str(Path(__file__).with_name("load.py")), "--url", url]
            tokens = ["--token-range", "3", "1000", "--input-tokens", "16"]
            subprocess.run([*load, *tokens, "--concurrency", ",".join(map(str, counts))], check=True)


LARGE: dict[str, tuple[str, Callable[[], Any]]] = {
    "a million floats for a prompt": ("/v1/completions", lambda: {"prompt": [0.5] * 1_000_000}),
    "a million token ids": ("/v1/completions", lambda: {"prompt": [5] * 1_000_000}),
    "30 MB of text": ("/v1/completions", lambda: {"prompt": "the quick brown fox " * 1_500_000}),
    "256 prompts of 20k characters": (  # too long with what is to be generated, so that no engine has to compute them
        "/v1/completions",
        lambda: {"prompt": ["the quick " * 2000] * 256, "max_tokens": 8000},
    ),
    "8 million objects": ("/v1/completions", lambda: {"prompt": [{}] * 8_000_000}),
    "40,000 turns": ("/v1/chat/completions", lambda: {"messages": [{"role": "user", "content": "hello"}] * 40_000}),
    "tokenize 4 MB": ("/tokenize", lambda: {"prompt": "the quick brown fox " * 200_000}),
    "detokenize a million ids": ("/detokenize", lambda: {"tokens": [1000] * 1_000_000}),
    "scores of a prompt of 1,500 tokens": (
        "/v1/completions",
        lambda: {"prompt": [1000] * 1500, "max_tokens": 1, "prompt_logprobs": 20},
    ),
}


def gaps() -> None:
    """The longest answer of /health while another client sends each of these to the demo model."""
    with serving() as url:
        for name, (route, content) in LARGE.items():
            body = json.dumps(content()).encode()
            request = urllib.request.Request(url + route, body, {"content-type": "application/json"})
            done = threading.Event()

            def send(request: urllib.request.Request = request, done: threading.Event = done) -> None:
                with contextlib.suppress(OSError):  # a refusal is an answer
                    urllib.request.urlopen(request).read()
                done.set()

            sender = threading.Thread(target=send)
            begun = time.perf_counter()
            sender.start()
            longest = 0.0
            while not done.is_set():
                asked = time.perf_counter()
                urllib.request.urlopen(f"{url}/health").read()
                longest = max(longest, time.perf_counter() - asked)
            sender.join()
            print(f"{name:36s} {longest * 1e3:6.0f} ms of {(time.perf_counter() - begun) * 1e3:7.0f}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What the host costs.")
    parser.add_argument("part", choices=["scheduler", "steps", "streams", "gaps"])
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 64, 256])
    arguments = parser.parse_args()
    if arguments.part == "scheduler":
        for running in (1, 16, 64, 256, 512, 1024, 2048):
            parts = {name: seconds * 1e6 for name, seconds in host_share(running).items()}
            shown = ", ".join(f"{name} {micros:5.0f}" for name, micros in parts.items())
            print(f"{running:5d} running: {sum(parts.values()):6.0f} µs a step ({shown})")
    elif arguments.part == "steps":
        torch.set_num_threads(1)
        for requests in (1, 64, 256):
            print(f"{requests} requests: {whole_step(requests) * 1e6:.0f} µs")
    elif arguments.part == "gaps":
        gaps()
    else:
        streams(arguments.streams)


if __name__ == "__main__":
    main()
