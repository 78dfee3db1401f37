"""The gateway's end of the sessions with replicas: opened again as long as a replica is wanted, and bounded in what is
sent at once."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
from quire_engine.errors import EngineFailure, InvalidParameter, QuireError
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

from quire_cluster.convert import KEEPALIVE, MESSAGE_BYTES
from quire_cluster.gateway.generation import Choice
from quire_cluster.keys import bearer
from quire_cluster.policies.routing import ReplicaLoad, Unreported
from quire_cluster.policies.suspicion import Patience, Silence, Standing
from quire_cluster.routing_table import ReplicaEntry

log = logging.getLogger(__name__)
_PAUSES = (0.05, 2.0)  # seconds before it is opened again: the first, and the longest
_LARGEST_SUBMIT = MESSAGE_BYTES // 2
_BATCH_BYTES = 1 << 18  # from which on nothing more is put into a message: the event loop waits while it is built
_MOST_SUBMITS = 32  # likewise
_PIECE = 1 << 20  # bytes of an image in a message
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, without the pauses that gRPC itself would make
    *KEEPALIVE,
]
_wire_ids = itertools.count(1)  # never used twice, so that what a stale submission says meets no choice


class SessionListener(Protocol):
    """Whom a session tells."""

    def updated(self, session: "ReplicaSession", update: pb.SessionUpdate) -> None:
        """A message of the replica."""

    def reported(self, session: "ReplicaSession") -> None:
        """Its load is a new one."""

    def failed(self, session: "ReplicaSession", wire_id: int, error: QuireError) -> None:
        """Something that a choice needs cannot be brought to the replica."""

    def lost(self, session: "ReplicaSession", choices: list[tuple[Choice, bool]], failure: str) -> None:
        """It broke: the choices that were there, and whether the replica had taken them into a step. `failure`: what
        the replica said of it, if it did."""

    def ended(self, session: "ReplicaSession") -> None:
        """It is not opened again."""


class ReplicaSession:
    """With one replica. What is sent while it is not open waits until it is."""

    def __init__(self, entry: ReplicaEntry, listener: SessionListener, patience: Patience) -> None:
        self.entry = entry
        self.key = entry.key
        self.live: dict[int, Choice] = {}  # wire id → choice
        self.begun: set[int] = set()  # wire ids that the replica has taken into a step
        self.suspect: Choice | None = None  # the one that may kill it
        self.silence = Silence(patience)
        self.load = pb.Load()
        self.open = False  # the replica has said something
        self.draining = False  # it takes nothing new
        self.wanted = True
        self._own_at_report = 0
        self._unreported = Unreported()
        self._failure = ""
        self._listener = listener
        self._submits: deque[int] = deque()
        self._aborts: list[int] = []
        self._pieces: deque[pb.ImagePiece] = deque()  # of images that the replica wants
        self._bringing: set[asyncio.Task[None]] = set()
        self._questions: list[int] = []  # wire ids whose wait is to be asked for
        self._asked: dict[int, asyncio.Future[pb.Waiting | None]] = {}  # those without an answer
        self._work = asyncio.Event()
        self._attempt: asyncio.Task[None] | None = None
        self._task = asyncio.ensure_future(self._run())

    @property
    def usable(self) -> bool:
        """Whether something new may be sent there."""
        return self.open and self.wanted and not (self.draining or self.entry.draining)

    @property
    def unproven(self) -> bool:
        """Whether something may be there that has done no step, or only its first ones."""
        return any(not choice.losses.proven(len(choice.output)) for choice in self.live.values())

    def as_load(self) -> ReplicaLoad:
        """What routing asks."""
        return ReplicaLoad(
            own=len(self.live),
            reported=self.load.running + self.load.waiting,
            own_at_report=self._own_at_report,
            most=self.load.most_requests,
            queued=self.load.queued_tokens + self._unreported.tokens,
            pages=self.load.pages_total,
            avoided=self.silence.standing is not Standing.GOOD,
        )

    def submit(self, choice: Choice, tokens: int) -> int:
        """Sends a choice; its wire id. The message is built when it can go, so that nothing large waits. `tokens`: of
        its log, those that the replica will have to compute."""
        wire_id = next(_wire_ids)
        self.live[wire_id] = choice
        self._unreported.sent(wire_id, tokens)
        self._submits.append(wire_id)
        self._work.set()
        return wire_id

    def ask(self, wire_id: int) -> "asyncio.Future[pb.Waiting | None]":
        """What a live choice waits for, in the replica's words; None when it is gone before they come. One question is
        under way for a choice, whoever asks."""
        if wire_id not in self._asked:
            self._asked[wire_id] = asyncio.get_running_loop().create_future()
            self._questions.append(wire_id)
            self._work.set()
        return self._asked[wire_id]

    def _answer(self, wire_id: int, waiting: pb.Waiting | None) -> None:
        question = self._asked.pop(wire_id, None)
        if question is not None and not question.done():
            question.set_result(waiting)

    def release(self, wire_id: int, *, tell: bool) -> None:
        """A choice is done with. `tell`: the replica does not know."""
        self.live.pop(wire_id, None)
        self.begun.discard(wire_id)
        self._unreported.gone(wire_id)
        self._answer(wire_id, None)
        if tell and self.open:
            self._aborts.append(wire_id)
            self._work.set()

    def drop(self) -> None:
        """Breaks it, to be opened again if the replica is wanted."""
        if self._attempt is not None:
            self._attempt.cancel()

    async def close(self) -> None:
        """Hangs up for good; nobody is told."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    # ---- the stream -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        first, longest = _PAUSES
        pause = first
        try:
            while self.wanted:
                self._attempt = asyncio.ensure_future(self._once())
                await asyncio.wait((self._attempt,))
                pause = first if self.open else min(2 * pause, longest)
                self._lose()
                if self.wanted:
                    await asyncio.sleep(pause)
        finally:
            self.drop()
        self._listener.ended(self)

    async def _once(self) -> None:
        """One stream, until it breaks; why is logged."""
        try:
            async with grpc.aio.insecure_channel(self.entry.address, options=_OPTIONS) as channel:
                stub: Any = engine_pb2_grpc.EngineStub(channel)
                async for update in stub.Session(self._messages(), metadata=bearer(self.entry.secret)):
                    self._hear(update)
        except grpc.aio.AioRpcError as error:
            log.info("session with replica %d (epoch %d) broke: %s", *self.key[:2], error.code().name)
        except Exception:  # whatever it was, the session is opened again: without one the replica is lost to us
            log.exception("session with replica %d (epoch %d) failed", *self.key[:2])
        finally:
            self._work.set()
            self._work = asyncio.Event()

    def _hear(self, update: pb.SessionUpdate) -> None:
        self.silence.heard()
        self.open = True
        self.begun.update(started.id for started in update.started if started.id in self.live)
        for waiting in update.waiting:
            self._answer(waiting.id, waiting)
        for wanted in update.wanted:
            if (choice := self.live.get(wanted.id)) is not None:
                task = asyncio.ensure_future(self._bring(wanted.id, choice, wanted.key))
                self._bringing.add(task)
                task.add_done_callback(self._bringing.discard)
        self._failure = update.failure
        self._listener.updated(self, update)
        for wire_id in update.admitted:
            self._unreported.admitted(wire_id)
        if update.HasField("load"):
            self._unreported.reported()
            self.load, self._own_at_report = update.load, len(self.live)
            self._listener.reported(self)

    async def _bring(self, wire_id: int, choice: Choice, key: bytes) -> None:
        """Sends an image's pixels, in pieces. A choice whose image cannot be brought ends."""
        try:
            image = choice.facts.seen.of(key)
            if image is None:
                raise EngineFailure("a replica wants an image that the request does not have")
            pixels = memoryview(await image.pixels())
        except Exception as error:  # whatever it is, the request would wait for ever
            if not isinstance(error, QuireError):
                log.exception("an image of request %s cannot be brought", choice.facts.request_id)
                error = EngineFailure(f"an image could not be read again: {type(error).__name__}")
            self._listener.failed(self, wire_id, error)
            return
        for at in range(0, len(pixels), _PIECE):
            last = at + _PIECE >= len(pixels)
            self._pieces.append(pb.ImagePiece(key=key, data=bytes(pixels[at : at + _PIECE]), last=last))
        self._work.set()

    def _lose(self) -> None:
        for task in self._bringing:
            task.cancel()
        self._pieces.clear()
        choices = [(choice, wire_id in self.begun) for wire_id, choice in self.live.items()]
        failure = self._failure
        self.live, self.begun, self.suspect = {}, set(), None
        self.open, self.draining, self._failure = False, False, ""
        self.load, self._own_at_report, self._unreported = pb.Load(), 0, Unreported()
        self._submits.clear()
        self._aborts.clear()
        self._questions.clear()
        for wire_id in list(self._asked):
            self._answer(wire_id, None)
        self._listener.lost(self, choices, failure)

    async def _messages(self) -> AsyncIterator[pb.SessionRequest]:
        """What waits, in messages of bounded size. Ends with its stream, after which gRPC goes on asking for more."""
        work = self._work
        while self._work is work:
            if self._submits or self._aborts or self._questions or self._pieces:
                yield self._message()
            else:
                work.clear()
                await work.wait()

    def _message(self) -> pb.SessionRequest:
        message = pb.SessionRequest(abort=self._aborts)  # which the replica does first: they make room
        self._aborts.clear()
        size, now = 0, time.monotonic()  # one reading for all, as the replica has one: they keep their order
        while self._submits and size < _BATCH_BYTES and len(message.submit) < _MOST_SUBMITS:
            wire_id = self._submits.popleft()
            choice = self.live.get(wire_id)
            if choice is None:
                continue
            try:
                submit = choice.submission(wire_id, now)
            except (ValueError, TypeError) as error:  # a number that the protocol has no room for
                log.exception("request %s cannot be sent", choice.facts.request_id)
                self._refuse(wire_id, EngineFailure(f"the request cannot be sent to a replica: {error}"))
                continue
            size += submit.ByteSize()
            if submit.ByteSize() <= _LARGEST_SUBMIT:
                message.submit.append(submit)
            else:
                why = f"the request takes {submit.ByteSize()} bytes; at most {_LARGEST_SUBMIT} reach a replica"
                self._refuse(wire_id, InvalidParameter(why))
        if self._pieces:
            message.images.append(self._pieces.popleft())
        if not self._submits:  # a replica is asked about what it has
            message.why.extend(self._questions)
            self._questions.clear()
        return message

    def _refuse(self, wire_id: int, error: QuireError) -> None:
        """Here, as a replica would."""
        ending = pb.Ending(id=wire_id, reason="error", error_kind=type(error).__name__, error=str(error))
        self._listener.updated(self, pb.SessionUpdate(endings=[ending]))
