"""What content policies cost: an English text detokenized token by token, with and without rules on its way, in turns.

python benchmarks/checks.py [--repeat 10] [--rounds 5]
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire_cluster.governance.checks.policies import Policies
from quire_engine.config import DEMO_MODEL, EngineConfig
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.weights.resolve import find_model

KINDS = ["credit_card", "iban", "email", "us_ssn", "phone", "ip_address"]
WORDS = ["project zeus", "internal only", "Queensland", "straße", "confidential", "do not forward", "foo", "bar baz"]
RULES: list[dict[str, Any]] = [
    {"name": "personal", "check": "pii", "kinds": KINDS, "action": "redact"},
    {
        "name": "secrets",
        "check": "pattern",
        "patterns": ["sk-[A-Za-z0-9]{20,64}", "AKIA[0-9A-Z]{16}"],
        "action": "stop",
    },
    {"name": "words", "check": "words", "words": WORDS, "action": "flag"},
    {"name": "codes", "check": "pattern", "patterns": ["(?i)ticket[ -][0-9]{3,12}"], "action": "redact"},
    {"name": "links", "check": "pattern", "patterns": [r"https?://[^\s]{1,200}"], "action": "flag"},
]


class Nobody:
    """Asks nobody."""

    request_id = "1"

    async def webhook(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        raise AssertionError("no rule here asks anybody")

    async def judge(self, model: str, prompt: str, timeout: float) -> str:
        raise AssertionError("no rule here asks anybody")


class Bench:
    """A text's tokens, and rules."""

    def __init__(self, repeat: int) -> None:
        self._tokenizer = Tokenizer.load(find_model(EngineConfig(model=DEMO_MODEL)))
        self.text = Path(__file__).with_name("alice.txt").read_text() * repeat
        self.tokens = self._tokenizer.encode(self.text)

    def unfiltered(self) -> float:
        """Microseconds of a token."""
        stream = self._tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
        begun = time.perf_counter()
        out = [stream.step(token) for token in self.tokens]
        taken = time.perf_counter() - begun
        assert "".join(out) + stream.flush() == self.text
        return taken / len(self.tokens) * 1e6

    async def filtered(self, policies: Policies) -> float:
        """The same, with rules."""
        stream = self._tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
        filter = policies.for_("tenant", "model").output(Nobody())
        assert filter is not None
        begun = time.perf_counter()
        out = []
        for token in self.tokens:
            out += [piece.text for piece in await filter.push("content", stream.step(token))]
        taken = time.perf_counter() - begun
        for pieces in (await filter.push("content", stream.flush()), await filter.finish()):
            out += [piece.text for piece in pieces]
        assert "".join(out) == self.text
        return taken / len(self.tokens) * 1e6

    async def held(self, policies: Policies) -> list[int]:
        """Characters that are held back after each token."""
        stream = self._tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
        filter = policies.for_("tenant", "model").output(Nobody())
        assert filter is not None
        held, sizes = 0, []
        for token in self.tokens:
            text = stream.step(token)
            held += len(text) - sum(len(piece.text) for piece in await filter.push("content", text))
            sizes.append(held)
        return sizes


async def compare(bench: Bench, rules: Sequence[dict[str, Any]], rounds: int) -> str:
    """A line of the table."""
    policies = Policies.parse(rules, Path())
    sizes = await bench.held(policies)
    pairs = [(bench.unfiltered(), await bench.filtered(policies)) for _ in range(rounds)]
    plain, with_rules = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return (
        f"{plain:6.2f} {with_rules:9.2f} {ratio:6.2f}   {statistics.mean(sizes):5.2f} {max(sizes):4d}   "
        f"{sum(map(bool, sizes)) / len(sizes):5.1%}"
    )


async def main() -> None:
    """Prints a line for each rule, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10, help="how often the text of 4,000 characters is read")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bench = Bench(options.repeat)
    gc.freeze()  # as gateways do
    print(f"{len(bench.tokens)} tokens, {len(bench.text) / len(bench.tokens):.2f} characters each")
    print("            µs a token: detokenized, filtered, ratio   held back: mean, max, after how many tokens any")
    for rule in RULES:
        print(f"{rule['name']:10s} {await compare(bench, [rule], options.rounds)}", flush=True)
    print(f"{'all five':10s} {await compare(bench, RULES, options.rounds)}")


if __name__ == "__main__":
    asyncio.run(main())
