"""Several ranks over gloo and the step channel equal transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from quire import LLM, SamplingParams
from quire_cluster.local_ray import start_private_cluster
from quire_engine.errors import InvalidParameter, ModelError
from transformers import AutoModelForCausalLM

Make = Callable[[str], Path]
PROMPTS = [[7, 8, 9], list(range(20, 60)), [5] * 17, [11], [12, 13], [14], list(range(100, 170))]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    running = start_private_cluster(num_workers=4)
    yield
    running.stop()
    assert not ray.is_initialized()


def truth(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        scores = torch.log_softmax(model(out).logits[0, len(prompt) - 1 : -1], -1)
    tokens = out[0, len(prompt) :]
    return tokens.tolist(), scores.gather(1, tokens[:, None])[:, 0].tolist()


RANKS: dict[str, dict[str, Any]] = {
    "2": {"tensor_parallel_size": 2},
    "4, each key-value head on two": {"tensor_parallel_size": 4},
    "2, whole experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "2 stages": {"pipeline_parallel_size": 2},
    "2 stages of 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("mistral", "2"),  # the other families: tests/engine/test_ranks.py
        ("llama", "4, each key-value head on two"),
        ("qwen3_moe", "2, whole experts"),
        ("qwen2", "2 stages"),
        ("qwen3_moe", "2 stages of 2"),
        ("nemotron_h", "2 stages"),
    ],
)
def test_ranks(checkpoint: Make, family: str, ranks: str) -> None:
    """In chunks, from the prefix cache, and with too few pages for all: tokens equal, log-probabilities within 1e-4."""
    folder = checkpoint(family)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0)
    heads, layers = (2 if "stages" in ranks and ranks == "2 stages" else 1), (2 if "stages" in ranks else 3)
    page = layers * 2 * heads * 16 * (32 if family in ("mistral", "qwen3", "qwen3_moe") else 16) * 4  # of one rank
    recurrent = family == "nemotron_h"  # one stage keeps states alone, the other keys and values
    with LLM(
        str(folder),
        max_num_batched_tokens=24,
        kv_cache_memory_bytes=1 << 20 if recurrent else 9 * page,
        max_model_len=128,
        **RANKS[ranks],
    ) as llm:
        for prompts in (PROMPTS, PROMPTS[-1:], PROMPTS[-1:]):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                tokens, scores = truth(folder, prompt)
                assert output.outputs[0].token_ids == tokens
                ours = [float(score.logprobs[0]) for score in output.outputs[0].logprobs or []]
                assert max(abs(a - b) for a, b in zip(ours, scores, strict=True)) < 1e-4
        stats = llm.engine.scheduler.stats
        assert stats.prefix_hits > 0
        assert recurrent or stats.preemptions > 0


def test_what_cannot_be_split_is_refused_with_what_can(checkpoint: Make) -> None:
    with pytest.raises(ModelError, match=r"tensor_parallel_size can be 1, 2, 4$"):
        LLM(str(checkpoint("llama")), tensor_parallel_size=3)
    with pytest.raises(ModelError, match="3 layers cannot be split over 4 stages"):
        LLM(str(checkpoint("llama")), pipeline_parallel_size=4)


def test_vocabularies_need_not_divide(tmp_path: Path) -> None:
    """301 tokens over two ranks."""
    from conftest import make_checkpoint

    folder = make_checkpoint(tmp_path, "qwen2", vocab_size=301)
    with LLM(str(folder), tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20) as llm:
        params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        [output] = llm.generate([[300, 5, 6]], params, use_tqdm=False)
        for wrong, named in (
            ([301], "token id 301"),
            ({"prompt": "w5"}, "a text or a list of token ids, not {'prompt'"),
        ):
            with pytest.raises(InvalidParameter, match=named):
                llm.generate([wrong], params, use_tqdm=False)
    assert output.outputs[0].token_ids == truth(folder, [300, 5, 6])[0]
