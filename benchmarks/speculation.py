"""Guessing tokens ahead: output tokens per second with it and without, in turns, on texts that repeat and others.

    python benchmarks/speculation.py [--model PATH] [--method suffix] [--batches 1,8] [--peer-python peer/bin/python]
        [--kinds editing,summarizing] [--output FILE] [--plot FILE]    (with a FILE that is there, --output adds to it)

Texts that repeat: 20 functions of Python's standard library that are to be edited, and 20 passages of `alice.txt` to be
summarized in its own words. Others: the same model at temperature 1, behind random prompts. `--peer-python`: of an
environment with vLLM's CPU build (see side_by_side.py), which runs the same prompts plain and with its n-grams.
"""

import argparse
import importlib
import inspect
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quire_cluster.workers import LocalWorkers
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.engine import Engine
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.choice import speculation_of
from quire_engine.speculation.speculation import Speculation
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model
from side_by_side import write_checkpoint

HERE = Path(__file__).parent
FUNCTIONS = (
    "string.capwords", "heapq.nlargest", "heapq._siftup", "textwrap.dedent", "textwrap.indent", "shlex.split",
    "statistics.median_low", "statistics.quantiles", "statistics.covariance", "calendar.monthrange",
    "colorsys.rgb_to_hls", "colorsys.hls_to_rgb", "colorsys.rgb_to_hsv", "fnmatch.filter", "glob.escape",
    "html.unescape", "shutil.copymode", "shutil.ignore_patterns", "difflib.get_close_matches", "ast.get_docstring",
)  # fmt: skip
PEER = """
import json, sys, time
asked = json.loads(sys.stdin.read())
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    more = {"speculative_config": asked["speculation"]} if asked["speculation"] else {}
    llm = LLM(asked["model"], dtype="float32", max_model_len=2048, enable_prefix_caching=False, **more)
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
    found = {}
    for size in asked["batches"]:
        best = []
        for _ in range(asked["repeats"]):
            begun, made = time.perf_counter(), 0
            for at in range(0, len(asked["prompts"]) - size + 1, size):
                batch = [{"prompt_token_ids": one} for one in asked["prompts"][at : at + size]]
                made += sum(len(out.outputs[0].token_ids) for out in llm.generate(batch, params, use_tqdm=False))
            best.append(made / (time.perf_counter() - begun))
        found[size] = max(best)
    print("RESULT " + json.dumps(found), flush=True)
"""


