"""The parts between processes, each by itself."""

import asyncio
import math
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from conftest import channels
from quire_cluster.channel import ChannelClosed, StepChannel, encoded
from quire_cluster.convert import (
    logprobs_from_proto,
    logprobs_to_proto,
    request_from_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from quire_cluster.gateway.doors import BodyCheck
from quire_cluster.keys import key_in, read_keys
from quire_cluster.policies.lease import LEAST, UNKNOWN, StepLease, more_patience
from quire_cluster.wire import from_bytes, image_from_bytes, image_to_bytes, to_bytes
from quire_cluster.workers import first_failure
from quire_engine.errors import InvalidParameter, OutOfMemory, QuireError, Unavailable
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.request import EngineSampling, ImageSpan, TokenSet
from quire_engine.step import Encode, NewRow, StepImages, StepPlan, StepResult, TokenLogprobs
from quire_protos.v1 import engine_pb2 as pb
from ray.exceptions import ActorDiedError


def test_the_channel_between_two_processes() -> None:
    """Whole messages in order, small and large, with the reader asleep or awake."""
    channel = StepChannel.create()
    echo = (
        "import sys\n"
        "from quire_cluster.channel import ChannelClosed, StepChannel\n"
        "channel = StepChannel.open(sys.argv[1])\n"
        "try:\n"
        "    while True: channel.send_result(channel.receive_plan())\n"
        "except ChannelClosed: print('closed')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", echo, channel.path], stdout=subprocess.PIPE, text=True)
    generator = np.random.default_rng(0)
    for number in range(300):
        message = (number, generator.integers(0, 9, int(10 ** generator.uniform(0, 6))))
        channel.send_plan(message)
        back = channel.receive_result(lambda: other.poll() is None)
        assert back[0] == number
        assert np.array_equal(back[1], message[1])
    channel.close()
    assert other.communicate(timeout=120)[0] == "closed\n"


def test_a_dead_other_side_is_noticed() -> None:
    channel = StepChannel.create()
    alive = threading.Event()
    alive.set()
    threading.Timer(0.1, alive.clear).start()
    with pytest.raises(ChannelClosed, match="gone"):
        channel.receive_result(alive.is_set)


def test_a_message_of_any_size_goes_through_and_leaves_no_memory() -> None:
    channel = StepChannel.create()
    reader = StepChannel.open(channel.path)
    before = len(channels())
    for size in (65 << 20, 10, 3 << 20, 1 << 20, 2 << 20, *range(8)):
        sent = np.full(size, 7, np.uint8)
        channel.send_plan(sent)
        assert np.array_equal(reader.receive_plan(), sent)
        reader.send_result(sent)
        assert np.array_equal(channel.receive_result(), sent)
    assert len(channels()) == before


def test_a_closed_channel_leaves_no_descriptor() -> None:
    """Nor does one that nobody closed; what was large and unread is gone."""
    before = channels()
    for closed in (True, False):
        channel = StepChannel.create()
        reader = StepChannel.open(channel.path)
        for _ in range(3):
            channel.send_plan(np.zeros(2 << 20, np.uint8))
        if closed:
            channel.close()
            channel.close()
            with pytest.raises(ChannelClosed, match="gone"):
                reader.receive_plan()
        del channel, reader
        assert channels() == before


