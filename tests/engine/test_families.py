"""Every family equals transformers: logits, and greedy tokens however the work is cut up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Table
from drafters import speculation, told
from families import FALLBACK, FAMILIES, REFUSED
from greedy import NEW_TOKENS, engine_for, prompt_logits, prompts, run, truth
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.request import EngineSampling, Request
from quire_engine.scheduler import Scheduler
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.xdist_group("families")  # their table is one process's

Make = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES | FALLBACK)
def test_logits(checkpoint: Make, table: Table, family: str) -> None:
    """Of every position of a prompt, on the CPU's kernels and on torch's operators; then with an fp8 cache, and with
    weights quantized to fp8, where each family has them."""
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt])).logits[0] for prompt in prompts()]
    for backend in ("native", "torch"):
        ours = prompt_logits(engine_for(folder, attention_backend=backend), prompts())
        for got, expected in zip(ours, theirs, strict=True):
            assert got.shape == expected.shape
            assert (got - expected).abs().max() < 1e-4
    row = table.row(family, folder)
    row["fp8 cache"] = _close(folder, theirs, kv_cache_dtype="fp8")
    row["quantization"] = _close(folder, theirs, quantization="fp8")
    if row["quantization"] == "–" and family == "gpt_oss":
        row["quantization"] = "mxfp4"  # tests/engine/test_quantization.py


def _close(folder: Path, theirs: list[torch.Tensor], **options: str) -> str:
    """Whether the family takes these options: then its logits must be near the exact ones."""
    try:
        engine = engine_for(folder, **options)
    except (InvalidParameter, ModelError) as error:
        assert "leave" in str(error), "a refusal names the mend"
        return "–"
    ours, exact = torch.cat(prompt_logits(engine, prompts())), torch.cat(theirs)
    likeness = torch.corrcoef(torch.stack((ours.flatten(), exact.flatten())))[0, 1]
    assert 0.8 < likeness < 0.99999999, f"{options}: {likeness}"
    return "yes"


@pytest.mark.parametrize("family", FAMILIES | FALLBACK)
def test_greedy_tokens(checkpoint: Make, table: Table, family: str) -> None:
    """Alone, batched, in chunks of 7, from the prefix cache, with pages for only two of them at a time, and with drafts
    of which some are wrong."""
    folder = checkpoint(family)
    batch = prompts()
    expected = truth(folder, batch)
    engine = engine_for(folder)
    assert [run(engine, [prompt], 100 + i)[0] for i, prompt in enumerate(batch)] == expected
    assert engine.scheduler.stats.prefix_hits == 0
    assert run(engine, batch, 200) == expected
    if engine.scheduler.states is not None:  # this run saw where requests branch off, and left states there
        assert engine.scheduler.stats.prefix_hits == 0
        assert run(engine, batch, 300) == expected
    assert engine.scheduler.stats.prefix_hits == 32 + 64, "a later run finds an earlier one's blocks"
    assert run(engine_for(folder, max_num_batched_tokens=7), batch) == expected
    tight = engine_for(folder, max_model_len=128)
    limits = tight.scheduler.limits
    tight.scheduler = Scheduler(replace(limits, num_pages=9, num_states=min(3, limits.num_states)))
    assert run(tight, batch) == expected
    assert tight.scheduler.stats.preemptions > 0, "nine pages were not tight enough"
    guessing = engine_for(folder, speculative_config='{"num_speculative_tokens": 4}')
    guesses = speculation(told(batch, expected, wrong=0.2))
    guessing.scheduler = Scheduler(replace(guessing.scheduler.limits, num_pages=11), guesses)
    assert run(guessing, batch) == expected
    stats = guessing.scheduler.stats
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    table.row(family, folder)["verified"] = "yes"


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_paged_cache_cannot_hold_is_refused(checkpoint: Make, name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name][1]):
        engine_for(checkpoint(name))


def test_triton_attention_under_the_interpreter(checkpoint: Make) -> None:
    """Ties the Triton kernel to the engine."""
    folder = checkpoint("mistral")
    batch = prompts()[1:4]
    engine = engine_for(folder, attention_backend="triton", max_num_batched_tokens=24)
    assert run(engine, batch, max_tokens=6) == [tokens[:6] for tokens in truth(folder, batch)]


def test_prompt_logprobs_are_reported_once(checkpoint: Make) -> None:
    """Also when preemption computes a prompt again, and in chunks; equal to transformers' within 1e-4."""
    folder = checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    page = 2 * 3 * 2 * 16 * 16 * 4
    engine = engine_for(folder, kv_cache_memory_bytes=9 * page, max_model_len=128, max_num_batched_tokens=24)
    batch = [prompt for prompt in prompts() if len(prompt) > 1]
    found: dict[int, list[tuple[int, float]]] = {}
    for number, prompt in enumerate(batch):
        params = EngineSampling(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
        engine.add(Request(number, list(prompt), len(prompt), params))
    while engine.has_work:
        for request, first, scores in engine.step().prompt_logprobs:
            known = found.setdefault(request.id, [])
            assert first == len(known)
            known += zip(scores.chosen.tolist(), scores.logprobs.tolist(), strict=True)
    assert engine.scheduler.stats.preemptions > 0
    for number, prompt in enumerate(batch):
        assert [token for token, _ in found[number]] == prompt[1:]
        with torch.no_grad():
            truth = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], -1)
        expected = truth.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        ours = torch.tensor([value for _, value in found[number]])
        assert (ours - expected).abs().max() < 1e-4
