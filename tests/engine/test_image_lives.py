"""Images in the scheduler, without a model: random lives of requests, and each step held against the plain truth of
what every token of it is."""

import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from drafters import Oracle, speculation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire_engine.config import ImageLimits, SchedulerLimits, SpeculativeConfig
from quire_engine.errors import ContextTooLong, DeadlineExceeded, EngineFailure
from quire_engine.request import EngineSampling, ImageSpan, Request, State
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult
from quire_engine.waiting import WaitsFor
from test_scheduler import STOP, FakeModel, expected_output, limits, next_token

TOKEN = 3  # stands for a piece of an image, though texts have it too
SEATS = 5  # requests that run
LARGEST = 5  # tokens of an image
CONTEXT = 40


@dataclass(frozen=True)
class Picture:
    """`layout`: its tokens in a prompt."""

    name: int
    layout: tuple[int, ...]

    @property
    def key(self) -> bytes:
        return bytes([self.name]) * 32

    @property
    def size(self) -> int:
        return self.layout.count(TOKEN)

    def pixels(self) -> np.ndarray:
        """What is seen at each of its tokens. No text has such a token."""
        return np.array([100 + zlib.crc32(self.key + bytes([row])) % 100_000 for row in range(self.size)])


LAYOUTS = ((3,), (3, 3, 3), (2, 3, 3, 2, 3, 3, 2), (3, 3, 3, 3, 3), (1, 3, 0))
PICTURES = [Picture(number, LAYOUTS[number // 2]) for number in range(10)]  # two of each: equal tokens, other images
ALL_SIZES = sum(picture.size for picture in PICTURES)
Part = list[int] | Picture


@dataclass(frozen=True)
class Prompt:
    """`truth`: what the memory holds of it in the end."""

    tokens: list[int]
    truth: list[int]
    spans: tuple[ImageSpan, ...]
    places: dict[int, tuple[bytes, int]]  # position → the image that is seen there, and which of its rows
    runs: list[tuple[int, int]]  # of an image's tokens that follow one another

    @property
    def keys(self) -> set[bytes]:
        return {span.key for span in self.spans}


def prompt_of(parts: Iterable[Part]) -> Prompt:
    made = Prompt([], [], (), {}, [])
    spans = []
    for part in parts:
        if not isinstance(part, Picture):
            made.tokens.extend(part)
            made.truth.extend(part)
            continue
        start, pixels = len(made.tokens), part.pixels().tolist()
        spans.append(ImageSpan(part.key, start, len(part.layout)))
        made.tokens.extend(part.layout)
        row, last = 0, -1  # last: of its tokens
        for place, token in enumerate(part.layout, start):
            if token != TOKEN:
                made.truth.append(token)
                continue
            made.truth.append(pixels[row])
            made.places[place] = (part.key, row)
            begin = made.runs.pop()[0] if row and last == place - 1 else place
            made.runs.append((begin, place + 1))
            row, last = row + 1, place
    return replace(made, spans=tuple(spans))


class SeeingModel(FakeModel):
    """Keeps embeddings by slot, and has them in place of tokens: it draws as a pure function of what it has seen."""

    def __init__(self, bounds: SchedulerLimits, wrong: float, breaks: Callable[[], bool]) -> None:
        """`breaks`: whether an image cannot be encoded. What stands for it then is nothing that anyone should see."""
        super().__init__(bounds, wrong)
        self.kept: dict[int, tuple[bytes, list[int]]] = {}
        self._used: set[int] = set()
        self._bounds = bounds
        self._breaks = breaks

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.images is None:
            return super().execute(plan)
        room = self._bounds.images.room if self._bounds.images is not None else 0
        unseen = {}
        for slot in plan.images.forget.tolist():
            del self.kept[slot]
        for image in plan.images.encode:
            assert image.slot not in self._used, "a slot is used twice"
            self._used.add(image.slot)
            rows = image.inputs["pixels"].tolist()
            assert len(rows) == image.size
            if self._breaks():
                unseen[image.key], rows = "torn", [-1_000_000 - image.slot] * image.size
            self.kept[image.slot] = (image.key, rows)
        assert sum(len(rows) for _, rows in self.kept.values()) <= room, "more is held than there is room for"
        sizes = [image.size for image in plan.images.encode]
        assert len(sizes) < 2 or sum(sizes) <= self._bounds.max_num_batched_tokens, "too much is encoded in one step"
        values = [self.kept[slot][1][row] for slot, row in self.sources(plan)]
        places = plan.images.places.tolist()
        assert len(set(places)) == len(places) == len(values), "as many places as there are rows for them"
        seen = plan.token_ids.astype(np.int64)
        assert (seen[places] == TOKEN).all(), "an image stands where none of its tokens is"
        seen[places] = values
        result = super().execute(replace(plan, token_ids=seen))
        result.unseen = unseen
        return result

    def sources(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Slot and row of each place."""
        assert plan.images is not None
        found = []
        for slot, first, last in plan.images.sources.tolist():
            assert 0 <= first < last <= len(self.kept[slot][1]), "rows that the image does not have"
            found += [(slot, row) for row in range(first, last)]
        return found


class Story:
    """A scheduler, its workers, and the clients who bring what is wanted when they like."""

    def __init__(self, bounds: SchedulerLimits, *, seed: int = 0, late: int = 0, lost: float = 0.0, torn: float = 0.0,
                 wrong: float | None = None) -> None:  # fmt: skip
        """`late`: pixels come within so many steps more than one. `lost`: the share of what never comes, for which its
        request is aborted. `torn`: of images that cannot be encoded. `wrong`: of drafts' tokens; None: no drafts."""
        assert bounds.images is not None
        self.bounds, self.room, self.whole = bounds, bounds.images.room, bounds.images.whole
        self.random = np.random.default_rng(seed)
        guesses = None if wrong is None else speculation(Oracle(self._following, wrong))
        self.scheduler = Scheduler(bounds, guesses)
        self.model = SeeingModel(bounds, wrong or 0.0, lambda: self.random.random() < self.torn)
        self.late, self.lost, self.torn = late, lost, torn
        self.now = 0.0
        self.prompts: dict[int, Prompt] = {}
        self.requests: dict[int, Request] = {}
        self.aborted: set[int] = set()
        self.endings: Counter[int] = Counter()
        self.wanted: Counter[bytes] = Counter()
        self.asked: dict[bytes, Request] = {}  # wanted and not brought
        self.here: set[bytes] = set()  # brought, and not found to be torn
        self.held_back = False  # nothing is brought
        self._coming: list[tuple[float, bytes]] = []
        self._leaving: list[tuple[float, int]] = []
        self._brought: list[tuple[weakref.ref[np.ndarray], int]] = []
        self._in_flight: deque[StepPlan] = deque()

    def _following(self, request: Request, count: int) -> list[int]:
        log = self.prompts[request.id].truth + request.tokens[request.num_prompt :]
        for _ in range(count):
            log.append(next_token(log))
        return log[-count:]

    def add(self, parts: Sequence[Part], max_tokens: int = 4, *, done: int = 0, min_tokens: int = 0,
            **facts: Any) -> Request:  # fmt: skip
        """`done`: tokens that it comes with, which another engine drew."""
        number, prompt = len(self.requests), prompt_of(parts)
        params = EngineSampling(max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), stop_token_ids=(STOP,))
        request = Request(
            number, list(prompt.tokens), len(prompt.tokens), params, arrival=self.now, images=prompt.spans, **facts
        )
        before = expected_output(request, prompt.truth)[:done]
        request.tokens += before[:-1] if before[-1:] == [STOP] else before
        self.scheduler.add(request)
        self.prompts[number], self.requests[number] = prompt, request
        return request

    def abort(self, number: int) -> None:
        self.aborted.add(number)
        self.scheduler.abort(number)

    def advance(self) -> list[int]:
        """One step, → the requests that it plans."""
        self.now += 1.0
        if not self.held_back:
            self._bring()
        for when, number in self._leaving:
            if when <= self.now:
                self.abort(number)
        scheduler = self.scheduler
        plan = scheduler.schedule(self.now)
        planned = []
        if plan is not None:
            self.model.results.append(self.model.execute(plan))
            self._in_flight.append(plan)
            planned = self._check_plan(plan)
        self._check_waits()
        due = scheduler.num_in_flight and (plan is None or scheduler.num_in_flight >= self.bounds.steps_in_flight)
        del plan  # and with it its pixels
        self._commit(self.model.results.popleft() if due else None)
        scheduler.check_integrity()
        self._check_pixels()
        return planned

    def finish(self, most: int) -> None:
        """Until nothing is left, within so many steps."""
        for _ in range(most):
            if not self.scheduler.requests and not self.scheduler.has_work:
                break
            self.advance()
        assert not self.scheduler.requests, f"requests are left after {most} steps"
        self.check_end()

    def check_end(self) -> None:
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.states is None or self.scheduler.states.pool.num_used == 0
        for number, request in self.requests.items():
            assert self.endings[number] == 1, "every request ends once"
            output = request.tokens[request.num_prompt :]
            truth = expected_output(request, self.prompts[number].truth)
            if request.finish_reason in ("stop", "length"):
                assert output == truth
                continue
            assert output == truth[: len(output)]
            if request.finish_reason == "abort":
                assert number in self.aborted
            else:
                assert isinstance(request.error, DeadlineExceeded | EngineFailure)

    # ---- clients --------------------------------------------------------------------------------------------------

    def _bring(self) -> None:
        """What is due, in any order, now and then twice, and with it what nobody has asked for."""
        due = [key for when, key in self._coming if when <= self.now]
        self._coming = [(when, key) for when, key in self._coming if when > self.now]
        for key in self.random.permutation(len(due)).tolist():
            self.provide(PICTURES[due[key][0]])
        if self.random.random() < 0.1:
            self.scheduler.provide(b"unheard of", {"pixels": np.zeros(1)})

    def provide(self, picture: Picture) -> None:
        pixels = picture.pixels()
        self._brought.append((weakref.ref(pixels), picture.size))
        bringer = self.asked.pop(picture.key, None)
        if bringer is not None and bringer.state is not State.FINISHED:
            self.here.add(picture.key)
        self.scheduler.provide(picture.key, {"pixels": pixels})

    def _hear(self, wanted: Iterable[tuple[Request, bytes]]) -> None:
        for request, key in wanted:
            if request.state is State.FINISHED:  # in the same commit: another is going to be asked
                continue
            assert key in self.prompts[request.id].keys, "a request is asked for what it does not have"
            bringer = self.asked.get(key)
            assert bringer is None or bringer.state is State.FINISHED, "an image is wanted twice"
            assert key not in self.here or self.room < ALL_SIZES, "an image is wanted again that nobody had to evict"
            self.asked[key] = request
            self.wanted[key] += 1
            when = self.now + int(self.random.integers(1, self.late + 2))
            if self.random.random() < self.lost:
                self._leaving.append((when, request.id))
                continue
            self._coming += [(when, key)] * (1 + (self.random.random() < 0.1))

    # ---- what is checked at each step -----------------------------------------------------------------------------

    def _commit(self, result: StepResult | None) -> None:
        unseen = set(result.unseen) if result is not None else set()
        if result is not None:
            self._in_flight.popleft()
        outcome = self.scheduler.commit(result)
        self._hear(outcome.wanted)
        self.here -= unseen
        for request in outcome.finished:
            self.endings[request.id] += 1
            if isinstance(request.error, EngineFailure):
                assert self.prompts[request.id].keys & unseen, "a request ends for an image that it does not have"
                assert "torn" in str(request.error)
        for request in self.scheduler.requests.values():
            assert not self.prompts[request.id].keys & unseen, "a request goes on without its image"

    def _check_plan(self, plan: StepPlan) -> list[int]:
        """Which tokens are embeddings, of which image and row, and of which others each one sees."""
        rows = {request.row: request.id for request in self.scheduler.running}
        fresh = {new.row for new in plan.new_rows}
        wanted: list[tuple[int, bytes, int]] = []
        spans: list[list[int]] = []
        flat = 0
        for row, start, count in zip(plan.rows.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True):
            prompt, end = self.prompts[rows[row]], start + count
            wanted += [(flat + at - start, *prompt.places[at]) for at in range(start, end) if at in prompt.places]
            for first, last in prompt.runs if self.whole else ():
                assert not first < end < last, "a step ends amid what is seen whole"
                assert not first < start < last or row in fresh, "a step begins amid what is seen whole"
                if first < end and last > start:
                    spans.append([flat + max(first, start) - start, flat + last - start, first, last])
            flat += count
        given, seen = [], []
        if plan.images is not None:
            sources = zip(plan.images.places.tolist(), self.model.sources(plan), strict=True)
            given = [(place, self.model.kept[slot][0], row) for place, (slot, row) in sources]
            seen = plan.images.spans.tolist()
        assert given == wanted
        assert seen == spans
        return [rows[row] for row in plan.rows.tolist()]

    def _check_waits(self) -> None:
        scheduler = self.scheduler
        asked = list(scheduler.requests.values())
        waits = scheduler.explain(asked)
        reasons = Counter(wait.reason for wait in waits if wait.reason is not None)
        assert scheduler.waiting_for() == reasons
        for request, wait in zip(asked, waits, strict=True):
            if request.state is State.FETCHING:
                assert wait.reason is WaitsFor.IMAGE
            if wait.reason is WaitsFor.IMAGE:
                assert request.images, "a text waits for an image"
            assert wait.since >= request.arrival

    def _check_pixels(self) -> None:
        """What is kept of them, for images are large."""
        self._brought = [(pixels, size) for pixels, size in self._brought if pixels() is not None]
        leaving = sum(image.size for plan in self._in_flight if plan.images for image in plan.images.encode)
        assert sum(size for _, size in self._brought) <= self.room + leaving, "pixels pile up"


def seeing(room: int, *, whole: bool = False, **changes: Any) -> SchedulerLimits:
    return replace(limits(**changes), images=ImageLimits(token=TOKEN, room=room, whole=whole))


PARTS = st.lists(
    st.one_of(st.sampled_from(PICTURES), st.lists(st.integers(0, 3), min_size=1, max_size=9)), min_size=1, max_size=5
)
REQUEST = st.tuples(
    PARTS,
    st.integers(1, 9),  # max_tokens
    st.integers(0, 3),  # min_tokens
    st.integers(0, 1),  # priority
    st.sampled_from([0.0, 0.0, 0.0, 5.0, 20.0]),  # deadline, after its arrival
    st.sampled_from([b"", b"", b"other"]),  # salt
    st.sampled_from([0, 0, 0, 1, 4, 9]),  # tokens of its output that it comes with
)
EVENT = st.one_of(REQUEST, REQUEST, st.integers(0, 30))  # a request arrives, or an old one (by number) is aborted

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
LIVES = given(
    events=st.lists(st.tuples(EVENT, st.integers(0, 3)), min_size=15, max_size=45),
    num_pages=st.sampled_from([10, 12, 30, 60]),
    budget=st.sampled_from([1, 5, 16, 64]),
    caching=st.booleans(),
    by_priority=st.booleans(),
    depth=st.sampled_from([1, 2, 2]),
    num_states=st.sampled_from([0, 0, 1, 3, 12]),
    room=st.sampled_from([LARGEST, LARGEST + 2, 12, ALL_SIZES]),
    late=st.sampled_from([0, 2, 9]),
    lost=st.sampled_from([0.0, 0.0, 0.3]),
    torn=st.sampled_from([0.0, 0.0, 0.2]),
    seed=st.integers(0, 1000),
    whole=st.just(False),
    wrong=st.just(None),
)


@QUICK
@LIVES
def test_random_lives(**life: Any) -> None:
    live(**life)


@settings(QUICK, max_examples=60)
@LIVES
def test_lives_of_images_that_are_seen_whole(**life: Any) -> None:
    """No family of these has recurrent states."""
    live(**life | {"whole": True, "num_states": 0})


@pytest.mark.parametrize("share", [0.0, 0.5])
@settings(QUICK, max_examples=40)
@LIVES
def test_lives_with_drafts(share: float, **life: Any) -> None:
    live(**life | {"wrong": share})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"whole": True, "num_states": 0}, {"wrong": 0.3}, {"torn": 0.3, "depth": 2, "caching": True}]
)
@settings(QUICK, max_examples=1000)
@LIVES
def test_thousands_of_lives(changes: dict[str, Any], **life: Any) -> None:
    live(**life | changes)


