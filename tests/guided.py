"""A tiny model whose tokens write JSON, and its engine's guided outputs."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import make_checkpoint
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.execution.runner import ModelRunner
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.request import EngineSampling, Request
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model
from vocabularies import byte_level

END = 1
SIZE = 448  # of the logits, which have more ids than there are tokens
ADDED = ("<think>", "</think>", "<tool>", "</tool>", "<|channel|>", "<|message|>")
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def byte_level_checkpoint(folder: Path) -> Path:
    """A Llama with all bytes in its vocabulary, and delimiters."""
    from transformers import PreTrainedTokenizerFast

    make_checkpoint(folder, "llama", vocab_size=SIZE, bos_token_id=0, eos_token_id=END, pad_token_id=0)
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(ADDED))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


class Guided:
    """One loaded model, on which engine after engine may run."""

    def __init__(self, folder: Path, threads: int | None = None, **options: Any) -> None:
        given: dict[str, Any] = {
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "kv_cache_memory_bytes": 2 << 20,
        } | options
        config = EngineConfig(model=str(folder), device="cpu", **given)
        files = find_model(config)
        self.tokenizer = Tokenizer.load(files)
        self.runner = ModelRunner(config, files, threads=threads, tokenizer=self.tokenizer)
        self.vocabulary = self.tokenizer.for_grammars(files, SIZE)

    def engine(self, **limits: Any) -> Engine:
        """With nothing in its cache."""
        executor: Any = self.runner
        if limits:
            executor = _Limited(self.runner, **limits)
        return Engine(executor)

    def spec(self, **structure: Any) -> str:
        """Of `structured_outputs`, as requests have it."""
        return StructuredOutputs.of(structure).spec(self.tokenizer.delimiters).to_json()

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, request: Request) -> str:
        """What it wrote, delimiters too, without the token that ended it."""
        output = request.tokens[request.num_prompt :]
        return self.tokenizer.decode(output[:-1] if output[-1:] == [END] else output, skip_special_tokens=False)


class _Limited:
    """An executor of less than the runner has."""

    def __init__(self, runner: ModelRunner, **limits: Any) -> None:
        self.limits = replace(runner.limits, **limits)
        self.submit, self.collect, self.prepare = runner.submit, runner.collect, runner.prepare

    def close(self) -> None:
        """The runner stays."""


def request(number: int, prompt: Sequence[int], guidance: GuidanceSpec | str = "", **params: Any) -> Request:
    """Draws at temperature 1 until the model ends it."""
    guidance = guidance if isinstance(guidance, str) else guidance.to_json()
    given: dict[str, Any] = {"max_tokens": 100, "seed": number, "stop_token_ids": (END,)} | params
    return Request(number, list(prompt), len(prompt), EngineSampling(guidance=guidance, **given))


def finished(engine: Engine, requests: Iterable[Request]) -> list[Request]:
    """All of them, run to their ends."""
    added = list(requests)
    for one in added:
        engine.add(one)
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    assert all(one.finish_reason for one in added)
    return added


def output(one: Request) -> list[int]:
    return one.tokens[one.num_prompt :]
