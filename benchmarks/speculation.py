"""Guessing tokens ahead: output tokens per second with it and without, in turns, on texts that repeat and others.

    python benchmarks/speculation.py [--model PATH] [--method suffix] [--batches 1,8] [--peer-python peer/bin/python]
        [--kinds editing,summarizing] [--output FILE] [--plot FILE]    (with a FILE that is there, --output adds to it)

Texts that repeat: 20 functions of Python's standard library that are to be edited, and 20 pieces of its documentation
to be summarized in their own words. Others: the same model at temperature 1, behind random prompts, without an end. As
many run as the batch has room for: what ends makes room for the next. Rates are of the whole run, and ("decoding") of
the steps in which all of the batch ran and had their first tokens. `--peer-python`: of an environment with vLLM's CPU
build (see side_by_side.py), which runs the same prompts plain and with its n-grams.
"""

import argparse
import importlib
import inspect
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from quire_cluster.workers import LocalWorkers
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.engine import Engine
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.choice import speculation_of
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.resolve import find_model
from side_by_side import write_checkpoint

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
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"])
    engine, number, found = llm.llm_engine, 0, {}
    for size in asked["batches"]:
        best = 0.0
        for _ in range(asked["repeats"]):
            begun, made, running, left = time.perf_counter(), 0, 0, list(asked["prompts"])
            while running or left:
                while running < size and left:
                    engine.add_request(str(number), {"prompt_token_ids": left.pop(0)}, params)
                    number, running = number + 1, running + 1
                for output in engine.step():
                    if output.finished:
                        made, running = made + len(output.outputs[0].token_ids), running - 1
            best = max(best, made / (time.perf_counter() - begun))
        found[size] = best
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
    long = [words for _, text in sorted(topics.items()) if len(words := text.split()) >= 200]
    passages = [" ".join(words[:120]) for words in long[:20]]
    summaries = [f"Summarize this text by citing its most important sentences word by word:\n\n{p}" for p in passages]

    def tokens(text: str) -> list[int]:
        asked = [{"role": "user", "content": text}]
        rendered = tokenizer.render(asked, add_generation_prompt=True, continue_final_message=False)
        return tokenizer.encode(rendered, add_special_tokens=False)

    return {"editing": [tokens(text) for text in editing], "summarizing": [tokens(text) for text in summaries]}


@dataclass
class Rates:
    """What was drawn, in all and in the steps in which all of the batch was being decoded."""

    tokens: int = 0
    seconds: float = 0.0
    decoded: int = 0
    decoding: float = 0.0

    def add(self, other: "Rates") -> None:
        """Another run."""
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.decoded += other.decoded
        self.decoding += other.decoding


class Bench:
    """One model's workers, and an engine with or without drafts for each run."""

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
        files = find_model(config)
        self.tokenizer = Tokenizer.load(files)
        self._ends = end_tokens(files, self.tokenizer)
        self._workers = LocalWorkers(config)
        self._limits = self._workers.limits
        self.vocab_size = self._limits.vocab_size
        self._number = 0
        self.drafted = self.accepted = 0

    def run(
        self, prompts: list[list[int]], size: int, tokens: int, *, drafts: bool, temperature: float, endless: bool
    ) -> Rates:
        """`size` at once of these prompts. Nothing is known of earlier runs: neither their answers nor what steps
        took."""
        self._workers.limits = self._limits if drafts else replace(self._limits, speculation=None)
        engine = Engine(self._workers, speculation_of(self._workers.limits))
        requests, running = list[Request](), list[Request]()
        found, made = Rates(), 0
        begun = before = time.perf_counter()
        while engine.has_work or len(requests) < len(prompts):
            running = [request for request in running if request.finish_reason is None]
            full = len(running) == size and all(request.num_output for request in running)
            while len(running) < size and len(requests) < len(prompts):
                self._number += 1
                prompt = prompts[len(requests)]
                params = EngineSampling(
                    temperature=temperature,
                    max_tokens=tokens,
                    seed=self._number,
                    stop_token_ids=() if endless else self._ends,
                )
                requests.append(Request(self._number, list(prompt), len(prompt), params))
                running.append(requests[-1])
                engine.add(requests[-1])
            engine.step()
            now, all_made = time.perf_counter(), sum(request.num_output for request in requests)
            if full:
                found.decoded += all_made - made
                found.decoding += now - before
            before, made = now, all_made
        found.tokens, found.seconds = made, before - begun
        self.drafted += sum(request.num_drafts for request in requests)
        self.accepted += sum(request.num_accepted for request in requests)
        return found

    def close(self) -> None:
        """Stops the workers."""
        self._workers.close()


