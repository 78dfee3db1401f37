"""Recurrent families on a CPU, with random weights: Quire beside transformers in one run, and what a state saves.

python benchmarks/recurrent.py [--family qwen3_5]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.resolve import find_model

_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 12,
            "linear_num_value_heads": 12,
        },
    ),
    "lfm2": ("Lfm2Config", {"full_attn_idxs": [2, 5, 8, 11], "block_auto_adjust_ff_dim": False}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["attention" if i % 6 == 5 else "mamba" for i in range(12)],
            "num_local_experts": 0,
            "shared_intermediate_size": 2304,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
        },
    ),
}
PROMPT, NEW = 256, 64


def prompts(count: int) -> list[list[int]]:
    """Random ones of PROMPT tokens."""
    return np.random.default_rng(count).integers(10, 32000, (count, PROMPT)).tolist()


def ours(engine: Engine, batch: list[list[int]], first: int, new_tokens: int = NEW) -> tuple[float, list[list[int]]]:
    """Seconds for all of them together, and their tokens."""
    params = EngineSampling(temperature=0.0, max_tokens=new_tokens)
    requests = [Request(first + i, list(prompt), len(prompt), params) for i, prompt in enumerate(batch)]
    begun = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - begun, [request.tokens[request.num_prompt :] for request in requests]


def theirs(model: Any, batch: list[list[int]]) -> tuple[float, list[list[int]]]:
    """The same by transformers' generate, as one batch."""
    begun = time.perf_counter()
    out = model.generate(
        torch.tensor(batch), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return time.perf_counter() - begun, out[:, PROMPT:].tolist()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--output", help="a file for all results, as JSON")
    options = parser.parse_args()
    results = []
    for family in options.family or FAMILIES:
        kind, facts = FAMILIES[family]
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**(_COMMON | facts))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        found: dict[str, Any] = {"family": family, "parameters": sum(p.numel() for p in model.parameters())}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config_of_ours = EngineConfig(model=folder, device="cpu", max_model_len=2048)
            engine = Engine(
                ModelRunner(config_of_ours, find_model(config_of_ours), threads=len(os.sched_getaffinity(0)))
            )
            ours(engine, prompts(2), 0, 4)
            theirs(model, prompts(2))
            for number, count in enumerate((1, 8)):
                batch = prompts(count)
                our_time, our_tokens = ours(engine, batch, 100 * (number + 1))
                their_time, their_tokens = theirs(model, batch)
                same = np.mean(np.array(our_tokens) == np.array(their_tokens))
                found[f"{count} requests"] = {
                    "tokens_per_s": count * NEW / our_time,
                    "transformers": count * NEW / their_time,
                    "ratio": their_time / our_time,
                    "same_tokens": float(same),
                }
            shared = prompts(3)[0] * 4
            tails = [[5 + i] * 8 for i in range(4)]
            found["first token of 1,032 tokens, s"] = [
                ours(engine, [shared + tail], 1000 + i, 1)[0] for i, tail in enumerate(tails)
            ]  # the first leaves its chunks' states, which the others find
        print(json.dumps(found, indent=1), flush=True)
        results.append(found)
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
