"""The loads of speed.py through vLLM, where it can be imported. A measure: see findings.py."""

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from findings import tell
from shapes import SHAPES


def prompts(count: int, length: int, seed: int) -> list[dict[str, Any]]:
    """Random, none alike."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [{"prompt_token_ids": generator.integers(0, 30000, length).tolist()} for _ in range(count)]


def main(shape: str, concurrency: list[int], prompt: int, new_tokens: int) -> None:
    """Rates are made as speed.py makes them: new tokens over the time that they add to the prompts'."""
    if importlib.util.find_spec("vllm") is None:
        tell(f"{shape}, vLLM", None, "it is not installed")
        return
    from vllm import LLM, SamplingParams

    def params(tokens: int) -> Any:
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=2 * (prompt + new_tokens),
            max_num_seqs=max(concurrency),
            gpu_memory_utilization=0.9,
            enable_prefix_caching=False,
        )
    tell(f"{shape}, vLLM, start", None, seconds=time.perf_counter() - begun)

    def timed(requests: int, tokens: int, seed: int) -> float:
        given = prompts(requests, prompt, seed)
        begun = time.perf_counter()
        llm.generate(given, params(tokens), use_tqdm=False)
        return time.perf_counter() - begun

    timed(1, 2, seed=1)
    tell(f"{shape}, vLLM, one prompt of {prompt}", None, first_token_ms=timed(1, 1, seed=2) * 1e3)
    for requests in concurrency:
        prefill, whole = timed(requests, 1, seed=3), timed(requests, new_tokens, seed=4)
        tell(
            f"{shape}, vLLM, {requests} requests",
            None,
            tokens_per_s=requests * (new_tokens - 1) / (whole - prefill),
            prefill_tokens_per_s=requests * prompt / prefill,
        )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
