"""A replica without an engine: it speaks the engine's protocol over real sockets, and misbehaves as it is told to."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from quire_cluster.convert import KEEPALIVE, MESSAGE_BYTES
from quire_cluster.routing_table import ReplicaEntry
from quire_protos.v1 import engine_pb2 as pb
from quire_protos.v1 import engine_pb2_grpc

Updates = asyncio.Queue[pb.SessionUpdate | None]
_slots = itertools.count()


def token_at(prompt: list[int], index: int) -> int:
    """What the model says: a function of prompt and place, so that a resumed answer can be told from another."""
    return 4 + (sum(prompt) + 7 * index) % 50


class FakeReplica(engine_pb2_grpc.EngineServicer):
    """Answers at once, a token a message, unless `holds` says of a submission that it gets no further than its start.
    `deadly`: what kills it, by a submission and how many tokens it has."""

    def __init__(self, *, most_requests: int = 1000, slot: int | None = None) -> None:
        self.most_requests = most_requests
        self.slot = next(_slots) if slot is None else slot
        self.submitted: list[pb.Submit] = []
        self.aborted: list[int] = []
        self.message_sizes: list[int] = []
        self.ponders: Callable[[pb.Submit], bool] = lambda submit: False  # whether to take it at all
        self.holds: Callable[[pb.Submit], bool] = lambda submit: False
        self.deadly: Callable[[pb.Submit, int], bool] = lambda submit, length: False
        self.refuses: Callable[[pb.Submit], pb.Ending | None] = lambda submit: None
        self.waits: Callable[[int], pb.Waiting | None] = lambda wire_id: pb.Waiting(id=wire_id)  # None: no answer
        self.questions: list[int] = []
        self.prefill_rate = 0.0
        self.waiting_for: dict[str, int] = {}
        self.last_words = "a worker process died"
        self.cached: Callable[[pb.Submit], int] = lambda submit: 0  # tokens of its prompt
        self.block_size = 0  # tokens; 0: it does not say
        self.silent = False
        self.step_age = 0.0  # seconds without a step, while it is busy
        self.num_sessions = 0
        self.alive = True
        self.deaths = 0
        self.port = 0
        self._sessions: list[Updates] = []
        self._running: set[int] = set()
        self._server: Any = None

    async def start(self) -> "FakeReplica":
        """Listens."""
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES), *KEEPALIVE]
        self._server = grpc.aio.server(options=options)
        engine_pb2_grpc.add_EngineServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    def entry(self, *, epoch: int = 1, load_seconds: float = 0.0) -> ReplicaEntry:
        """Its line of the table."""
        return ReplicaEntry(self.slot, epoch, f"127.0.0.1:{self.port}", 4096, load_seconds)

    def die(self, last_words: str = "") -> None:
        """Its sessions end, after its last words, and no other begins until it is `alive` again."""
        self.alive = False
        self.deaths += 1
        for updates in self._sessions:
            if last_words:
                updates.put_nowait(pb.SessionUpdate(failure=last_words))
            updates.put_nowait(None)

    async def stop(self) -> None:
        """The process ends: connections are reset."""
        self.alive = False
        await self._server.stop(0)

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionUpdate]:
        """Until the gateway hangs up, or it dies."""
        if not self.alive:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "dead")
        self.num_sessions += 1
        updates: Updates = asyncio.Queue()
        self._sessions.append(updates)
        tasks = [asyncio.ensure_future(work) for work in (self._read(request_iterator, updates), self._beat(updates))]
        try:
            while (update := await updates.get()) is not None:
                while self.silent:
                    await asyncio.sleep(0.01)
                yield update
        finally:
            self._sessions.remove(updates)
            self._running.clear()
            for task in tasks:
                task.cancel()

    async def _beat(self, updates: Updates) -> None:
        while True:
            load = pb.Load(running=len(self._running), most_requests=self.most_requests, block_size=self.block_size)
            load.prefill_rate = self.prefill_rate
            load.waiting_for.update(self.waiting_for)
            load.busy, load.step_age = self.step_age > 0, self.step_age
            updates.put_nowait(pb.SessionUpdate(load=load))
            await asyncio.sleep(0.02)

    async def _read(self, messages: AsyncIterator[pb.SessionRequest], updates: Updates) -> None:
        answers: list[asyncio.Future[None]] = []
        with contextlib.suppress(asyncio.CancelledError):
            async for message in messages:
                self.message_sizes.append(message.ByteSize())
                self.aborted += message.abort
                self._running -= set(message.abort)
                for submit in message.submit:
                    self.submitted.append(submit)
                    answers.append(asyncio.ensure_future(self._answer(submit, updates)))
                self.questions += message.why
                known = set(message.why) & {submit.id for submit in self.submitted}
                waiting = [wait for wire_id in known if (wait := self.waits(wire_id)) is not None]
                updates.put_nowait(pb.SessionUpdate(waiting=waiting))
        for answer in answers:
            answer.cancel()

    async def _answer(self, submit: pb.Submit, updates: Updates) -> None:
        while self.ponders(submit):
            await asyncio.sleep(0.01)
        if (refusal := self.refuses(submit)) is not None:
            updates.put_nowait(pb.SessionUpdate(endings=[refusal]))
            return
        self._running.add(submit.id)
        updates.put_nowait(pb.SessionUpdate(admitted=[submit.id]))
        updates.put_nowait(pb.SessionUpdate(started=[pb.Started(id=submit.id, cached_tokens=self.cached(submit))]))
        for index in range(len(submit.output), submit.sampling.max_tokens):
            if self.deadly(submit, index):
                self.die(self.last_words)
            while submit.id in self._running and (self.holds(submit) or not self.alive):
                await asyncio.sleep(0.01)
            if submit.id not in self._running:
                return
            token = token_at(list(submit.prompt), index)
            updates.put_nowait(pb.SessionUpdate(ids=[submit.id], indexes=[index], tokens=[token]))
            await asyncio.sleep(0.002)
        self._running.discard(submit.id)
        updates.put_nowait(pb.SessionUpdate(endings=[pb.Ending(id=submit.id, reason="length")]))
