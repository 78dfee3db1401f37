"""Prometheus metrics of a gateway, under the field's names with the prefix `quire:`."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from quire_engine.errors import ContextTooLong, DeadlineExceeded, QueueFull, QuireError, Unavailable
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

_REJECTIONS = {
    QueueFull: "queue_full",
    ContextTooLong: "context_too_long",
    DeadlineExceeded: "deadline",
    Unavailable: "unavailable",
}


class Metrics:
    """All series of a gateway, over all models. Engine gauges carry the replica as `engine`."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series per counter that no dashboard reads
        self.registry = CollectorRegistry()
        labels = ["model_name", "engine"]

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"quire:{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, extra: tuple[str, ...] = ()) -> Counter:
            return Counter(f"quire:{name}", text, ["model_name", *extra], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"quire:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

        self.running = gauge("num_requests_running", "Requests in the engine's batch")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a place in it")
        self.usage = gauge("kv_cache_usage_perc", "Pages of the cache that requests hold; 1: all")
        self.allocated = gauge("kv_cache_slots_allocated", "Token slots of the pages that requests hold")
        self.unused = gauge("kv_cache_slots_unused", "Of these, slots that hold nothing: the only waste")
        self.info = Gauge(
            "quire:cache_config_info",
            "The cache",
            [*labels, "block_size", "num_gpu_blocks"],
            registry=self.registry,
        )
        self.engine_counters = {
            "preemptions": Counter("quire:num_preemptions", "Preemptions", labels, registry=self.registry),
            "prefix_queries": Counter(
                "quire:prefix_cache_queries",
                "Tokens looked up in the prefix cache",
                labels,
                registry=self.registry,
            ),
            "prefix_hits": Counter(
                "quire:prefix_cache_hits", "Tokens found in the prefix cache", labels, registry=self.registry
            ),
        }
        for field, name, text in (
            ("drafts", "drafts", "Drafts of tokens, one for each request of a step that had some"),
            ("draft_tokens", "draft_tokens", "Tokens of drafts"),
            ("accepted_tokens", "accepted_tokens", "Tokens of drafts that were drawn"),
        ):
            self.engine_counters[field] = Counter(f"quire:spec_decode_num_{name}", text, labels, registry=self.registry)
        for field, name, text in (
            ("image_queries", "mm_cache_queries", "Images that requests came to"),
            ("image_hits", "mm_cache_hits", "Of these, images whose embeddings were held"),
            ("images_encoded", "encoder_images", "Images that were encoded"),
            ("encoder_seconds", "encoder_seconds", "Seconds that this took"),
        ):
            self.engine_counters[field] = Counter(f"quire:{name}", text, labels, registry=self.registry)
        self.accepted_per_position = Counter(
            "quire:spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that were drawn, by their place in their draft",
            [*labels, "position"],
            registry=self.registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Prompt tokens found cached")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.success = counter("request_success", "Requests by their ending", ("finished_reason",))
        self.rejections = counter("admission_rejections", "Requests refused", ("reason",))
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

    def rejection(self, model_name: str, error: QuireError) -> None:
        """A request was refused; `model_name`: "" where it named none that is served."""
        self.rejections.labels(model_name, _REJECTIONS.get(type(error), "invalid")).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The series of one model."""

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self.all = metrics
        self._model = model_name
        self._last: dict[tuple[str, str], float] = {}
        self._cache: dict[str, tuple[str, ...]] = {}  # by engine: the labels of its cache's series
        self.prompt_tokens = metrics.prompt_tokens.labels(model_name)
        self.prompt_tokens_cached = metrics.prompt_tokens_cached.labels(model_name)
        self.generation_tokens = metrics.generation_tokens.labels(model_name)
        self.first_token = metrics.first_token.labels(model_name)
        self.between_tokens = metrics.between_tokens.labels(model_name)
        self.per_token = metrics.per_token.labels(model_name)
        self.end_to_end = metrics.end_to_end.labels(model_name)
        self.queued = metrics.queued.labels(model_name)
        self.prefill = metrics.prefill.labels(model_name)
        self.decode = metrics.decode.labels(model_name)
        self.step_tokens = metrics.step_tokens.labels(model_name)
        self.prompt_size = metrics.prompt_size.labels(model_name)
        self.output_size = metrics.output_size.labels(model_name)

    def success(self, reason: str) -> None:
        """A request came to its end."""
        self.all.success.labels(self._model, reason).inc()

    def rejection(self, error: QuireError) -> None:
        """A request was refused."""
        self.all.rejection(self._model, error)

    def engine_gone(self, engine: str) -> None:
        """A replica that is no more has no load; what it counted stays."""
        if (cache := self._cache.pop(engine, None)) is not None:
            self.all.info.remove(*cache)
            for series in (self.all.running, self.all.waiting, self.all.usage, self.all.allocated, self.all.unused):
                series.remove(self._model, engine)

    def engine_load(self, engine: str, load: pb.Load) -> None:
        """A replica's report."""
        at, series_of = (self._model, engine), self.all
        series_of.running.labels(*at).set(load.running)
        series_of.waiting.labels(*at).set(load.waiting)
        series_of.usage.labels(*at).set(load.pages_used / load.pages_total if load.pages_total else 0.0)
        series_of.allocated.labels(*at).set(load.slots_allocated)
        series_of.unused.labels(*at).set(load.slots_unused)
        cache = (*at, str(load.block_size), str(load.pages_total))
        if (before := self._cache.get(engine)) not in (None, cache):
            series_of.info.remove(*before)
        self._cache[engine] = cache
        series_of.info.labels(*cache).set(1)
        for name, series in series_of.engine_counters.items():
            self._count(series.labels(*at), engine, name, getattr(load, name))
        for place, count in enumerate(load.accepted_per_position):
            series = series_of.accepted_per_position.labels(*at, str(place))
            self._count(series, engine, f"accepted at {place}", count)

    def _count(self, series: Counter, engine: str, name: str, value: float) -> None:
        last = self._last.get((engine, name), 0)
        series.inc(value - last if value >= last else value)  # a rebuilt replica counts from 0
        self._last[engine, name] = value
