"""What governance has to do with a call: whether its tenant may begin it, and what goes on record at its end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quire_engine.text.params import SamplingParams

from quire_cluster.gateway.generation import Generation
from quire_cluster.governance.callers import Tenant
from quire_cluster.governance.governor import Governor
from quire_cluster.governance.limits import Limiter, Permit
from quire_cluster.governance.records import UsageDelta


async def admit(
    limiter: Limiter, tenant: Tenant, prompts: Sequence[Sequence[int]], params: SamplingParams | None, context: int
) -> Permit:
    """Lets a call in by its tenant's limits. Whoever has the permit ends it with `leave`. `params`: None of what gives
    vectors. `context`: of the model, in tokens. Raises InvalidParameter, LimitReached."""
    lengths = [len(prompt) for prompt in prompts]
    if params is None:
        return await limiter.admit(tenant, lengths, 0, given=False)
    given = params.max_tokens is not None
    answer = params.max_tokens if params.max_tokens is not None else max(0, context - max(lengths))
    return await limiter.admit(tenant, lengths, answer, given=given, choices=params.n)


def leave(permit: Permit | None, generations: Sequence[Generation]) -> None:
    """A call that was let in has ended, with what was begun for it."""
    if permit is not None:
        permit.settle(sum(len(one.facts.prompt) + one.num_output_tokens for one in generations))
        permit.release()


def put_on_record(
    governor: Governor,
    generation: Generation,
    model: str,
    digests: Mapping[str, str],
    decode: Callable[[list[int]], str],
) -> None:
    """A request has its end. `digests`: of the model, and of its engine's options. `decode`: tokens to text."""
    facts = generation.facts
    reasons = [choice.finish_reason or "abort" for choice in generation.choices]
    told: dict[str, Any] = {"request_id": facts.request_id, "route": facts.route, "finish": reasons, "user": facts.user}
    used = UsageDelta(
        model=model,
        prompt_tokens=len(facts.prompt),
        cached_tokens=generation.cached_tokens,
        output_tokens=generation.num_output_tokens,
    )

    def content() -> dict[str, Any]:
        """In words; images are left out."""
        answers = [decode(choice.output) for choice in generation.choices if choice.vector is None]
        return {"prompt": decode(facts.prompt), "answers": answers}

    of_choices = [(index, generation.verdicts(index)) for index in range(len(generation.choices))]
    told["verdicts"] = [asdict(one) | {"index": index} for index, found in of_choices for one in found]
    body: dict[str, Any] = {name: value for name, value in told.items() if value}
    governor.ended(facts.caller, used, body | dict(digests), content)
