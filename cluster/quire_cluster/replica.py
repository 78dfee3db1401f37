"""A replica: the actor in which one engine runs. It has its own workers, and serves gateways one session each.

Two threads: the engine's, which steps whenever there is work, and the actor's event loop, which speaks gRPC. Requests
and aborts go one way through an inbox, one update per step and session the other way.
"""

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from quire_engine.cache.images import Inputs
from quire_engine.engine import Engine
from quire_engine.errors import EngineFailure, QuireError, Unavailable
from quire_engine.outcome import StepOutcome
from quire_engine.request import Request, State
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

from quire_cluster.convert import BATCH_BYTES, KEEPALIVE, MESSAGE_BYTES, logprobs_to_proto, request_from_proto
from quire_cluster.governance.identity import CallerCheck, SharedKeys
from quire_cluster.keys import Keys
from quire_cluster.wire import image_from_bytes
from quire_cluster.workers import Workers

log = logging.getLogger(__name__)
_HEARTBEAT = 0.25  # seconds between load reports, busy or idle
_POSITIONS = 4096  # of a prompt whose log-probabilities go in one message
_FURTHEST_BEHIND = 20_000  # updates
_LAST_WORDS = 0.5  # seconds that gateways have to read why a replica ends
_FREE_CHECK = 1.0  # seconds an engine is idle before it checks its invariants


