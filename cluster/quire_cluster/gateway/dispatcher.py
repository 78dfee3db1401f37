"""Carries choices to replicas and back, and to another replica when one is lost."""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from quire_engine.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidParameter,
    PoisonRequest,
    QueueFull,
    QuireError,
    Unavailable,
)
from quire_engine.fairness import Shares, admits
from quire_engine.waiting import WaitsFor
from quire_protos.v1 import engine_pb2 as pb

from quire_cluster.convert import error_from_proto, logprobs_from_proto
from quire_cluster.gateway.generation import Choice, Generation, RequestFacts
from quire_cluster.gateway.sessions import ReplicaSession
from quire_cluster.gateway.waiting import ChoiceWait, estimate, wait_of
from quire_cluster.policies.admission import UnderWay, has_room, rebuild_wait
from quire_cluster.policies.prefixes import Prompt
from quire_cluster.policies.routing import Router, choose_replica
from quire_cluster.policies.suspicion import Patience, Standing
from quire_cluster.routing_table import Key, RoutingTable

log = logging.getLogger(__name__)
_TICK = 0.25  # seconds
_HELD_BACK = 10.0  # seconds that what is new waits for suspects at the most
_ANSWER = 1.0  # seconds that replicas have to say what their requests wait for
_PATIENCE = Patience()