def live(
    events: list[tuple[Any, int]],
    num_pages: int,
    budget: int,
    caching: bool,
    by_priority: bool,
    depth: int,
    num_states: int,
    room: int,
    late: int,
    lost: float,
    torn: float,
    seed: int,
    whole: bool,
    wrong: float | None,
) -> None:
    bounds = seeing(
        room,
        whole=whole,
        num_pages=num_pages,
        max_num_seqs=SEATS,
        max_num_batched_tokens=max(budget, LARGEST + SEATS) if whole else budget,
        enable_prefix_caching=caching,
        by_priority=by_priority,
        steps_in_flight=depth,
        num_states=num_states,
        speculation=SpeculativeConfig(method="suffix", num_speculative_tokens=4),
    )
    story = Story(bounds, seed=seed, late=late, lost=lost, torn=torn, wrong=wrong)
    for event, steps in events:
        if isinstance(event, int):
            story.abort(event)
        else:
            parts, max_tokens, min_tokens, priority, patience, salt, done = event
            deadline = story.now + patience if patience else 0.0
            try:
                story.add(
                    parts,
                    max_tokens,
                    min_tokens=min_tokens,
                    done=done,
                    priority=priority,
                    deadline=deadline,
                    cache_salt=salt,
                    resumed=done > 0,
                )
            except ContextTooLong:
                assert len(prompt_of(parts).tokens) + max_tokens > min(CONTEXT, num_pages * 4)
        for _ in range(steps):
            story.advance()
    story.finish(3000)