@pytest.mark.parametrize("kind", ["allowed", "penalized"])
def test_a_step_of_the_largest_rows_is_carried(kind: str) -> None:
    """128 rows that may draw nearly any of 300,000 tokens, which takes 0.6 MB to ask for; 100 that are penalized for
    131,072 tokens each."""
    if kind == "allowed":
        params = EngineSampling(allowed_token_ids=TokenSet.of(range(0, 300_000, 2)))
        rows = [NewRow(row, params, 1, np.zeros(0, np.int32)) for row in range(128)]
        assert len(encoded(rows)) < 1 << 20, "as one row: what is the same for all goes once"
        fresh = [sampling_from_proto(sampling_to_proto(params)) for _ in range(128)]
        assert all(one == params for one in fresh)
        rows = [NewRow(row, one, 1, np.zeros(0, np.int32)) for row, one in enumerate(fresh)]
        assert len(encoded(rows)) < 6 << 20
    else:
        rows = [NewRow(row, EngineSampling(), 131_072, np.full(131_072, row, np.int32)) for row in range(100)]
    plan = StepPlan.empty()
    plan.new_rows = rows
    channel = StepChannel.create()
    channel.send_plan(plan)
    [first, *_, last] = channel.receive_plan().new_rows
    assert np.array_equal(first.tokens, rows[0].tokens)
    assert np.array_equal(last.tokens, rows[-1].tokens)
    assert last.params == rows[-1].params


def test_what_guides_many_requests_goes_to_the_workers_once() -> None:
    sent = sampling_to_proto(EngineSampling(guidance="a long description " * 5000)).SerializeToString()
    fresh = [sampling_from_proto(pb.EngineSampling.FromString(sent)) for _ in range(64)]
    rows = [NewRow(row, one, 1, np.zeros(0, np.int32)) for row, one in enumerate(fresh)]
    assert len(encoded(rows)) < 200_000


def test_every_sampling_parameter_survives_the_wire() -> None:
    """A field added to the engine's parameters and forgotten on the wire fails here."""
    params = EngineSampling(
        max_tokens=7,
        min_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        presence_penalty=-1.5,
        frequency_penalty=0.75,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        stop_token_ids=(2, 5),
        logprobs=0,
        prompt_logprobs=4,
        logit_bias={3: -2.0},
        allowed_token_ids=TokenSet.of((1, 2)),
        bad_words=((4,), (5, 6)),
        guidance=GuidanceSpec(content="{}").to_json(),
    )
    plain = EngineSampling()
    differing = [name for name in EngineSampling.__slots__ if getattr(params, name) != getattr(plain, name)]
    assert differing == list(EngineSampling.__slots__), "the example must set every field"
    for one in (params, plain):
        submit = pb.Submit(id=1, prompt=[1, 2], output=[3], sampling=sampling_to_proto(one), cache_salt=b"x")
        submit.time_left, submit.age, submit.resumed = 3.0, 0.5, True
        request = request_from_proto(pb.Submit.FromString(submit.SerializeToString()), 9, 10.0)
        assert request.params == one
        assert (request.tokens, request.num_prompt, request.cache_salt) == ([1, 2, 3], 2, b"x")
        assert (request.deadline, request.arrival, request.resumed) == (13.0, 9.5, True)


def test_logprobs_survive_the_wire() -> None:
    generator = np.random.default_rng(0)
    scores = TokenLogprobs(
        generator.integers(0, 9, 3, np.int32),
        generator.random(3, np.float32),
        generator.integers(1, 9, 3, np.int32),
        generator.integers(0, 9, (3, 5), np.int32),
        generator.random((3, 5), np.float32),
    )
    message = logprobs_to_proto(4, scores, prompt=True)
    back = logprobs_from_proto(pb.TopLogprobs.FromString(message.SerializeToString()))
    for name in TokenLogprobs.__slots__:
        assert np.array_equal(getattr(back, name), getattr(scores, name))


