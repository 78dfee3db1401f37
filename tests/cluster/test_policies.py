"""Decisions over plain data: no process, no clock."""

import random

import pytest
from quire_cluster.policies.admission import has_room, rebuild_wait
from quire_cluster.policies.quarantine import PROOF, Losses
from quire_cluster.policies.restart import Restarts
from quire_cluster.policies.routing import ReplicaLoad, choose_replica
from quire_cluster.policies.suspicion import Patience, Silence, Standing


def test_routing() -> None:
    assert choose_replica({}, 0) is None
    even = {"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=2)}
    assert {choose_replica(even, turn) for turn in range(2)} == {"a", "b"}
    assert choose_replica({"a": ReplicaLoad(own=2), "b": ReplicaLoad(own=1)}, 0) == "b"
    others = ReplicaLoad(own=0, reported=9, own_at_report=1)  # another gateway keeps it busy
    assert choose_replica({"a": others, "b": ReplicaLoad(own=3)}, 0) == "b"
    stale = ReplicaLoad(own=5, reported=1, own_at_report=1)  # what was sent since its report counts
    assert stale.requests == 5
    silent = ReplicaLoad(own=0, avoided=True)
    assert choose_replica({"a": silent, "b": ReplicaLoad(own=3)}, 0) == "b"
    assert choose_replica({"a": silent}, 0) == "a", "a silent one is better than none"


def test_room() -> None:
    full = ReplicaLoad(own=2, reported=5, own_at_report=2, most=5)
    assert not has_room([full], 1)
    assert has_room([full, ReplicaLoad(own=0, most=3)], 3)
    assert not has_room([full, ReplicaLoad(own=0, most=3)], 4)
    assert has_room([ReplicaLoad(own=0, reported=5, own_at_report=2, most=5)], 2), "two of ours ended since"


def test_the_wait_for_a_replica_follows_how_long_one_takes_to_load() -> None:
    assert rebuild_wait(0.5) == 120
    assert rebuild_wait(600) == 1800


def test_silence() -> None:
    silence = Silence(Patience(avoid=2, move=10))
    for standing, ticks in ((Standing.GOOD, 7), (Standing.AVOIDED, 32), (Standing.LOST, 9)):
        for _ in range(ticks):
            silence.passed(0.25)
            assert silence.standing is standing
    silence.heard()
    assert silence.standing is Standing.GOOD
    silence.passed(3600.0)
    assert silence.standing is Standing.GOOD, "the gateway slept, and has not read what came meanwhile"


@pytest.mark.parametrize("explained", [True, False])
def test_of_requests_only_the_poison_is_convicted(explained: bool) -> None:
    """Any number of innocents and replicas; one request kills at a token of its own, at most two ahead of the log. The
    clock stands at a loss: what is resent kills at once, or after a rebuild."""
    generator = random.Random(0)
    for _ in range(300):
        count = generator.randrange(1, 12)
        poison, kills_at = generator.randrange(count), generator.randrange(6)
        logs, losses = [generator.randrange(6) for _ in range(count)], [Losses() for _ in range(count)]
        logs[poison] = min(logs[poison], kills_at)
        running, waiting, trial = set(range(count)), [], None
        now, lag, deaths, convicted = 0.0, generator.randrange(3), 0, None
        while convicted is None:
            assert deaths < 4, "the poison is found"
            if trial is None and waiting:
                trial = waiting.pop(0)
                running.add(trial)
            if poison in running and logs[poison] + lag >= kills_at:
                now, deaths = now + generator.choice((0.1, 30.0)), deaths + 1
                found = [one for one in running if losses[one].lost(now, logs[one], begun=True, explained=explained)]
                assert found in ([], [poison])
                convicted = found[0] if found else None
                waiting += sorted(running)
                running, trial = set(), None
                continue
            for one in running:
                logs[one] += 1
                if losses[one].grown(logs[one]) and one == trial:
                    trial = None
        assert deaths == 2 or not explained
        assert deaths <= 3


def test_a_request_that_was_cleared_starts_afresh() -> None:
    losses = Losses()
    for number in range(5):
        assert not losses.lost(100.0 * number, 10 * number, begun=True, explained=True)
        assert losses.suspected
        assert not losses.grown(10 * number + PROOF - 1)
        assert losses.grown(10 * number + PROOF)
        assert not losses.suspected


def test_replicas_that_vanish_together_count_once_and_no_more() -> None:
    losses = Losses()
    assert not losses.lost(10.0, 5, begun=True, explained=False)
    assert not losses.lost(10.3, 5, begun=True, explained=False)
    assert losses.lost(10.6, 5, begun=True, explained=False), (
        "whatever kills each replica in turn is stopped all the same"
    )


def test_a_model_that_dies_loading_is_not_started_for_ever() -> None:
    """However long it loads before it dies."""
    restarts = Restarts()
    assert [restarts.failed(None, died=True) for _ in range(3)] == [0.0, 0.5, None]
    assert Restarts().failed(None, died=False) is None, "what it says is wrong will be so the next time"


def test_a_replica_that_served_is_started_again_with_growing_pauses() -> None:
    restarts = Restarts()
    assert restarts.failed(1000.0, died=True) == 0.0
    pauses = [restarts.failed(None, died=False) for _ in range(9)]
    assert pauses[-1] is None
    waits = [pause for pause in pauses if pause is not None]
    assert len(waits) == 8
    assert waits == sorted(waits)
    assert restarts.failed(31.0, died=True) == 0.0, "it served for long"
