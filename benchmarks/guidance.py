"""What structured outputs cost: a step with grammars beside one without, compilation, and the first token.

python benchmarks/guidance.py [--model PATH] [--rows 32] [--output FILE]
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.guidance.compiled import Guide
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.request import Request
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.resolve import find_model

sys.path.append(str(Path(__file__).parents[1] / "tests" / "engine"))

from schema_corpus import CORPUS

PROMPT = 64
Schema = dict[str, Any]


class Bench:
    """One model, its engine, and requests as a gateway makes them."""

    def __init__(self, model: str, rows: int, threads: int) -> None:
        config = EngineConfig(model=model, device="cpu", max_model_len=1024, max_num_seqs=rows)
        self._files = find_model(config)
        self.tokenizer = Tokenizer.load(self._files)
        runner = ModelRunner(config, self._files, threads=threads, tokenizer=self.tokenizer)
        self.engine = Engine(runner)
        self._size = runner.limits.vocab_size
        self._ends = end_tokens(self._files, self.tokenizer)
        self.vocabulary = self.tokenizer.for_grammars(self._files, self._size)
        self._generator = np.random.default_rng(0)
        self._number = 0

    def request(self, schema: Schema | None, max_tokens: int, *, ends: bool = True) -> Request:
        """A random prompt. `ends`: whether a token may end it."""
        structure = StructuredOutputs(json=schema) if schema is not None else None
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, structured_outputs=structure)
        tokens = params.in_tokens(self.tokenizer, vocab_size=self._size, end_tokens=self._ends if ends else ())
        self._number += 1
        prompt = self._generator.integers(10, self._size, PROMPT).tolist()
        return Request(self._number, prompt, PROMPT, tokens.choices(room=900, seed=self._number)[0])

    def decode(self, schemas: list[Schema | None], tokens: int) -> list[float]:
        """Seconds of each step in which all of them decode."""
        for schema in schemas:
            self.engine.add(self.request(schema, tokens, ends=False))
        times = []
        while self.engine.has_work:
            full = len(self.engine.scheduler.running) == len(schemas)
            begun = time.perf_counter()
            outcome = self.engine.step()
            if full and len(outcome.tokens) == outcome.num_tokens == len(schemas):
                times.append(time.perf_counter() - begun)
        assert times, "no step decoded them all"
        return times

    def first_token(self, schema: Schema | None) -> float:
        """Seconds from the parameters to the token."""
        begun = time.perf_counter()
        self.engine.add(self.request(schema, 1))
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - begun


def steps(bench: Bench, schemas: list[Schema], rows: int, turns: int = 7, tokens: int = 32) -> dict[str, float]:
    """Rows that write long arrays of what each schema describes, and rows without grammars, in turns."""
    guided: list[Schema | None] = [
        {"type": "array", "items": schemas[row % len(schemas)], "minItems": 100} for row in range(rows)
    ]
    plain: list[Schema | None] = [None] * rows
    bench.decode(guided, tokens)  # compiles them
    pairs = [
        (statistics.median(bench.decode(plain, tokens)), statistics.median(bench.decode(guided, tokens)))
        for _ in range(turns)
    ]
    without, with_them = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(with_it / before for before, with_it in pairs)  # each of two turns in a row
    return {"rows": rows, "step without, ms": without, "step with, ms": with_them, "ratio": ratio}


def compilation(bench: Bench, schemas: list[Schema]) -> dict[str, float]:
    """Each schema once: the gateway's check, and the worker's compilation."""
    checks, compilations = [], []
    for schema in schemas:
        begun = time.perf_counter()
        structure = StructuredOutputs(json=schema)
        structure.check()
        spec = structure.spec(bench.tokenizer.delimiters).to_json()
        checked = time.perf_counter()
        Guide(GuidanceSpec.from_json(spec), bench.vocabulary)
        compilations.append(1e3 * (time.perf_counter() - checked))
        checks.append(1e3 * (checked - begun))
    return {
        "schemas": len(schemas),
        **{f"check p{p}, ms": float(np.percentile(checks, p)) for p in (50, 99)},
        **{f"compile p{p}, ms": float(np.percentile(compilations, p)) for p in (50, 99, 100)},
    }


def first_tokens(bench: Bench, schemas: list[Schema]) -> dict[str, float]:
    """Of requests with a schema that is new, and of others, in turns."""
    bench.first_token(schemas[0])
    pairs = [(bench.first_token(None), bench.first_token(schema)) for schema in schemas[1:]]
    later = [1e3 * (with_it - without) for without, with_it in pairs]
    return {
        "first token without, ms": 1e3 * statistics.median(without for without, _ in pairs),
        "later by, median, ms": statistics.median(later),
        "later by, p90, ms": float(np.percentile(later, 90)),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="a file for the results, as JSON")
    options = parser.parse_args()
    schemas = list(CORPUS.values())
    bench = Bench(options.model, options.rows, options.threads)
    found = {
        "step": steps(bench, schemas[1:9], options.rows),
        "compilation": compilation(bench, schemas),
        "first token": first_tokens(bench, schemas[::10]),
    }
    for name, values in found.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:28} {value:10.4g}")
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