def same(one: Any, other: Any) -> bool:
    """Equal, arrays by content and type, whatever they are in."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.flags.writeable == other.flags.writeable and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)


def test_steps_survive_the_way_between_hosts() -> None:
    generator = np.random.default_rng(0)

    def ints(count: int) -> Any:
        return generator.integers(-1, 1 << 30, count, np.int32)

    params = EngineSampling(
        seed=2**64 - 1,
        logit_bias={3: -2.5},
        bad_words=((4,), (5, 6)),
        allowed_token_ids=TokenSet.of((1, 9)),
        top_p=0.1,
        guidance=GuidanceSpec(content='{"é": 1}').to_json(),
    )
    image = ImageSpan(b"\x00\xff", 2, 6, 2, 3)
    rows = [NewRow(3, params, 7, ints(3), (image,)), NewRow(0, EngineSampling(), 1, ints(0))]
    kinds = (np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)
    inputs = {np.dtype(kind).name: np.ones((2, 3), kind) for kind in kinds}
    images = StepImages(ints(2), [Encode(4, b"\xfe", 6, inputs)], ints(6), ints(3)[None], ints(4)[None])
    arrays = (ints(4) for _ in range(10))
    plan = StepPlan(ints(3), ints(3), ints(3), ints(9), ints(3), *arrays, new_rows=rows, images=images)
    none = np.zeros((2, 0), np.float32)
    scores = TokenLogprobs(ints(2), generator.random(2, np.float32), ints(2), none.astype(np.int32), none)
    vectors = generator.random((3, 2), np.float32)
    result = StepResult(ints(3), {5: scores}, {0: scores}, {7: "no token is left"}, vectors)
    unseen = StepResult(ints(1), encoder_seconds=0.5, unseen={b"\xfe": "it broke"})
    assert same(image_from_bytes(image_to_bytes(inputs)), inputs)
    for message in (plan, StepPlan.empty(), result, unseen):
        assert same(from_bytes(to_bytes(message)), message)
        with pytest.raises(ValueError):
            from_bytes(to_bytes(message)[:-1])
    for foreign in (msgpack.packb(msgpack.ExtType(99, b"")), pickle.dumps(plan), b""):
        with pytest.raises((ValueError, IndexError, TypeError)):
            from_bytes(foreign)
    with pytest.raises(ValueError):
        to_bytes(open)


RELAY = """
import sys, torch.distributed as dist
from quire_cluster.channel import ChannelClosed, StepChannel
from quire_cluster.relay import RelayingChannel, RemoteChannel
from quire_engine.step import Encode, StepImages, StepPlan, StepResult
import numpy as np
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
group = dist.new_group(backend="gloo")
if rank:
    channel = RemoteChannel(group)
    try:
        while True:
            channel.send_result(StepResult(channel.receive_plan().token_ids))
    except ChannelClosed as closed:
        print(closed)
else:
    replica = StepChannel.create()
    relay = RelayingChannel(StepChannel.open(replica.path), group, [1], 1)
    for size in (0, 1, 16_000, 17_000, 1_000_000):
        plan = StepPlan.empty()
        plan.token_ids = np.arange(size, dtype=np.int32)
        replica.send_plan(plan)
        assert np.array_equal(relay.receive_plan().token_ids, plan.token_ids)
        assert np.array_equal(replica.receive_result().tokens, plan.token_ids)
    replica.close()
    try:
        relay.receive_plan()
    except ChannelClosed:
        print("closed")
"""


def test_a_step_s_way_to_another_host_and_back(tmp_path: Path) -> None:
    """Small and large, until the replica closes."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RELAY, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in reversed(ranks)]
    assert said == ["rank 0 closed the relay\n", "closed\n"]


def test_bodies_are_bounded_together() -> None:
    """What is being read counts, not what was read or given up; who comes too late is told to try again."""

    async def held_back(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    check = BodyCheck(held_back, held=100)
    scope = {"type": "http", "headers": []}

    def sender(*parts: tuple[int, bool], then: asyncio.Event | None = None) -> Any:
        messages = [{"type": "http.request", "body": b"x" * size, "more_body": more} for size, more in parts]

        async def receive() -> Any:
            if len(messages) == 1 and then is not None:
                await then.wait()
            return messages.pop(0)

        return receive

    async def run() -> None:
        end = asyncio.Event()
        first = asyncio.ensure_future(check(scope, sender((60, True), (0, False), then=end), print))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="try again"):
            await check(scope, sender((30, True), (30, True)), print)
        await check(scope, sender((30, True), (10, True), (1000, False)), print)
        end.set()
        await first
        gone = asyncio.ensure_future(check(scope, sender((90, True), (0, False), then=asyncio.Event()), print))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        await check(scope, sender((100, True), (0, False)), print)

    asyncio.run(run())


