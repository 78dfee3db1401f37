"""A load generator for any OpenAI endpoint, and for Quire's gRPC: closed loop or Poisson arrivals.

    python benchmarks/load.py --url http://localhost:8000 --concurrency 1,8,32,64
    python benchmarks/load.py --grpc localhost:50051 --concurrency 64
    python benchmarks/load.py --url http://localhost:8000 --rate 4 --requests 200 --slo-first 1.0 --slo-between 0.1

Prompts are random token ids, so no two share a prefix. Times are seconds; "goodput" counts the tokens of requests that
met both objectives. It sends traffic only to the address it is given, a bounded number of requests, and ends by itself.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson


@dataclass
class Trace:
    """One request as its client saw it."""

    start: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (moment, tokens)
    error: str | None = None

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first(self) -> float:
        return self.arrivals[0][0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [b[0] - a[0] for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass
class Summary:
    """Of one load."""

    load: str
    requests: int
    failed: int
    seconds: float
    output_tokens_per_s: float
    goodput_tokens_per_s: float
    first_token_mean: float
    first_token_p50: float
    first_token_p99: float
    between_tokens_mean: float
    between_tokens_p50: float
    between_tokens_p99: float


Send = Callable[[list[int]], Awaitable[Trace]]


def percentile(values: list[float], share: float) -> float:
    """Nearest rank."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summarize(load: str, traces: list[Trace], seconds: float, slo_first: float, slo_between: float) -> Summary:
    """Failed requests count as failed, not as fast."""
    good = [trace for trace in traces if trace.error is None and trace.arrivals]
    firsts = [trace.first for trace in good]
    gaps = [gap for trace in good for gap in trace.gaps]

    def met(trace: Trace) -> bool:
        mean_gap = sum(trace.gaps) / len(trace.gaps) if trace.gaps else 0.0
        return trace.first <= slo_first and mean_gap <= slo_between

    return Summary(
        load=load,
        requests=len(traces),
        failed=len(traces) - len(good),
        seconds=seconds,
        output_tokens_per_s=sum(trace.tokens for trace in good) / seconds,
        goodput_tokens_per_s=sum(trace.tokens for trace in good if met(trace)) / seconds,
        first_token_mean=sum(firsts) / len(firsts) if firsts else float("nan"),
        first_token_p50=percentile(firsts, 0.5),
        first_token_p99=percentile(firsts, 0.99),
        between_tokens_mean=sum(gaps) / len(gaps) if gaps else float("nan"),
        between_tokens_p50=percentile(gaps, 0.5),
        between_tokens_p99=percentile(gaps, 0.99),
    )


