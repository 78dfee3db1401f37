"""What a step did to the requests: tokens, log-probabilities, vectors, beginnings and endings."""

from collections import Counter
from dataclasses import dataclass, field

from quire_engine.request import Request, State
from quire_engine.step import Floats, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    images_encoded: int = 0
    encoder_seconds: float = 0.0  # that it took
    drafts: int = 0  # requests of a step that had some
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)  # of these, by their place in their draft

    def saw(self, plan: StepPlan, result: StepResult) -> None:
        """A step's images."""
        if plan.images is not None:
            self.images_encoded += len(plan.images.encode)
            self.encoder_seconds += result.encoder_seconds

    def looked_up(self, request: Request) -> None:
        """What was found in the prefix cache of one that begins."""
        self.prefix_queries += len(request.tokens)
        self.prefix_hits += request.num_computed

    def judged(self, drafts: int, accepted: int) -> None:
        """Of a request's drafts in a step, so many were drawn."""
        self.drafts += 1
        self.draft_tokens += drafts
        self.accepted_tokens += accepted
        counts = self.accepted_per_position
        counts.extend([0] * (drafts - len(counts)))
        for place in range(accepted):
            counts[place] += 1


@dataclass(slots=True)
class StepOutcome:
    """The first lists run side by side: one entry per new token."""

    requests: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)  # of the token in its request's output
    finished: list[Request] = field(default_factory=list)
    started: list[Request] = field(default_factory=list)  # admitted for the first time
    logprobs: list[tuple[Request, TokenLogprobs]] = field(default_factory=list)  # one entry per token that wants them
    prompt_logprobs: list[tuple[Request, int, TokenLogprobs]] = field(default_factory=list)  # with the first's place
    vectors: list[tuple[Request, Floats]] = field(default_factory=list)  # of models that pool
    wanted: list[tuple[Request, bytes]] = field(default_factory=list)  # images whose pixels somebody has to bring
    num_tokens: int = 0  # computed
    num_prompt_tokens: int = 0  # of these, of prompts, and of logs that were computed again

    def tell_vectors(self, drawing: list[Request], vectors: Floats) -> None:
        """Of the requests that drew and are told of it. vectors [S, width]."""
        told = {id(request) for request in self.requests}
        for request, vector in zip(drawing, vectors, strict=True):
            if id(request) in told:
                self.vectors.append((request, vector))

    def tell_logprobs(self, requests: list[Request], plan: StepPlan, result: StepResult) -> None:
        """Each position is reported once: a preempted request computes its prompt again, and a request that ended
        while the step was in flight has no use for it."""
        told = Counter(id(request) for request in self.requests)
        known = told.keys() | {id(request) for request in self.finished}  # one that generates nothing ends with scores
        for request, row, first in zip(requests, plan.rows.tolist(), plan.starts.tolist(), strict=True):
            if (drawn := result.logprobs.get(row)) is not None and (count := told[id(request)]):
                self.logprobs.extend((request, drawn.part(place, place + 1)) for place in range(count))
            scores = result.prompt_logprobs.get(row)
            if scores is not None and (id(request) in known or request.state is not State.FINISHED):
                fresh = scores.after(max(0, request.num_scored - first))
                if len(fresh.chosen):
                    self.prompt_logprobs.append((request, request.num_scored, fresh))
                    request.num_scored += len(fresh.chosen)