def test_where_a_key_is_sent() -> None:
    for authorization, api_key in (
        (["Bearer k"], []),
        (["bearer k"], []),
        (["BEARER  k "], []),
        ([], ["k"]),
        ([], [" k"]),
        (["Bearer k"], ["k"]),
    ):
        assert key_in(authorization, api_key) == "k", (authorization, api_key)
    for authorization, api_key in (
        ([], []),
        (["k"], []),
        (["Basic k"], []),
        (["Bearer"], []),
        (["Basic k"], ["k"]),
        (["Bearer k"], ["other"]),
        (["Bearer k", "Bearer k"], []),
        ([], ["k", "k"]),
        ([""], ["k"]),
    ):
        assert key_in(authorization, api_key) == "", (authorization, api_key)


def test_keys(tmp_path: Path) -> None:
    several, none = tmp_path / "several", tmp_path / "none"
    several.write_text("one\n\n two \n")
    none.write_text("\n")
    variable = {"QUIRE_API_KEY": "three"}
    assert read_keys(None, None, {}) is None, "everybody"
    for key, file, environment, good, bad in (
        ("zero", None, variable, ["zero"], ["three", ""]),
        (None, str(several), variable, ["one", "two"], ["three", "", "one two"]),
        (None, None, variable, ["three"], ["", "Three"]),
    ):
        keys = read_keys(key, file, environment)
        assert keys is not None
        assert all(map(keys.match, good))
        assert not any(map(keys.match, bad))
    for key, file, environment, named in (
        ("", None, {}, "--api-key holds an empty key"),
        ("a b", None, {}, "with spaces"),
        ("schlüssel", None, {}, "other than ASCII"),
        ("a", str(several), {}, "either --api-key or --api-key-file"),
        (None, "/nowhere", {}, "--api-key-file cannot be read"),
        (None, "/dev/zero", {}, "has more than 1048576 bytes"),
        (None, str(none), {}, "has no key; write one a line"),
        (None, None, {"QUIRE_API_KEY": ""}, "QUIRE_API_KEY holds an empty key"),
    ):
        with pytest.raises(InvalidParameter, match=named):
            read_keys(key, file, environment)


class Clock:
    """A lease, and workers of which each step shows signs of life at given times; the lease is asked every 50 ms."""

    def __init__(self, patience: float = 1.0) -> None:
        self.lease = StepLease(patience)
        self.now = 0.0
        self.signs = [0, 0]

    def step(self, tokens: int, context: int, pauses: list[float], *, answers: bool = True) -> float:
        """A step in which signs of life come after each of the pauses, and the result after the last (or never).
        Returns the seconds until the second rank was said to hang; 0: it came back."""
        self.lease.submit(self.now, tokens, tokens * context)
        self.lease.begin()
        begun = self.now
        self.signs[0] += 1  # the other rank is behind until the end
        for number, pause in enumerate(pauses):
            until = self.now + pause if answers or number < len(pauses) - 1 else math.inf
            while self.now < until:
                if (behind := self.lease.check(self.now, self.signs)) is not None:
                    assert behind == 1
                    return self.now - begun
                self.now = min(self.now + 0.05, until)
            self.signs[0] += 1
        self.signs[1] = self.signs[0]
        self.lease.end(self.now)
        return 0.0

    def hang(self, tokens: int, context: int) -> float:
        """Seconds until a step that never comes back is said to hang."""
        return self.step(tokens, context, [0.0], answers=False)


def test_a_lease_runs_out_when_nothing_moves() -> None:
    clock = Clock()
    assert clock.step(100, 50, [50.0]) == 0, "the first step may compile and page in"
    for number in range(30):
        assert clock.step(1, 100 + number, [0.01]) == 0
    clock.now += 1000.0  # idle
    assert LEAST <= clock.hang(1, 130) < LEAST + 0.1


def test_a_hang_in_the_first_step_is_found() -> None:
    assert UNKNOWN <= Clock().hang(8192, 4096) < UNKNOWN + 0.1