def http_sender(session: aiohttp.ClientSession, url: str, model: str, output_tokens: int, key: str | None) -> Send:
    """Streams /v1/completions; an event with text is counted as one token unless it names its token ids."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    async def send(prompt: list[int]) -> Trace:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        trace = Trace(time.perf_counter())
        try:
            async with session.post(f"{url}/v1/completions", data=orjson.dumps(body), headers=headers) as answer:
                if answer.status != 200:
                    trace.error = (await answer.text())[:200]
                    return trace
                async for chunk in answer.content.iter_any():
                    events = chunk.count(b"data: {")
                    if events:
                        trace.arrivals.append((time.perf_counter(), events))
        except aiohttp.ClientError as error:
            trace.error = f"{type(error).__name__}: {error}"
        return trace

    return send


def grpc_sender(address: str, output_tokens: int, key: str | None) -> tuple[Send, Callable[[], Awaitable[None]]]:
    """Streams Generate."""
    from quire import AsyncClient

    client = AsyncClient(address, api_key=key)

    async def send(prompt: list[int]) -> Trace:
        trace = Trace(time.perf_counter())
        async for output in client.stream(prompt, max_tokens=output_tokens, temperature=0.0, ignore_eos=True):
            if output.token_ids:
                trace.arrivals.append((time.perf_counter(), len(output.token_ids)))
        return trace

    return send, client.close


def show(summary: Summary, traces: list[Trace]) -> None:
    """One line on the terminal."""
    failure = f"  {summary.failed} FAILED: {next(t.error for t in traces if t.error)}" if summary.failed else ""
    print(
        f"{summary.load:>12}  {summary.output_tokens_per_s:9.1f} tokens/s"
        f"  first {summary.first_token_mean * 1e3:8.1f} ms (p99 {summary.first_token_p99 * 1e3:8.1f})"
        f"  between {summary.between_tokens_mean * 1e3:7.1f} ms (p99 {summary.between_tokens_p99 * 1e3:7.1f})"
        f"  goodput {summary.goodput_tokens_per_s:9.1f}{failure}",
        flush=True,
    )


async def closed_loop(send: Send, prompts: list[list[int]], concurrency: int) -> list[Trace]:
    """`concurrency` clients, each sending its next request when the last one is done."""
    waiting = iter(prompts)
    traces: list[Trace] = []

    async def client() -> None:
        while (prompt := next(waiting, None)) is not None:
            traces.append(await send(prompt))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return traces


async def poisson(send: Send, prompts: list[list[int]], rate: float, generator: random.Random) -> list[Trace]:
    """Requests arrive at `rate` per second whether or not others are done."""
    tasks = []
    for prompt in prompts:
        tasks.append(asyncio.ensure_future(send(prompt)))
        await asyncio.sleep(generator.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def run(arguments: argparse.Namespace) -> list[Summary]:
    """All loads that were asked for, one after the other, each after one warm-up request."""
    generator = random.Random(arguments.seed)
    low, high = arguments.token_range

    def prompts(count: int) -> list[list[int]]:
        return [[generator.randrange(low, high) for _ in range(arguments.input_tokens)] for _ in range(count)]

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=3600)) as session:
        close: Callable[[], Awaitable[None]] | None = None
        if arguments.grpc:
            send, close = grpc_sender(arguments.grpc, arguments.output_tokens, arguments.api_key)
        else:
            model = arguments.model
            if model is None:
                headers = {"authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
                async with session.get(f"{arguments.url}/v1/models", headers=headers) as answer:
                    model = (await answer.json())["data"][0]["id"]
            send = http_sender(session, arguments.url, model, arguments.output_tokens, arguments.api_key)
        summaries = []
        loads: list[tuple[str, int, Any]] = [(f"{c} at once", c, None) for c in arguments.concurrency]
        loads += [(f"{rate:g}/s", 0, rate) for rate in arguments.rate]
        for name, concurrency, rate in loads:
            await send(prompts(1)[0])
            count = arguments.requests or max(concurrency, 1)
            batch = prompts(count)
            started = time.perf_counter()
            if rate is None:
                traces = await closed_loop(send, batch, concurrency)
            else:
                traces = await poisson(send, batch, rate, generator)
            seconds = time.perf_counter() - started
            summary = summarize(name, traces, seconds, arguments.slo_first, arguments.slo_between)
            summaries.append(summary)
            show(summary, traces)
        if close is not None:
            await close()
        return summaries


def plot(summaries: list[Summary], path: str) -> None:
    """Throughput, and times to the first and between tokens, over the load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    loads = [summary.load for summary in summaries]
    left.plot(loads, [summary.output_tokens_per_s for summary in summaries], "o-", label="output")
    left.plot(loads, [summary.goodput_tokens_per_s for summary in summaries], "o--", label="goodput")
    left.set_ylabel("tokens/s")
    for name, label in (("first_token", "to the first token"), ("between_tokens", "between tokens")):
        for share, style in (("p50", "-"), ("p99", ":")):
            values = [getattr(summary, f"{name}_{share}") for summary in summaries]
            right.plot(loads, values, f"o{style}", label=f"{label}, {share}")
    right.set_yscale("log")
    right.set_ylabel("seconds")
    for axis in (left, right):
        axis.set_xlabel("load")
        axis.set_ylim(bottom=0 if axis is left else None)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A load generator for any OpenAI endpoint, and for Quire's gRPC.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--grpc", help="address of the gRPC API, instead of --url")
    parser.add_argument("--model", help="[the first one served]")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--rate", type=lambda text: [float(part) for part in text.split(",")], default=[])
    parser.add_argument("--requests", type=int, help="per load [the concurrency]")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--token-range", type=int, nargs=2, default=(100, 40_000), help="of the random ids")
    parser.add_argument("--slo-first", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--slo-between", type=float, default=0.2, help="mean seconds between tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--plot", help="file for a picture (png, svg)")
    arguments = parser.parse_args()
    if not arguments.concurrency and not arguments.rate:
        arguments.concurrency = [1, 8, 32, 64]
    summaries = asyncio.run(run(arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(summary) for summary in summaries], indent=1) + "\n")
    if arguments.plot:
        plot(summaries, arguments.plot)


if __name__ == "__main__":
    main()
