"""A request's end, for whoever looks at the whole server: its metrics, and one line of log."""

import json
import logging

from quire_engine.errors import ContextTooLong, DeadlineExceeded, QueueFull

from quire_cluster.gateway.generation import Generation
from quire_cluster.observability.metrics import ModelMetrics

access_log = logging.getLogger("quire.requests")


def count(metrics: ModelMetrics, generation: Generation, now: float) -> None:
    """Once. `now`: in time.monotonic() seconds."""
    facts = generation.facts
    reasons = []
    for choice in generation.choices:
        times = choice.times
        reason = choice.finish_reason or "abort"
        reasons.append(reason)
        if choice.error is not None and isinstance(choice.error, (QueueFull, DeadlineExceeded, ContextTooLong)):
            metrics.rejection(choice.error)
        metrics.success(reason)
        metrics.output_size.observe(len(choice.output) if choice.vector is None else 0)
        metrics.end_to_end.observe((times.finished or now) - times.submitted)
        if times.started is not None:
            metrics.queued.observe(times.started - times.submitted)
        if times.first_token is not None and times.last_token is not None:
            metrics.first_token.observe(times.first_token - times.submitted)
            metrics.prefill.observe(max(0.0, times.first_token - (times.started or times.submitted)))
            metrics.decode.observe(times.last_token - times.first_token)
            if len(choice.output) > 1:
                metrics.per_token.observe((times.last_token - times.first_token) / (len(choice.output) - 1))
            for interval in choice.token_intervals:
                metrics.between_tokens.observe(interval)
    first = generation.choices[0].times
    metrics.prompt_size.observe(len(facts.prompt))
    metrics.prompt_tokens.inc(len(facts.prompt))
    metrics.prompt_tokens_cached.inc(generation.cached_tokens)
    metrics.generation_tokens.inc(generation.num_output_tokens)
    line = {
        "request_id": facts.request_id,
        "route": facts.route,
        "prompt_tokens": len(facts.prompt),
        "cached_tokens": generation.cached_tokens,
        "output_tokens": generation.num_output_tokens,
        "finish": reasons if len(reasons) > 1 else reasons[0],
        "first_token_s": round(first.first_token - first.submitted, 4) if first.first_token else None,
        "total_s": round(now - first.submitted, 4),
        "resumed": max(choice.epoch for choice in generation.choices) - 1,
    }
    if drafted := sum(choice.draft_tokens for choice in generation.choices):
        line["draft_tokens"] = drafted
        line["accepted_tokens"] = sum(choice.accepted_tokens for choice in generation.choices)
    if facts.user:
        line["user"] = facts.user
    if facts.caller.key:
        line |= {"tenant": facts.caller.tenant.name, "key": facts.caller.key}
    error = next((choice.error for choice in generation.choices if choice.error), None)
    if error is not None:
        line["error"] = str(error)[:200]
    access_log.info(json.dumps(line))