def compare(bench: Bench, prompts: list[list[int]], size: int, tokens: int, turns: int, *, endless: bool) -> Any:
    """`size` at once of the prompts, with drafts and without in turns."""
    plain, drafted = Rates(), Rates()
    bench.drafted = bench.accepted = 0
    for turn in range(2 * turns):
        drafts = turn % 4 in (1, 2)
        found = bench.run(prompts, size, tokens, drafts=drafts, temperature=1.0 if endless else 0.0, endless=endless)
        (drafted if drafts else plain).add(found)
    rates = {"plain": plain.tokens / plain.seconds, "drafted": drafted.tokens / drafted.seconds}
    decoding = {"plain": plain.decoded / plain.decoding, "drafted": drafted.decoded / drafted.decoding}
    return rates | {
        "ratio": rates["drafted"] / rates["plain"],
        "plain decoding": decoding["plain"],
        "drafted decoding": decoding["drafted"],
        "ratio decoding": decoding["drafted"] / decoding["plain"],
        "drafts per token": bench.drafted / drafted.tokens,
        "accepted": bench.accepted / bench.drafted if bench.drafted else None,
    }


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
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--turns", type=int, default=1)
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

    bench.run(random_prompts(1), 1, 16, drafts=False, temperature=1.0, endless=True)
    kinds = {kind: prompts for kind, prompts in repeating(bench.tokenizer).items() if kind in args.kinds.split(",")}
    for kind, prompts in kinds.items():
        if max(batches, default=0) > len(prompts):
            parser.error(f"--batches is for {len(prompts)} prompts at most: as many there are of each kind")
        for size in batches:
            found[f"{kind}, {size}"] = compare(bench, prompts, size, args.tokens, args.turns, endless=False)
            print(kind, size, found[f"{kind}, {size}"], flush=True)
    for size in others:
        prompts = random_prompts(max(size, 8))
        found[f"other, {size}"] = compare(bench, prompts, size, args.tokens, args.turns, endless=True)
        print("other", size, found[f"other, {size}"], flush=True)
    bench.close()
    if args.output and args.output.exists():
        found = json.loads(args.output.read_text()) | found
    for kind, prompts in kinds.items() if args.peer_python else ():
        keep(found, args.output)  # a peer may fail
        found[f"peer, {kind}"] = peer(args.peer_python, prompts, batches, args.tokens, args.turns, threads)
        print("peer", kind, found[f"peer, {kind}"], flush=True)
    keep(found, args.output)
    if args.plot:
        plot(found, args.plot)


def keep(found: dict[str, Any], path: Path | None) -> None:
    """Writes what was measured."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens per second over the batch, with drafts and without."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for number, kind in enumerate(("editing", "summarizing", "other")):
        rows = {int(key.split(", ")[1]): value for key, value in found.items() if key.startswith(f"{kind}, ")}
        rows = dict(sorted(rows.items()))
        for name, style in (("plain", "--"), ("drafted", "-")):
            rates = [row[name] for row in rows.values()]
            axes.plot(list(rows), rates, style, color=f"C{number}", marker="o", label=f"{kind}, {name}")
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="output tokens/s")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
