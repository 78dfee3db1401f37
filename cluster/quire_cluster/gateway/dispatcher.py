"""Carries choices to replicas and back: one session per replica, and another replica when one is lost."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
import numpy as np
from quire_engine.errors import DeadlineExceeded, EngineFailure, QuireError, Unavailable
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

from quire_cluster.convert import MESSAGE_BYTES, error_from_proto, logprobs_from_proto
from quire_cluster.gateway.generation import Choice, Generation
from quire_cluster.policies.routing import ReplicaLoad, choose_replica
from quire_cluster.routing_table import Key, ReplicaEntry, RoutingTable

log = logging.getLogger(__name__)
_REPLICA_WAIT = 120.0  # seconds a request waits while no replica is there (one is being rebuilt)


class ReplicaSession:
    """The gateway's end of one session. `lost` is called once, with the choices that were running there."""

    def __init__(
        self,
        entry: ReplicaEntry,
        on_update: Callable[["ReplicaSession", pb.SessionUpdate], None],
        on_lost: Callable[["ReplicaSession"], None],
    ) -> None:
        self.entry = entry
        self.key: Key = entry.key
        self.live: dict[int, Choice] = {}  # wire id → choice
        self.load = pb.Load()
        self.load_at = time.monotonic()
        self.own_at_report = 0
        self.closed = False
        self._on_update = on_update
        self._on_lost = on_lost
        self._outbox: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run())

    def send(self, message: pb.SessionRequest) -> None:
        """Queues a message; all that wait go as one."""
        self._outbox.put_nowait(message)

    async def close(self) -> None:
        """Hangs up."""
        self.closed = True
        self._outbox.put_nowait(None)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _messages(self) -> AsyncIterator[pb.SessionRequest]:
        while (message := await self._outbox.get()) is not None:
            while not self._outbox.empty():
                following = self._outbox.get_nowait()
                if following is None:
                    return
                message.MergeFrom(following)
            yield message

    async def _run(self) -> None:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.enable_http_proxy", 0),
        ]
        try:
            async with grpc.aio.insecure_channel(self.entry.address, options=options) as channel:
                stub: Any = engine_pb2_grpc.EngineStub(channel)
                async for update in stub.Session(self._messages()):
                    self._on_update(self, update)
        except grpc.aio.AioRpcError as error:
            log.info("session with replica %d (epoch %d) broke: %s", *self.key[:2], error.code().name)
        finally:
            if not self.closed:
                self.closed = True
                self._on_lost(self)