def test_a_pause_to_compile_is_soon_forgotten() -> None:
    clock = Clock()
    assert clock.step(1, 100, [55.0]) == 0
    for _ in range(20):
        assert clock.step(1, 100, [0.01]) == 0
    assert clock.hang(1, 100) < LEAST + 0.1


@pytest.mark.parametrize("tokens", [1, 3, 100, 160])
@pytest.mark.parametrize("pause", [0.01, 3.0])
def test_a_larger_step_may_take_as_much_longer(tokens: int, pause: float) -> None:
    """50 times the tokens, the context, or both; a device that shows no life between launch and result."""
    for times_tokens, times_context in ((50, 1), (1, 50), (50, 50), (8, 8)):
        clock = Clock()
        for _ in range(20):
            assert clock.step(tokens, 90, [pause]) == 0
        larger = tokens * times_tokens, 90 * times_context
        cost = times_tokens * times_context
        assert clock.step(*larger, [pause * cost]) == 0
        assert clock.step(*larger, [pause * cost]) == 0
        assert clock.hang(tokens, 90) < max(LEAST + 0.1, 21 * pause), "what is found in a usual step is so still"


def test_a_smaller_step_than_any_is_nothing_unknown() -> None:
    clock = Clock()
    assert clock.step(64, 100, [0.1]) == 0
    assert clock.hang(5, 20) < LEAST + 0.1


def test_slow_layers_have_a_longer_lease() -> None:
    """On a CPU, where each layer is a sign of life, it is the layer's time that counts and not the step's."""
    clock = Clock()
    for _ in range(3):
        assert clock.step(256, 300, [1.5] * 60) == 0
    assert 30 <= clock.hang(256, 300) < 33


def test_one_that_was_wrong_becomes_more_patient() -> None:
    """However long a step takes, starting again ends; what once hung is found quickly a day later."""
    patience, wrong = 1.0, 0
    while lasted := Clock(patience).step(8192, 8192, [2000.0]):
        patience, wrong = more_patience(patience, lasted), wrong + 1
    assert wrong == 6
    assert more_patience(patience, 3e5) == 2


def test_of_ranks_that_fail_the_first_cause_is_told() -> None:
    """The others may be waiting for it, or be told first that the connection is gone."""

    def ranks(*errors: BaseException | None) -> list[Future[Any]]:
        futures: list[Future[Any]] = [Future() for _ in errors]
        for future, error in zip(futures, errors, strict=True):
            if error is not None:
                future.set_exception(error)
        return futures

    def told(loading: list[Future[Any]]) -> QuireError | None:
        return first_failure(loading, lambda: None)

    lost = RuntimeError("Connection closed by peer")
    full = OutOfMemory("the weights do not fit")
    failure = told(ranks(None, full))
    assert (type(failure), str(failure)) == (OutOfMemory, "rank 1: the weights do not fit")
    assert str(told(ranks(lost, None, full))) == "rank 2: the weights do not fit"
    assert str(told(ranks(full))) == "the weights do not fit", "there is but one rank"
    wrong = InvalidParameter("block_size is 0", "block_size")
    assert told(ranks(None, wrong)) is wrong, "whoever called is to read what is wrong with the call"
    assert isinstance(told(ranks(None, torch.OutOfMemoryError("CUDA out of memory"))), OutOfMemory)
    assert "rank 0: RuntimeError: Connection closed" in str(told(ranks(lost, None)))
    late = ranks(lost, None)
    threading.Timer(0.3, late[1].set_exception, [ActorDiedError()]).start()
    assert str(told(late)) == "rank 1: a worker process died"
    loaded = ranks(None, None)
    for future in loaded:
        future.set_result(None)
    assert told(loaded) is None


def test_a_controller_does_without_torch() -> None:
    """A second of its start, and a quarter of a gigabyte. With what it starts gateways from, and its admin port."""
    code = """
import sys
from quire_cluster import admin, controller, gateways
print(*sorted({"torch", "transformers", "triton"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