def repeating(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Prompts by their kind."""
    editing = []
    for name in FUNCTIONS:
        module, _, function = name.partition(".")
        source = inspect.getsource(getattr(importlib.import_module(module), function))
        editing.append(
            f"Add the line `# {name}` at the top of this code, change nothing else, and give all of it:\n\n"
            f"```python\n{source[:1500]}```"
        )
    words = (HERE / "alice.txt").read_text().split()
    passages = [" ".join(words[at : at + 120]) for at in range(0, 20 * 32, 32)]
    summaries = [f"Summarize this text by citing its most important sentences word by word:\n\n{p}" for p in passages]

    def tokens(text: str) -> list[int]:
        asked = [{"role": "user", "content": text}]
        rendered = tokenizer.render(asked, add_generation_prompt=True, continue_final_message=False)
        return tokenizer.encode(rendered, add_special_tokens=False)

    return {"editing": [tokens(text) for text in editing], "summarizing": [tokens(text) for text in summaries]}


class Bench:
    """One model's workers, and an engine with or without drafts for each batch."""

    def __init__(self, model: str, method: str, most_rows: int) -> None:
        asked = json.dumps({"method": method})
        config = EngineConfig(
            model=model,
            device="cpu",
            max_model_len=2048,
            max_num_seqs=most_rows,
            enable_prefix_caching=False,
            speculative_config=asked,
        )
        self.tokenizer = Tokenizer.load(find_model(config))
        self._workers = LocalWorkers(config)
        self._limits = self._workers.limits
        self.vocab_size = self._limits.vocab_size
        self._speculation: Speculation | None = None
        self._number = 0
        self.drafted = self.accepted = 0

    def forget(self) -> None:
        """What was learnt of drafts and of steps, and what was answered: the same prompts would be answered alike."""
        self._speculation = speculation_of(self._limits)

    def rate(
        self, prompts: list[list[int]], tokens: int, *, drafts: bool, temperature: float = 0.0
    ) -> tuple[float, float]:
        """Output tokens per second of these prompts at once: in all, and from when each has its first token."""
        self._workers.limits = self._limits if drafts else replace(self._limits, speculation=None)
        engine = Engine(self._workers, self._speculation if drafts else None)
        requests = []
        for prompt in prompts:
            self._number += 1
            params = EngineSampling(temperature=temperature, max_tokens=tokens, seed=self._number)
            requests.append(Request(self._number, list(prompt), len(prompt), params))
            engine.add(requests[-1])
        begun = decoding = time.perf_counter()
        left = 0
        while engine.has_work:
            engine.step()
            if not left and all(request.num_output for request in requests):
                decoding = time.perf_counter()
                left = sum(tokens - request.num_output for request in requests)
        ended = time.perf_counter()
        self.drafted += sum(request.num_drafts for request in requests)
        self.accepted += sum(request.num_accepted for request in requests)
        return tokens * len(prompts) / (ended - begun), left / (ended - decoding)

    def close(self) -> None:
        """Stops the workers."""
        self._workers.close()


def compare(bench: Bench, prompts: list[list[int]], size: int, tokens: int, turns: int, temperature: float) -> Any:
    """Batches of `size` of the prompts, with drafts and without in turns."""
    batches = [prompts[at : at + size] for at in range(0, len(prompts) - size + 1, size)]
    plain: list[tuple[float, float]] = []
    drafted: list[tuple[float, float]] = []
    bench.drafted = bench.accepted = 0
    for turn in range(turns):
        bench.forget()
        for batch in batches:
            for drafts in (turn % 2 == 0, turn % 2 == 1):
                rate = bench.rate(batch, tokens, drafts=drafts, temperature=temperature)
                (drafted if drafts else plain).append(rate)
    return {
        "plain": _mean_rate(plain, 0),
        "drafted": _mean_rate(drafted, 0),
        "ratio": _mean_rate(drafted, 0) / _mean_rate(plain, 0),
        "plain decoding": _mean_rate(plain, 1),
        "drafted decoding": _mean_rate(drafted, 1),
        "ratio decoding": _mean_rate(drafted, 1) / _mean_rate(plain, 1),
        "drafts per token": bench.drafted / (turns * len(batches) * size * tokens),
        "accepted": bench.accepted / bench.drafted if bench.drafted else None,
    }


def _mean_rate(rates: list[tuple[float, float]], kind: int) -> float:
    """Of about equal amounts of tokens."""
    return statistics.harmonic_mean(rate[kind] for rate in rates)


def peer(python: str, prompts: list[list[int]], batches: list[int], tokens: int, turns: int, threads: int) -> Any:
    """vLLM, plain and with its n-grams."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for kind, speculation in (
            ("plain", None),
            ("ngram", {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5, "prompt_lookup_min": 2}),
        ):
            asked = {"model": folder, "prompts": prompts, "batches": batches, "tokens": tokens, "repeats": turns}
            run = subprocess.run(
                [python, "-c", PEER],
                input=json.dumps(asked | {"speculation": speculation}),
                env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"the peer failed: {run.stderr[-3000:]}")
            found[kind] = json.loads(lines[-1][len("RESULT ") :])
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--method", default="suffix")
    parser.add_argument("--kinds", default="editing,summarizing", help="of texts that repeat")
    parser.add_argument("--batches", default="1,8", help="of texts that repeat")
    parser.add_argument("--others", default="1,2,4,8,16,32,64", help="batches of other texts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--peer-python")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    batches, others = ([int(n) for n in text.split(",") if n] for text in (args.batches, args.others))
    bench = Bench(args.model, args.method, max([*batches, *others]))
    found: dict[str, Any] = {
        "machine": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "method": args.method,
    }
    generator = np.random.default_rng(0)

    def random_prompts(count: int) -> list[list[int]]:
        return generator.integers(100, bench.vocab_size, (count, 64)).tolist()

    bench.rate(random_prompts(1), 16, drafts=False)
    kinds = {kind: prompts for kind, prompts in repeating(bench.tokenizer).items() if kind in args.kinds.split(",")}
    for kind, prompts in kinds.items():
        for size in batches:
            found[f"{kind}, {size}"] = compare(bench, prompts, size, args.tokens, args.turns, 0.0)
            print(kind, size, found[f"{kind}, {size}"], flush=True)
    for size in others:
        prompts = random_prompts(max(size, 8))
        found[f"other, {size}"] = compare(bench, prompts, size, args.tokens, args.turns, 1.0)
        print("other", size, found[f"other, {size}"], flush=True)
    bench.close()
    if args.peer_python:
        for kind, prompts in kinds.items():
            found[f"peer, {kind}"] = peer(args.peer_python, prompts, batches, args.tokens, args.turns, threads)
            print("peer", kind, found[f"peer, {kind}"], flush=True)
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.exists() else {}
        found = before | found
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens per second over the batch, with drafts and without."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for kind in ("editing", "summarizing", "other"):
        rows = {int(key.split(", ")[1]): value for key, value in found.items() if key.startswith(f"{kind}, ")}
        for name, style in (("plain", "--"), ("drafted", "-")):
            axes.plot(list(rows), [row[name] for row in rows.values()], style, marker="o", label=f"{kind}, {name}")
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="output tokens/s")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
