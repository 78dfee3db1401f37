"""Prometheus metrics of a gateway, under the field's names with the prefix `quire:`."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from quire_protos.v1 import engine_pb2 as pb

LATENCY_BUCKETS = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """All series of one model. Engine gauges carry the replica as `engine`."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # a second series per counter that no dashboard reads
        self._registry = CollectorRegistry()
        self._model = model_name
        labels = ["model_name", "engine"]

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"quire:{name}", text, labels, registry=self._registry)

        def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> Counter:
            return Counter(f"quire:{name}", text, ["model_name", *extra], registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            series = Histogram(f"quire:{name}", text, ["model_name"], buckets=buckets, registry=self._registry)
            return series.labels(model_name)

        self._running = gauge("num_requests_running", "Requests in the engine's batch")
        self._waiting = gauge("num_requests_waiting", "Requests that wait for a place in it")
        self._usage = gauge("kv_cache_usage_perc", "Pages of the cache that requests hold; 1: all")
        self._allocated = gauge("kv_cache_slots_allocated", "Token slots of the pages that requests hold")
        self._unused = gauge("kv_cache_slots_unused", "Of these, slots that hold nothing: the only waste")
        self._info = Gauge(
            "quire:cache_config_info",
            "The cache",
            [*labels, "block_size", "num_gpu_blocks"],
            registry=self._registry,
        )
        self._engine_counters = {
            "preemptions": Counter("quire:num_preemptions", "Preemptions", labels, registry=self._registry),
            "prefix_queries": Counter(
                "quire:prefix_cache_queries",
                "Tokens looked up in the prefix cache",
                labels,
                registry=self._registry,
            ),
            "prefix_hits": Counter(
                "quire:prefix_cache_hits", "Tokens found in the prefix cache", labels, registry=self._registry
            ),
        }
        self._last: dict[tuple[str, str], int] = {}
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens").labels(model_name)
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Prompt tokens found cached").labels(model_name)
        self.generation_tokens = counter("generation_tokens", "Generated tokens").labels(model_name)
        self._success = counter("request_success", "Requests by their ending", ("finished_reason",))
        self._rejections = counter("admission_rejections", "Requests refused", ("reason",))
        self.first_token = histogram("time_to_first_token_seconds", "To the first token", FIRST_TOKEN_BUCKETS)
        self.between_tokens = histogram("inter_token_latency_seconds", "Between tokens", TOKEN_BUCKETS)
        self.per_token = histogram("request_time_per_output_token_seconds", "Mean per token", TOKEN_BUCKETS)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to end", LATENCY_BUCKETS)
        self.queued = histogram("request_queue_time_seconds", "Before the first step", LATENCY_BUCKETS)
        self.prefill = histogram("request_prefill_time_seconds", "First step to first token", LATENCY_BUCKETS)
        self.decode = histogram("request_decode_time_seconds", "First token to last", LATENCY_BUCKETS)
        self.step_tokens = histogram("iteration_tokens_total", "Tokens per engine step", STEP_BUCKETS)
        self.prompt_size = histogram("request_prompt_tokens", "Prompt tokens per request", SIZE_BUCKETS)
        self.output_size = histogram("request_generation_tokens", "Generated tokens per request", SIZE_BUCKETS)

    def success(self, reason: str) -> None:
        """A request came to its end."""
        self._success.labels(self._model, reason).inc()

    def rejection(self, reason: str) -> None:
        """A request was refused."""
        self._rejections.labels(self._model, reason).inc()

    def engine_load(self, engine: str, load: pb.Load) -> None:
        """A replica's report."""
        at = (self._model, engine)
        self._running.labels(*at).set(load.running)
        self._waiting.labels(*at).set(load.waiting)
        self._usage.labels(*at).set(load.pages_used / load.pages_total if load.pages_total else 0.0)
        self._allocated.labels(*at).set(load.slots_allocated)
        self._unused.labels(*at).set(load.slots_unused)
        self._info.labels(*at, load.block_size, load.pages_total).set(1)
        for name, series in self._engine_counters.items():
            value, key = int(getattr(load, name)), (engine, name)
            last = self._last.get(key, 0)
            series.labels(*at).inc(value - last if value >= last else value)  # a rebuilt replica counts from 0
            self._last[key] = value

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