class Dispatcher:
    """Keeps a session per replica of the routing table, and every live choice on one of them."""

    def __init__(self, on_load: Callable[[ReplicaSession], None], on_steps: Callable[[list[int]], None]) -> None:
        self._sessions: dict[Key, ReplicaSession] = {}
        self._homeless: dict[Choice, float] = {}  # choices that wait for a replica → since when
        self._wire_ids = itertools.count(1)
        self._turn = itertools.count()
        self._place: dict[Choice, tuple[ReplicaSession, int]] = {}
        self._on_load = on_load
        self._on_steps = on_steps
        self._sweeper: asyncio.Task[None] | None = None
        self.max_model_len = 0

    # ---- replicas come and go -------------------------------------------------------------------------------------

    @property
    def sessions(self) -> list[ReplicaSession]:
        """Of the replicas that can be routed to."""
        return list(self._sessions.values())

    @property
    def num_live(self) -> int:
        """Choices without an ending."""
        return len(self._place) + len(self._homeless)

    def update_table(self, table: RoutingTable) -> None:
        """Opens sessions to new replicas; a replica that left the table is left when its session breaks."""
        for entry in table.replicas:
            key = entry.key
            if key not in self._sessions:
                self._sessions[key] = ReplicaSession(entry, self._handle, self._lost)
                self.max_model_len = entry.max_model_len
        wanted = {entry.key for entry in table.replicas}
        for key in [key for key in self._sessions if key not in wanted]:
            self._forget(self._sessions[key])
        self._place_homeless()

    async def close(self) -> None:
        """Hangs up everywhere."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*(session.close() for session in self.sessions))
        self._sessions.clear()

    # ---- requests -------------------------------------------------------------------------------------------------

    def submit(self, generation: Generation) -> None:
        """Sends every choice to a replica; one that finds none waits for it. Raises Unavailable before the first."""
        if not self._sessions and not self.max_model_len:
            raise Unavailable("no replica is ready yet; try again when /ready answers 200")
        for choice in generation.choices:
            self._guard(choice, self._send)

    def abort(self, generation: Generation) -> None:
        """The client left: ends what is not ended."""
        for choice in generation.choices:
            if not choice.ended:
                choice.end("abort")
            self._homeless.pop(choice, None)
            self._release(choice, tell=True)

    def _send(self, choice: Choice) -> None:
        loads = {
            key: ReplicaLoad(
                own=len(session.live),
                reported=session.load.running + session.load.waiting,
                own_at_report=session.own_at_report,
            )
            for key, session in self._sessions.items()
        }
        chosen = choose_replica(loads, next(self._turn))
        if chosen is None:
            self._homeless[choice] = time.monotonic()
            if self._sweeper is None or self._sweeper.done():
                self._sweeper = asyncio.ensure_future(self._sweep())
            return
        session = self._sessions[chosen]
        wire_id = next(self._wire_ids)
        choice.epoch += 1
        session.live[wire_id] = choice
        self._place[choice] = (session, wire_id)
        session.send(pb.SessionRequest(submit=[choice.submission(wire_id)]))

    def _release(self, choice: Choice, *, tell: bool) -> None:
        session, wire_id = self._place.pop(choice, (None, 0))
        if session is not None:
            session.live.pop(wire_id, None)
            if tell and not session.closed:
                session.send(pb.SessionRequest(abort=[wire_id]))

    # ---- what replicas say ----------------------------------------------------------------------------------------

    def _handle(self, session: ReplicaSession, update: pb.SessionUpdate) -> None:
        """One message of a replica. Wire ids are never reused, so what a stale submission says meets no choice."""
        now = time.monotonic()
        for scores in update.logprobs:
            self._tell(session, scores.id, partial(_take_scores, scores=scores))
        for vector in update.vectors:
            self._tell(session, vector.id, partial(_take_vector, values=vector.values))
        for wire_id, index, token in zip(update.ids, update.indexes, update.tokens, strict=True):
            self._tell(session, wire_id, partial(Choice.accept, index=index, token=token, now=now))
        for started in update.started:
            self._tell(session, started.id, partial(Choice.start, cached_tokens=started.cached_tokens, now=now))
        for ending in update.endings:
            self._tell(session, ending.id, partial(self._finish, ending=ending))
        if update.step_tokens:
            self._on_steps(list(update.step_tokens))
        if update.HasField("load"):
            session.load, session.load_at, session.own_at_report = update.load, now, len(session.live)
            self._on_load(session)

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

    def _finish(self, choice: Choice, ending: pb.Ending) -> None:
        self._release(choice, tell=False)
        if ending.error_kind == Unavailable.__name__:  # refused by a replica that drains: another one takes it
            self._send(choice)
        elif ending.error_kind:
            choice.end("error", error=error_from_proto(ending.error_kind, ending.error))
        else:
            stop = ending.stop_token_id if ending.HasField("stop_token_id") else None
            choice.end(ending.reason, stop_reason=stop)

    def _forget(self, session: ReplicaSession) -> None:
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]

    def _lost(self, session: ReplicaSession) -> None:
        """A replica is gone: its choices go on elsewhere, from their logs."""
        self._forget(session)
        moved = list(session.live.values())
        session.live.clear()
        if moved:
            log.warning("replica %d (epoch %d) is lost; %d requests go on elsewhere", *session.key[:2], len(moved))
        for choice in moved:
            self._place.pop(choice, None)
            self._guard(choice, self._send)

    def _place_homeless(self) -> None:
        if self._sessions:
            waiting, self._homeless = list(self._homeless), {}
            for choice in waiting:
                self._guard(choice, self._send)

    async def _sweep(self) -> None:
        """Ends what has waited too long for a replica, or past its own deadline."""
        while self._homeless:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            for choice, since in list(self._homeless.items()):
                if choice.facts.deadline and choice.facts.deadline <= time.time():
                    del self._homeless[choice]
                    choice.end("error", error=DeadlineExceeded("the deadline passed before the end"))
                elif now - since > _REPLICA_WAIT:
                    del self._homeless[choice]
                    choice.end("error", error=Unavailable("no replica came back in time; try again"))


def _take_scores(choice: Choice, scores: pb.TopLogprobs) -> None:
    values = logprobs_from_proto(scores)
    if scores.prompt:
        choice.accept_prompt_logprobs(scores.first, values)
    else:
        choice.accept_logprobs(values)


def _take_vector(choice: Choice, values: bytes) -> None:
    choice.vector = np.frombuffer(values, "<f4")
