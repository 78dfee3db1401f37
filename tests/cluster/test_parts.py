"""The parts between processes, each by itself."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from quire_cluster.channel import ChannelClosed, StepChannel
from quire_cluster.convert import logprobs_from_proto, logprobs_to_proto, request_from_proto, sampling_to_proto
from quire_cluster.policies.lease import LEAST, StepLease
from quire_cluster.policies.routing import ReplicaLoad, choose_replica
from quire_engine.execution.plan import TokenLogprobs
from quire_engine.sampling.params import EngineSampling
from quire_protos.v1 import engine_pb2 as pb


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
        message = (number, generator.integers(0, 9, int(10 ** generator.uniform(0, 5))))
        channel.send_plan(message)
        back = channel.receive_result(lambda: other.poll() is None)
        assert back[0] == number
        assert np.array_equal(back[1], message[1])
    channel.close()
    assert other.communicate(timeout=10)[0] == "closed\n"


def test_a_dead_other_side_is_noticed() -> None:
    channel = StepChannel.create()
    alive = threading.Event()
    alive.set()
    threading.Timer(0.1, alive.clear).start()
    with pytest.raises(ChannelClosed, match="gone"):
        channel.receive_result(alive.is_set)


def test_a_message_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        StepChannel.create().send_plan(b"x" * (65 << 20))


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
        allowed_token_ids=(1, 2),
        bad_words=((4,), (5, 6)),
    )
    plain = EngineSampling()
    differing = [name for name in EngineSampling.__slots__ if getattr(params, name) != getattr(plain, name)]
    assert differing == list(EngineSampling.__slots__), "the example must set every field"
    for one in (params, plain):
        submit = pb.Submit(
            id=1, prompt=[1, 2], output=[3], sampling=sampling_to_proto(one), cache_salt=b"x", deadline=4.0
        )
        request = request_from_proto(pb.Submit.FromString(submit.SerializeToString()), 9, 1.0)
        assert request.params == one
        assert (request.tokens, request.num_prompt, request.deadline, request.cache_salt) == ([1, 2, 3], 2, 4.0, b"x")


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


def test_routing() -> None:
    assert choose_replica({}, 0) is None
    even = {"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=2)}
    assert {choose_replica(even, turn) for turn in range(2)} == {"a", "b"}
    assert choose_replica({"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=1)}, 0) == "b"
    others = ReplicaLoad(own=0, reported=9, own_at_report=1)  # another gateway keeps it busy
    assert choose_replica({"a": others, "b": ReplicaLoad(own=3)}, 0) == "b"
    stale = ReplicaLoad(own=5, reported=1, own_at_report=1)  # what was sent since its report counts
    assert stale.requests == 5


def test_a_lease_runs_out_when_nothing_moves() -> None:
    lease = StepLease()
    lease.begin(0.0)
    assert lease.check(0.0, [0, 0]) is None
    assert lease.check(50.0, [0, 0]) is None, "the first step may compile and page in"
    assert lease.check(55.0, [1, 1]) is None
    lease.end()
    lease.begin(100.0)
    for at in range(20):
        assert lease.check(100.0 + at * 0.1, [2 + at, 2 + at]) is None
    lease.end()
    assert lease.seconds == LEAST < 5
    lease.begin(1000.0)  # idle in between
    assert lease.check(1000.1, [22, 22]) is None
    assert lease.check(1000.2, [23, 22]) is None
    assert lease.check(1004.1, [23, 22]) is None
    assert lease.check(1004.3, [23, 22]) == 1


def test_slow_layers_have_a_longer_lease() -> None:
    lease = StepLease()
    lease.begin(0.0)
    lease.end()
    lease.begin(0.0)
    for layer in range(60):
        assert lease.check(layer * 1.5, [layer]) is None
    assert 29 < lease.seconds < 30
    assert lease.check(59 * 1.5 + 29.0, [59]) is None
    assert lease.check(59 * 1.5 + 31.0, [59]) == 0