def test_what_was_computed_of_a_torn_image_is_not_found_though_its_request_had_left() -> None:
    """While the step that encodes it was in flight."""
    story = Story(seeing(12, num_pages=30, steps_in_flight=2, max_num_batched_tokens=64), torn=1.0)
    parts: list[Part] = [[1, 2, 0, 1], PICTURES[6], [1, 2, 2, 2, 2]]
    left = story.add(parts)
    assert any(story.advance() for _ in range(9))
    assert story.scheduler.num_in_flight
    story.abort(left.id)
    story.advance()
    story.torn = 0.0
    again = story.add(parts)
    story.finish(20)
    assert again.finish_reason == "length"
    assert again.num_cached == 4, "what comes before the image is known"


def test_equal_tokens_that_are_other_pieces_of_an_image_share_no_page() -> None:
    """Only the middle one is: the token that stands for it is in the text as well."""
    story = Story(seeing(12, num_pages=30, max_num_batched_tokens=64))
    for parts in ([[3, 3], PICTURES[0], [1, 1, 1]], [[3], PICTURES[0], [3, 1, 1, 1]], [PICTURES[0], [3, 3, 1, 1, 1]]):
        request = story.add(parts)
        story.finish(20)
        assert request.num_cached == 0


def test_pixels_that_have_come_are_not_wanted() -> None:
    """The second is to bring them when the first leaves, and they come from there all the same."""
    story = Story(seeing(LARGEST, num_pages=60, max_num_batched_tokens=64))
    story.held_back = True
    first, *_ = (story.add([picture, [1]]) for picture in (PICTURES[6], PICTURES[6], PICTURES[7]))
    story.advance()
    story.abort(first.id)
    story.provide(PICTURES[6])
    wanted = story.wanted.copy()
    story.advance()
    assert story.wanted == wanted, "what has come is not wanted any more"
    story.held_back = False
    story.finish(50)