class GatewaySession:
    """One gateway: which requests are its own, and the updates that wait for it."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[pb.SessionUpdate | None] = asyncio.Queue()
        self.by_wire_id: dict[int, int] = {}  # id in the session → id in the engine
        self.images: dict[bytes, bytearray] = {}  # that are being received

    def put(self, update: pb.SessionUpdate) -> None:
        """Sends an update; a gateway that is so far behind that it cannot be reading is hung up on."""
        if self.updates.qsize() < _FURTHEST_BEHIND:
            self.updates.put_nowait(update)
        elif self.updates.qsize() == _FURTHEST_BEHIND:
            log.warning("a gateway does not read what it is sent; its session ends")
            self.updates.put_nowait(None)


class EngineThread:
    """Runs an engine on a thread of its own, and turns each step's outcome into one message per session."""

    def __init__(
        self, workers: Workers, loop: asyncio.AbstractEventLoop, on_failure: Callable[[QuireError], None]
    ) -> None:
        self._workers = workers
        self._engine = Engine(workers)
        self._loop = loop
        self._on_failure = on_failure
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._next_id = 1
        self._owners: dict[int, tuple[GatewaySession, int]] = {}  # engine id → session, wire id
        self._untold: list[Request] = []  # which their gateways do not know to be admitted
        self._last_step = time.monotonic()
        self._stepping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called on the event loop ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to step."""
        self._thread.start()

    def put(self, action: Callable[[], None]) -> None:
        """Runs `action` on the engine's thread before the next step."""
        self._inbox.append(action)
        self._wake.set()

    def stop(self) -> None:
        """Ends the thread after the step it is in; waits for it."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=5)

    def wake(self) -> None:
        """A worker died: look at it now."""
        self._wake.set()

    def load(self) -> pb.Load:
        """A report for the gateways. Reads counters that the engine's thread writes: each is whole by itself, but a
        difference of two that are of different moments can be below 0."""
        scheduler = self._engine.scheduler
        pool, stats = scheduler.pool, scheduler.stats
        allocated, unused = scheduler.cache.slots(scheduler.running)
        return pb.Load(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            pages_total=pool.num_pages,
            pages_used=pool.num_used,
            slots_allocated=allocated,
            slots_unused=max(0, unused),
            steps=self._engine.steps,
            busy=self._stepping or self._engine.has_work,
            step_age=time.monotonic() - self._last_step,
            preemptions=stats.preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            drafts=stats.drafts,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            accepted_per_position=list(stats.accepted_per_position),
            block_size=scheduler.limits.block_size,
            most_requests=min(scheduler.limits.most_requests, 2**32 - 1),
            rows=scheduler.limits.max_num_seqs,
            queued_tokens=scheduler.queued_tokens,
            prefill_rate=self._engine.prompt_rate.per_second,
            images_encoded=stats.images_encoded,
            encoder_seconds=stats.encoder_seconds,
            image_queries=images.queries if (images := scheduler.images) is not None else 0,
            image_hits=images.hits if images is not None else 0,
            waiting_for={why.value: count for why, count in scheduler.waiting_for().items()},
        )

    @property
    def num_requests(self) -> int:
        """Those that have not ended, or whose ending is not with their gateway's session."""
        return len(self._owners) + len(self._inbox)

    @property
    def max_model_len(self) -> int:
        """Of the engine: the longest prompt plus output."""
        return self._engine.scheduler.context

    # ---- on the engine's thread -----------------------------------------------------------------------------------

    def submit(self, session: GatewaySession, message: pb.Submit, now: float) -> None:
        """Adds a request that came at `now`, in time.monotonic() seconds, or answers at once why not."""
        request_id = self._next_id
        self._next_id += 1
        try:
            request = request_from_proto(message, request_id, now)
            self._engine.add(request)
        except QuireError as error:
            self._refuse(session, message.id, error)
            return
        except Exception as error:  # whatever is wrong with one request ends that one
            log.exception("a request could not be added")
            self._refuse(session, message.id, EngineFailure(f"the request failed: {type(error).__name__}"))
            return
        self._owners[request_id] = (session, message.id)
        session.by_wire_id[message.id] = request_id
        self._untold.append(request)

    def _refuse(self, session: GatewaySession, wire_id: int, error: QuireError) -> None:
        update = pb.SessionUpdate()
        update.endings.add(id=wire_id, reason="error", error_kind=type(error).__name__, error=str(error))
        self._deliver([(session, update)])

    def provide(self, key: bytes, inputs: Inputs) -> None:
        """The pixels of an image that was wanted."""
        self._engine.scheduler.provide(key, inputs)

    def abort(self, session: GatewaySession, wire_id: int) -> None:
        """Ends a request early; one that is gone already is left alone."""
        request_id = session.by_wire_id.get(wire_id)
        if request_id is not None:
            self._engine.abort(request_id)

    def why(self, session: GatewaySession, wire_ids: list[int]) -> None:
        """Tells what requests wait for; nothing of those that are gone."""
        known = self._engine.scheduler.requests
        asked = {
            wire_id: request
            for wire_id in wire_ids
            if (request := known.get(session.by_wire_id.get(wire_id, 0))) is not None
        }
        update, now = pb.SessionUpdate(), time.monotonic()
        for wire_id, wait in zip(asked, self._engine.scheduler.explain(list(asked.values())), strict=True):
            if wait.reason is None:
                update.waiting.add(id=wire_id)
            else:
                since = max(0.0, now - wait.since)
                update.waiting.add(id=wire_id, reason=wait.reason.value, since=since, tokens_ahead=wait.tokens_ahead)
        self._deliver([(session, update)])

    def end_session(self, session: GatewaySession) -> None:
        """Its requests end with it."""
        for request_id in list(session.by_wire_id.values()):
            self._engine.abort(request_id)

    def _run(self) -> None:
        try:
            while not self._stopping:
                while self._inbox:
                    self._inbox.popleft()()
                self._tell_admitted()
                if (failure := self._workers.failure) is not None:
                    raise failure
                if not self._engine.has_work:
                    self._rest()
                    continue
                self._stepping = True
                outcome = self._engine.step(self._tell_started)
                self._last_step = time.monotonic()
                self._report(outcome)
                self._stepping = False
        except QuireError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the engine failed")
            self._fail(EngineFailure(f"the engine failed: {type(error).__name__}: {error}"))

    def _fail(self, error: QuireError) -> None:
        self._loop.call_soon_threadsafe(self._on_failure, error)

    def _rest(self) -> None:
        """Until something comes; an engine that stays idle checks its invariants once."""
        self._wake.clear()
        if self._inbox or self._stopping or self._workers.failure is not None:
            return
        if not self._wake.wait(_FREE_CHECK):
            self._engine.scheduler.check_integrity()
            self._wake.wait()

    def _tell_admitted(self) -> None:
        """Of those whose grammar is compiled, if they have one: one that has a fault is refused instead."""
        updates: dict[GatewaySession, pb.SessionUpdate] = {}
        for request in self._untold:
            if request.state not in (State.PREPARING, State.FINISHED):
                session, wire_id = self._owners[request.id]
                updates.setdefault(session, pb.SessionUpdate()).admitted.append(wire_id)
        self._untold = [request for request in self._untold if request.state is State.PREPARING]
        if updates:
            self._deliver(list(updates.items()))

    def _tell_started(self, requests: list[Request]) -> None:
        """Before the step is computed: if it kills, gateways know what was in it."""
        self._tell_admitted()
        updates: dict[GatewaySession, pb.SessionUpdate] = {}
        for request in requests:
            session, wire_id = self._owners[request.id]
            update = updates.setdefault(session, pb.SessionUpdate())
            update.started.add(id=wire_id, cached_tokens=max(request.num_cached, 0))
        self._deliver(list(updates.items()))

    def _report(self, outcome: StepOutcome) -> None:
        """One update per session with news. This runs once a step over all its tokens: columns, no object per token."""
        updates: dict[GatewaySession, pb.SessionUpdate] = {}
        columns: dict[GatewaySession, tuple[list[int], list[int], list[int]]] = {}
        owners = self._owners

        def update_for(session: GatewaySession) -> pb.SessionUpdate:
            update = updates.get(session)
            if update is None:
                update = updates[session] = pb.SessionUpdate(step_tokens=[outcome.num_tokens])
            return update

        for request, token, index in zip(outcome.requests, outcome.tokens, outcome.indexes, strict=True):
            session, wire_id = owners[request.id]
            column = columns.get(session)
            if column is None:
                column = columns[session] = ([], [], [])
            column[0].append(wire_id)
            column[1].append(index)
            column[2].append(token)
        for session, (ids, indexes, tokens) in columns.items():
            update = update_for(session)
            update.ids.extend(ids)
            update.indexes.extend(indexes)
            update.tokens.extend(tokens)
        for request, scores in outcome.logprobs:
            session, wire_id = owners[request.id]
            update_for(session).logprobs.append(logprobs_to_proto(wire_id, scores))
        large: list[tuple[GatewaySession, pb.SessionUpdate]] = []  # in messages of their own, ahead of the endings
        for request, first, scores in outcome.prompt_logprobs:
            session, wire_id = owners[request.id]
            for at in range(0, len(scores.chosen), _POSITIONS):
                part = scores.part(at, at + _POSITIONS)
                told = logprobs_to_proto(wire_id, part, prompt=True, first=first + at)
                large.append((session, pb.SessionUpdate(logprobs=[told])))
        for request, vector in outcome.vectors:
            session, wire_id = owners[request.id]
            found = pb.Vector(id=wire_id, values=vector.astype("<f4").tobytes())
            large.append((session, pb.SessionUpdate(vectors=[found])))
        for request, key in outcome.wanted:
            session, wire_id = owners[request.id]
            update_for(session).wanted.add(id=wire_id, key=key)
        for request in outcome.finished:
            session, wire_id = owners.pop(request.id)
            del session.by_wire_id[wire_id]
            update_for(session).endings.append(_ending(wire_id, request))
        if updates or large:
            self._deliver([*large, *updates.items()])

    def _deliver(self, updates: list[tuple[GatewaySession, pb.SessionUpdate]]) -> None:
        def put() -> None:
            for session, update in updates:
                session.put(update)

        self._loop.call_soon_threadsafe(put)