class Dispatcher:
    """Keeps a session per replica of the routing table, and every live choice on one of them."""

    def __init__(
        self,
        on_load: Callable[[ReplicaSession], None],
        on_steps: Callable[[list[int]], None],
        *,
        max_waiting: int,
        patience: Patience = _PATIENCE,
    ) -> None:
        """`max_waiting`: requests that wait while there is no replica."""
        self._sessions: dict[Key, ReplicaSession] = {}
        self._homeless: dict[Choice, float] = {}  # choices that wait for a replica without a suspect → since when
        self._suspects: dict[Choice, float] = {}  # suspects that do
        self._held_back: float | None = None  # since when what is new waits for suspects
        self._router: Router[Key] = Router(random.Random())
        self._last: tuple[RequestFacts, Prompt, Key] | None = None  # the request that was sent last, and where
        self._turn = itertools.count()
        self._place: dict[Choice, tuple[ReplicaSession, int]] = {}
        self._under_way = UnderWay()  # those that have one
        self._up: dict[int, float] = {}  # slots that have had a replica → when it last was there
        self._load_seconds = 0.0
        self._on_load = on_load
        self._on_steps = on_steps
        self._max_waiting = max_waiting
        self._patience = patience
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False
        self.on_silence: Callable[[Key], None] = lambda key: None  # a replica that says nothing
        self.on_gone: Callable[[int], None] = lambda slot: None  # a slot is no more
        self.on_wait: Callable[[], None] = lambda: None  # a request finds no replica
        self._ready_at: float | None = None  # in time.time() seconds: when a replica should be there

    # ---- replicas come and go -------------------------------------------------------------------------------------

    @property
    def sessions(self) -> list[ReplicaSession]:
        """Of the replicas that can be routed to."""
        return [session for session in self._sessions.values() if session.usable]

    @property
    def homeless(self) -> list[Choice]:
        """What waits for a replica."""
        return [*self._homeless, *self._suspects]

    @property
    def ready_in(self) -> float | None:
        """Seconds until a replica that starts should be there, where that is known."""
        return max(0.0, self._ready_at - time.time()) if self._ready_at is not None else None

    @property
    def overdue(self) -> list[int]:
        """Slots whose replica is gone for longer than it takes to bring one back."""
        limit = time.monotonic() - rebuild_wait(self._load_seconds)
        return [slot for slot, since in self._up.items() if since < limit]

    @property
    def started(self) -> bool:
        """Whether there ever was a replica."""
        return bool(self._up)

    def update_table(self, table: RoutingTable) -> None:
        """Opens sessions to new replicas; a replica that left the table is left when its session breaks."""
        for entry in table.replicas:
            session = self._sessions.get(entry.key)
            if session is None:
                self._sessions[entry.key] = ReplicaSession(entry, self, self._patience)
            else:
                session.entry = entry
            self._load_seconds = max(self._load_seconds, entry.load_seconds)
        self._load_seconds = max(self._load_seconds, table.load_seconds)
        self._ready_at = table.ready_at
        for slot in [slot for slot in self._up if table.slots is not None and slot not in table.slots]:
            del self._up[slot]
            self.on_gone(slot)
        wanted = {entry.key for entry in table.replicas}
        for key, session in self._sessions.items():
            session.wanted = key in wanted
            self._show(session)
        if table.replicas:
            self._begin_ticking()

    def _begin_ticking(self) -> None:
        if self._ticking is None:
            self._ticking = asyncio.ensure_future(self._tick())

    async def close(self) -> None:
        """Hangs up everywhere, for good."""
        self._closed = True
        self.give_up(_GONE)
        if self._ticking is not None:
            self._ticking.cancel()
        await asyncio.gather(*(session.close() for session in self._sessions.values()))
        self._sessions.clear()

    def give_up(self, why: str) -> None:
        """No replica will come: ends what waits for one."""
        for choice in (*self._homeless, *self._suspects):
            choice.end("error", error=Unavailable(why))
        self._homeless.clear()
        self._suspects.clear()

    # ---- requests -------------------------------------------------------------------------------------------------

    def submit(self, generation: Generation) -> None:
        """Sends every choice to a replica; one that finds none waits for it.

        Raises Unavailable where too much waits for one; QueueFull where replicas have said that they cannot take as
        much, be it of this tenant's; InvalidParameter where they never can.
        """
        if self._closed:  # while its prompt was read, which may take seconds
            raise Unavailable(_GONE)
        choices = [choice for choice in generation.choices if not choice.ended]
        # There may be many replicas: they are gone through no further than is needed.
        usable = (session for session in self._sessions.values() if session.usable)
        if (first := next(usable, None)) is None:
            if not self._may_wait(generation.facts, len(choices)):
                wait = max(1.0, (self._ready_at or 0.0) - time.time())
                known = f"in {wait:.0f} s" if self._ready_at else "later"
                waiting = len(self._homeless)
                raise Unavailable(f"no replica is there now, and {waiting} requests wait; try again {known}", wait)
            self._begin_ticking()
            self.on_wait()
        elif not has_room(
            (session.as_load() for session in itertools.chain((first,), usable)), len(choices) + len(self._homeless)
        ):
            most = sum(session.load.most_requests for session in self.sessions)
            if len(choices) > most:
                raise InvalidParameter(
                    f"n is {len(choices)}, and {most} answers run and wait at a time; ask for fewer, or start the "
                    "server with a larger --max-num-queued-reqs",
                    "n",
                )
            tenant, loads = generation.facts.caller.tenant, (session.as_load() for session in self.sessions)
            if not self._under_way.takes(loads, len(choices) + len(self._homeless), tenant.name, tenant.weight):
                raise QueueFull(
                    f"so many requests run and wait that there is no room for {len(choices)} more; try again later"
                )
        for choice in choices:
            self._guard(choice, self._send)

    def _may_wait(self, facts: RequestFacts, count: int) -> bool:
        """Whether so many more may wait for a replica."""
        total, most = len(self._homeless), self._max_waiting
        if total + count <= most:
            return True
        tenant, others = facts.caller.tenant, [choice.facts.caller.tenant for choice in self._homeless]
        shares = Shares({one.name: one.weight for one in (*others, tenant)}, most)
        own = sum(one.name == tenant.name for one in others)
        return admits(count, total=total, own=own, most=most, share=shares.of(tenant.name))

    def abort(self, generation: Generation) -> None:
        """The client left: ends what is not ended."""
        for choice in generation.choices:
            if not choice.ended:
                choice.end("abort")
            self.stop(choice)

    def stop(self, choice: Choice) -> None:
        """It has its ending, which its replica does not know."""
        self._homeless.pop(choice, None)
        self._suspects.pop(choice, None)
        self._release(choice, tell=True)

    def _send(self, choice: Choice) -> None:
        """To the best replica that may have it; a choice that finds none waits."""
        now = time.monotonic()
        if choice.facts.deadline and choice.facts.deadline <= now:
            choice.end("error", error=DeadlineExceeded("the deadline passed before the end"))
            return
        suspected = choice.losses.suspected
        prompt, chosen = self._route(choice)
        if chosen is None:
            (self._suspects if suspected else self._homeless)[choice] = now
            return
        session = self._sessions[chosen]
        choice.epoch += 1
        choice.losses.sent(len(choice.output))
        if suspected:
            session.suspect = choice
        believed = self._router.sent(chosen, prompt)
        choice.routed = (prompt, believed)
        self._place[choice] = (session, session.submit(choice, prompt.tokens - believed))
        self._under_way.add(choice.facts.caller.tenant.name, choice.facts.caller.tenant.weight)
        self._show(session)

    def _route(self, choice: Choice) -> tuple[Prompt, Key | None]:
        """What routing looks at of it, and where it should go. The router knows no replica that is to be got around;
        a suspect, and what finds no other, goes to the least loaded of those that are open to it."""
        facts, last = choice.facts, self._last
        sibling = last if last is not None and last[0] is facts else None
        if sibling is not None and not choice.output:
            prompt = sibling[1]
        else:
            tokens = facts.seen.told_apart(facts.prompt) + choice.output
            prompt = Prompt.of(tokens, facts.cache_salt, self._router.block_size)
        chosen = None
        if not choice.losses.suspected:
            chosen = self._router.choose(prompt, sibling[2] if sibling is not None else None)
        if chosen is None:
            loads = {session.key: session.as_load() for session in self._open_to(choice.losses.suspected)}
            chosen = choose_replica(loads, next(self._turn))
        if chosen is not None:
            self._last = (facts, prompt, chosen)
        return prompt, chosen

    def _show(self, session: ReplicaSession) -> None:
        """Tells the router what became of a replica. It is to know none that is suspicious, silent or draining."""
        good = session.usable and session.suspect is None and session.silence.standing is Standing.GOOD
        self._router.update(session.key, session.as_load() if good else None)

    def _release(self, choice: Choice, *, tell: bool) -> None:
        session, wire_id = self._leave(choice)
        if session is not None:
            session.release(wire_id, tell=tell)
            if session.suspect is choice:
                self._acquit(session)
            self._show(session)

    def _leave(self, choice: Choice) -> tuple[ReplicaSession | None, int]:
        """Where it was; it is at no replica any more."""
        if choice not in self._place:
            return None, 0
        self._under_way.remove(choice.facts.caller.tenant.name)
        return self._place.pop(choice)

    def _acquit(self, session: ReplicaSession) -> None:
        """Its suspect has ended, or done nothing: others may come."""
        session.suspect = None
        self._show(session)
        self._place_waiting()

    def _place_waiting(self) -> None:
        """In the order of their arrival; first suspects, beside which nothing new should be."""
        for suspected, waiting in ((True, self._suspects), (False, self._homeless)):
            if not waiting or not self._open_to(suspected):
                continue
            for choice in sorted(waiting, key=_arrival):
                if not self._open_to(suspected):
                    break
                if waiting.pop(choice, None) is not None:
                    self._guard(choice, self._send)
        if not (self._homeless and self.sessions):
            self._held_back = None
        elif self._held_back is None:
            self._held_back = time.monotonic()

    def _open_to(self, suspected: bool) -> list[ReplicaSession]:
        """Replicas that have no suspect. To one: where there is nothing that may kill as well, if possible, and nowhere
        once half of all have theirs, so that the others go on. To what is new: any, once it has been held back for so
        long that a suspect seems to have much to compute."""
        sessions = self.sessions
        free = [session for session in sessions if session.suspect is None]
        if not suspected:
            long = self._held_back is not None and time.monotonic() - self._held_back > _HELD_BACK
            return sessions if long and not free else free
        if len(sessions) - len(free) >= max(1, len(sessions) // 2):
            return []
        return [session for session in free if not session.unproven] or free

    # ---- what sessions say ----------------------------------------------------------------------------------------

    def updated(self, session: ReplicaSession, update: pb.SessionUpdate) -> None:
        """One message of a replica. Wire ids are never reused, so what a stale submission says meets no choice."""
        now = time.monotonic()
        for wire_id in update.admitted:
            self._tell(session, wire_id, Choice.admit)
        for scores in update.logprobs:
            self._tell(session, scores.id, partial(_take_scores, scores=scores))
        for vector in update.vectors:
            self._tell(session, vector.id, partial(_take_vector, values=vector.values))
        for wire_id, index, token in zip(update.ids, update.indexes, update.tokens, strict=True):
            self._tell(session, wire_id, partial(Choice.accept, index=index, token=token, now=now))
        for started in update.started:
            cached = started.cached_tokens
            self._tell(session, started.id, partial(self._start, session=session, cached=cached, now=now))
        for ending in update.endings:
            self._tell(session, ending.id, partial(self._finish, session=session, ending=ending))
        if session.suspect is not None and session.suspect.losses.grown(len(session.suspect.output)):
            self._acquit(session)
        if update.step_tokens:
            self._on_steps(list(update.step_tokens))

    def reported(self, session: ReplicaSession) -> None:
        """A replica's load; the first one says that it is there."""
        self._up[session.entry.slot] = time.monotonic()
        self._router.block_size = self._router.block_size or session.load.block_size
        self._show(session)
        self._on_load(session)
        self._place_waiting()

    def failed(self, session: ReplicaSession, wire_id: int, error: QuireError) -> None:
        """A choice ends, for the gateway's own reasons: the replica is told, and is as good as before."""
        self._tell(session, wire_id, lambda choice: choice.end("error", error=error))

    def lost(self, session: ReplicaSession, choices: list[tuple[Choice, bool]], failure: str) -> None:
        """A replica is gone: its choices go on elsewhere, from their logs, unless one is to blame."""
        now = time.monotonic()
        self._router.forget(session.key)
        if session.entry.draining:  # it was to end: what it had left goes on elsewhere, and nobody is to blame
            for choice, _ in sorted(choices, key=lambda one: _arrival(one[0])):
                self._leave(choice)
                self._guard(choice, self._send)
            return
        unproven = {choice for choice, begun in choices if begun and not choice.losses.proven(len(choice.output))}
        if choices:
            log.warning(
                "replica %d (epoch %d) is lost%s; %d requests go on elsewhere",
                *session.key[:2],
                f" ({failure})" if failure else "",
                len(choices),
            )
        for choice, begun in sorted(choices, key=lambda one: _arrival(one[0])):
            self._leave(choice)
            alone = unproven <= {choice}
            near = begun and (choice in unproven or not unproven)
            if choice.losses.lost(now, near=near, explained=bool(failure), alone=alone):
                log.error("request %s ends: replicas died under it again and again", choice.facts.request_id)
                choice.end("error", error=PoisonRequest(_POISON))
            else:
                self._guard(choice, self._send)
        self._place_waiting()

    def ended(self, session: ReplicaSession) -> None:
        """A session that is not opened again."""
        del self._sessions[session.key]

    def _tell(self, session: ReplicaSession, wire_id: int, act: Callable[[Choice], object]) -> None:
        if (choice := session.live.get(wire_id)) is not None:
            self._guard(choice, act)

    def _guard(self, choice: Choice, act: Callable[[Choice], object]) -> None:
        """Whatever is done to a choice is done here: what that raises ends this choice, and no other.

        One that has its ending now, be it by a stop string, is ended at its replica too.
        """
        try:
            act(choice)
        except Exception as error:
            log.exception("request %s ends with an error of the gateway", choice.facts.request_id)
            told = (
                error if isinstance(error, QuireError) else EngineFailure("internal error; it is in the server's log")
            )
            choice.end("error", error=told)
        if choice.ended:
            self._release(choice, tell=True)

    def _start(self, choice: Choice, session: ReplicaSession, cached: int, now: float) -> None:
        choice.start(cached_tokens=cached, now=now)
        if choice.sampling.prompt_logprobs is None:  # for those the whole prompt is computed, cached or not
            prompt, believed = choice.routed
            self._router.started(session.key, prompt, min(believed, len(choice.facts.prompt)), cached)

    def _finish(self, choice: Choice, session: ReplicaSession, ending: pb.Ending) -> None:
        self._release(choice, tell=False)
        choice.draft_tokens += ending.draft_tokens
        choice.accepted_tokens += ending.accepted_tokens
        if ending.error_kind == Unavailable.__name__:  # refused by a replica that drains: another one takes it
            session.draining = True
            self._show(session)
            self._send(choice)
        elif ending.error_kind:
            choice.end("error", error=error_from_proto(ending.error_kind, ending.error))
        else:
            stop = ending.stop_token_id if ending.HasField("stop_token_id") else None
            choice.end(ending.reason, stop_reason=stop)

    # ---- what requests wait for -----------------------------------------------------------------------------------

    @property
    def homeless_for(self) -> str:
        """What those that have no replica wait for."""
        return (WaitsFor.UNSUSPECTED if self.sessions else WaitsFor.REPLICA).value

    async def why(self, generation: Generation) -> list[ChoiceWait]:
        """What each answer that has not ended waits for, or that it runs. Replicas are asked, and waited for a second
        at the most."""
        places = {choice: self._place[choice] for choice in generation.choices if choice in self._place}
        asked = {choice: session.ask(wire_id) for choice, (session, wire_id) in places.items()}
        if asked:
            await asyncio.wait(asked.values(), timeout=_ANSWER)
        now = time.monotonic()
        return [self._wait_of(choice, asked.get(choice), now) for choice in generation.choices if not choice.ended]

    def _wait_of(self, choice: Choice, asked: "asyncio.Future[pb.Waiting | None] | None", now: float) -> ChoiceWait:
        session, _ = self._place.get(choice, (None, 0))
        if session is None:
            since = self._homeless.get(choice, self._suspects.get(choice, now))
            return wait_of(choice, self.homeless_for, now - since)
        times, answer = choice.times, asked.result() if asked is not None and asked.done() else None
        if answer is None:  # it came there just now, or the replica is busy
            return wait_of(choice, WaitsFor.WORD.value, now - (times.last_token or times.submitted))
        if not answer.reason:
            return wait_of(choice, "", now - (times.started or times.submitted))
        return wait_of(choice, answer.reason, answer.since, estimate(answer, session.load))

    # ---- the clock ------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Looks for replicas that are silent, and for choices that have waited for too long."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            last, before = time.monotonic(), last
            try:
                self._look(last, last - before)
            except Exception:  # without this clock requests would wait for ever
                log.exception("looking after replicas failed; it goes on")

    def _look(self, now: float, passed: float) -> None:
        for session in self._sessions.values():
            session.silence.passed(passed)
            if session.usable:
                self._up[session.entry.slot] = now
            self._show(session)
            if session.silence.standing is Standing.LOST:
                log.warning("replica %d (epoch %d) says nothing for %g s", *session.key[:2], self._patience.move)
                session.silence.heard()  # and is asked again
                session.drop()
                self.on_silence(session.key)
            elif not session.wanted and not session.live:
                session.drop()
        limit = rebuild_wait(self._load_seconds)
        for waiting in (self._homeless, self._suspects):
            for choice, since in list(waiting.items()):
                if choice.facts.deadline and choice.facts.deadline <= now:
                    del waiting[choice]
                    choice.end("error", error=DeadlineExceeded("the deadline passed before the end"))
                elif now - since > limit and not self.sessions:
                    del waiting[choice]
                    choice.end("error", error=Unavailable("no replica came back in time; try again"))


_GONE = "this model was deleted or replaced meanwhile; send the request again"
_POISON = (
    "two replicas died with this request, or more, so it is not sent to another; if it should be served, show it to "
    "the server's operator, whose log says what the replicas died of"
)


def _take_scores(choice: Choice, scores: pb.TopLogprobs) -> None:
    values = logprobs_from_proto(scores)
    if scores.prompt:
        choice.accept_prompt_logprobs(scores.first, values)
    else:
        choice.accept_logprobs(values)


def _take_vector(choice: Choice, values: bytes) -> None:
    choice.vector = np.frombuffer(values, "<f4")


def _arrival(choice: Choice) -> tuple[float, str, int]:
    return (choice.facts.arrival, choice.facts.request_id, choice.index)
