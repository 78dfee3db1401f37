"""What a flood of one tenant costs another: the time to the first token of ten requests beside two hundred of another
tenant, which came first, over what the ten take alone. The demo model, one engine in this process, in turns.

python benchmarks/fairness.py [--flood 200] [--requests 10] [--prompt 64] [--max-num-seqs 256] [--rounds 3]
"""

import argparse
import random
import statistics
import time

from quire import LLM
from quire_engine.engine import Engine
from quire_engine.request import EngineSampling, Request


class Run:
    """An engine's requests, with when each had its first token."""

    def __init__(self, engine: Engine, generator: random.Random) -> None:
        self.engine = engine
        self.first: dict[int, float] = {}  # request → seconds from its arrival
        self._generator = generator

    def add(self, tenant: str, count: int, prompt: int, output: int) -> list[Request]:
        """So many requests with prompts that nobody else has."""
        made = []
        for _ in range(count):
            tokens = [self._generator.randrange(1000, 40000) for _ in range(prompt)]
            params = EngineSampling(max_tokens=output, temperature=0.0)
            arrival = time.monotonic()
            request = Request(self._generator.getrandbits(60), tokens, prompt, params, arrival=arrival, tenant=tenant)
            self.engine.add(request)
            made.append(request)
        return made

    def step(self) -> None:
        outcome = self.engine.step()
        for request in outcome.requests:
            self.first.setdefault(request.id, time.monotonic() - request.arrival)

    def until_first(self, requests: list[Request]) -> float:
        """The mean of these, in seconds."""
        while any(request.id not in self.first for request in requests):
            self.step()
        return statistics.mean(self.first[request.id] for request in requests)

    def clear(self) -> None:
        """Nothing is left."""
        for request_id in list(self.engine.scheduler.requests):
            self.engine.abort(request_id)
        while self.engine.has_work:
            self.engine.step()


def main() -> None:
    """Prints a line per round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flood", type=int, default=200, help="requests of the other tenant")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--output", type=int, default=64, help="tokens that each generates")
    parser.add_argument("--steps", type=int, default=20, help="that the flood has had when the others come")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"alone": [], "beside a flood": [], "as one tenant with it": []}
    engine = {"max_num_seqs": options.max_num_seqs, "cpu_threads": options.threads, "enable_prefix_caching": False}
    with LLM(**engine) as llm:
        for number in range(options.rounds):
            for name, tenant in (("alone", "b"), ("beside a flood", "b"), ("as one tenant with it", "a")):
                run = Run(llm.engine, random.Random(number))
                if name != "alone":
                    run.add("a", options.flood, options.prompt, options.output)
                    for _ in range(options.steps):
                        run.step()
                times[name].append(run.until_first(run.add(tenant, options.requests, options.prompt, options.output)))
                run.clear()
            print(", ".join(f"{name} {found[-1]:.2f} s" for name, found in times.items()), flush=True)
    alone, *others = (statistics.median(found) for found in times.values())
    print("ratios: " + ", ".join(f"{name} {one / alone:.2f}" for name, one in zip([*times][1:], others, strict=True)))


if __name__ == "__main__":
    main()