def _ending(wire_id: int, request: Request) -> pb.Ending:
    ending = pb.Ending(
        id=wire_id,
        reason=request.finish_reason or "error",
        draft_tokens=request.num_drafts,
        accepted_tokens=request.num_accepted,
    )
    if request.stop_token_id is not None:
        ending.stop_token_id = request.stop_token_id
    if request.error is not None:
        ending.error_kind, ending.error = type(request.error).__name__, str(request.error)
    return ending


class EngineService(engine_pb2_grpc.EngineServicer):
    """The session service."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self.accepting = True
        self._sessions: set[GatewaySession] = set()

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionUpdate]:
        """Until the gateway hangs up; then its requests are aborted. It ends too where its reader or heartbeat fails:
        half a session would be taken for a replica that hangs."""
        session = GatewaySession()
        self._sessions.add(session)
        reader = asyncio.ensure_future(self._read(session, request_iterator))
        beat = asyncio.ensure_future(self._beat(session))
        for task in (reader, beat):
            task.add_done_callback(lambda _: session.updates.put_nowait(None))
        try:
            while (update := await session.updates.get()) is not None:
                yield merged(update, session.updates)
        finally:
            reader.cancel()
            beat.cancel()
            self._sessions.discard(session)
            self._engine.put(lambda: self._engine.end_session(session))

    async def _read(self, session: GatewaySession, messages: AsyncIterator[pb.SessionRequest]) -> None:
        engine = self._engine
        async for message in messages:
            now = time.monotonic()
            for wire_id in message.abort:
                engine.put(functools.partial(engine.abort, session, wire_id))
            for submit in message.submit:
                if not self.accepting:
                    refused = pb.SessionUpdate()
                    refused.endings.add(
                        id=submit.id,
                        reason="error",
                        error_kind=Unavailable.__name__,
                        error="this replica is draining",
                    )
                    session.put(refused)
                    continue
                engine.put(functools.partial(engine.submit, session, submit, now))
            for piece in message.images:
                session.images.setdefault(piece.key, bytearray()).extend(piece.data)
                if piece.last:
                    inputs = await asyncio.to_thread(image_from_bytes, session.images.pop(piece.key))
                    engine.put(functools.partial(engine.provide, piece.key, inputs))
            if message.why:
                engine.put(functools.partial(engine.why, session, list(message.why)))

    async def _beat(self, session: GatewaySession) -> None:
        while True:
            session.put(pb.SessionUpdate(load=self._engine.load()))
            await asyncio.sleep(_HEARTBEAT)

    async def hang_up(self, failure: str = "") -> None:
        """Ends every session, and says why; returns when gateways have been told, or do not listen."""
        for session in self._sessions:
            if failure:
                session.put(pb.SessionUpdate(failure=failure))
            session.updates.put_nowait(None)
        until = time.monotonic() + _LAST_WORDS
        while self._sessions and time.monotonic() < until:
            await asyncio.sleep(0.005)


def session_server(service: EngineService, secret: str) -> grpc.aio.Server:
    """For who sends `secret`. A gateway that vanished without a word is found, and its requests end."""
    server = grpc.aio.server(
        interceptors=[CallerCheck(SharedKeys(Keys([secret]), "sessions are for this cluster's gateways"))],
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            *KEEPALIVE,
        ],
    )
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    return server


def merged(update: pb.SessionUpdate, waiting: "asyncio.Queue[pb.SessionUpdate | None]") -> pb.SessionUpdate:
    """This update and those that wait behind it as one, up to BATCH_BYTES and one more: a gateway that lags gets fewer,
    larger messages."""
    size = update.ByteSize()
    while size < BATCH_BYTES and not waiting.empty():
        following = waiting.get_nowait()
        if following is None:
            waiting.put_nowait(None)
            break
        if following.HasField("load"):
            update.ClearField("load")  # merging would keep the old value of what is 0 now
        update.MergeFrom(following)
        size += following.ByteSize()
    return update
