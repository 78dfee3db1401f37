"""What is started, drained and killed, over clusters that change at random: slots load, fail and drain as they like."""

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_cluster.policies.reconcile import _NO_ROOM, Act, Phase, SlotView, actions

LIVE = (Phase.PLACING, Phase.LOADING, Phase.SERVING, Phase.PAUSED, Phase.FAILED)


@dataclass
class Sim:
    """A slot with what the policy does not see of it."""

    index: int
    revision: int
    node: int | None = None  # None: it has no place
    phase: Phase = Phase.PLACING
    since: float = 0.0
    attempts: int = 0


class Cluster:
    """Nodes with room for so many replicas each, and one deployment."""

    def __init__(self, wanted: int, rooms: list[int]) -> None:
        self.wanted = wanted
        self.rooms = dict(enumerate(rooms))
        self.leaving: set[int] = set()
        self.revision = 0
        self.broken: set[int] = set()  # revisions that do not load
        self.slots: list[Sim] = []
        self.now = 0.0
        self.room_came = 0.0
        self.done: list[tuple[Act, Sim]] = []

    # ---- what is there --------------------------------------------------------------------------------------------

    def current(self, slot: Sim) -> bool:
        return slot.revision == self.revision and slot.node not in self.leaving

    def count(self, *phases: Phase) -> int:
        return sum(slot.phase in phases for slot in self.slots)

    def free(self) -> int | None:
        """A node with room."""
        used = [slot.node for slot in self.slots if slot.node is not None]
        for node, room in self.rooms.items():
            if node not in self.leaving and used.count(node) < room:
                return node
        return None

    @property
    def room(self) -> int:
        """For replicas, all in all."""
        return sum(room for node, room in self.rooms.items() if node not in self.leaving)

    def views(self) -> list[SlotView]:
        return [
            SlotView(
                index=slot.index,
                phase=slot.phase,
                wanted=self.current(slot),
                seconds=self.now - max(slot.since, self.room_came),
            )
            for slot in self.slots
        ]

    # ---- what happens ---------------------------------------------------------------------------------------------

    def enter(self, slot: Sim, phase: Phase) -> None:
        slot.phase, slot.since = phase, self.now

    def reconcile(self) -> int:
        """Does what the policy says; how much that was. Never is there more than one above what is wanted, beside those
        that drain; and what there is of today's is never too much."""
        before = self.count(*LIVE)
        found = actions(self.wanted, self.views())
        by_index = {slot.index: slot for slot in self.slots}
        assert len(by_index) == len(self.slots), "no two slots have one number"
        touched = [index for act, index in found if act is not Act.START]
        assert len(touched) == len(set(touched)), "no slot is told twice"
        for act, index in found:
            if act is Act.START:
                self.slots.append(Sim(index, self.revision, since=self.now))
                self.done.append((act, self.slots[-1]))
                continue
            slot = by_index[index]
            self.done.append((act, replace(slot)))
            if act is Act.DRAIN:
                assert slot.phase is Phase.SERVING
                self.enter(slot, Phase.DRAINING)
            else:
                assert slot.phase not in (Phase.SERVING, Phase.DRAINING), "what serves is never killed"
                self.remove(slot)
        assert self.count(*LIVE) <= max(self.wanted + 1, before)
        assert sum(self.current(slot) for slot in self.slots if slot.phase is not Phase.DRAINING) <= self.wanted
        return len(found)

    def remove(self, slot: Sim) -> None:
        self.slots.remove(slot)
        self.room_came = self.now

    def step(self, slot: Sim, *, fails: bool = False) -> None:
        """A slot goes on by one, if it can."""
        if slot.phase is Phase.PLACING:
            slot.node = self.free()
            if slot.node is not None:
                self.enter(slot, Phase.LOADING)
        elif slot.phase is Phase.LOADING:
            if slot.revision in self.broken or fails:
                slot.node, slot.attempts = None, slot.attempts + 1
                self.enter(slot, Phase.PAUSED if slot.attempts < 3 else Phase.FAILED)
            else:
                slot.attempts = 0
                self.enter(slot, Phase.SERVING)
        elif slot.phase is Phase.SERVING:
            if fails:
                slot.node = None
                self.enter(slot, Phase.PAUSED)
        elif slot.phase is Phase.PAUSED:
            self.enter(slot, Phase.PLACING)
        elif slot.phase is Phase.DRAINING:
            self.remove(slot)

    def wait(self, seconds: float) -> None:
        """What has room is placed within moments."""
        for slot in self.slots:
            if slot.phase is Phase.PLACING:
                self.step(slot)
        self.now += seconds

    def settle(self) -> None:
        """Nothing fails from here on but revisions that always do."""
        quiet = 0
        for _ in range(20 * (self.wanted + len(self.slots) + 2)):
            before = (len(self.done), [slot.phase for slot in self.slots])
            self.reconcile()
            for slot in list(self.slots):
                if slot in self.slots:
                    self.step(slot)
                    self.reconcile()
            self.wait(_NO_ROOM / 2)
            quiet = quiet + 1 if before == (len(self.done), [slot.phase for slot in self.slots]) else 0
            if quiet == 4:
                return
        raise AssertionError("it does not come to an end")


@st.composite
def histories(draw: st.DrawFn) -> Cluster:
    """A cluster to which anything has happened."""
    cluster = Cluster(draw(st.integers(0, 5)), draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 40))):
        event = draw(st.sampled_from(("slot", "slot", "slot", "slot", "time", "scale", "change", "node", "back")))
        if event == "slot" and cluster.slots:
            slot = draw(st.sampled_from(cluster.slots))
            cluster.step(slot, fails=draw(st.integers(0, 4)) == 0)
        elif event == "time":
            cluster.wait(draw(st.sampled_from((0.5, _NO_ROOM / 2, _NO_ROOM))))
        elif event == "scale":
            cluster.wanted = draw(st.integers(0, 5))
        elif event == "change":
            cluster.revision += 1
            if draw(st.booleans()):
                cluster.broken.add(cluster.revision)
        elif event == "node":
            cluster.leaving.add(draw(st.sampled_from(sorted(cluster.rooms))))
        elif event == "back":
            cluster.leaving.discard(draw(st.sampled_from(sorted(cluster.rooms))))
        if draw(st.integers(0, 3)):
            cluster.reconcile()
    return cluster


@settings(max_examples=400, deadline=None)
@given(histories())
def test_it_comes_to_an_end_with_what_is_wanted(cluster: Cluster) -> None:
    cluster.settle()
    assert not cluster.count(Phase.DRAINING)
    assert cluster.count(*LIVE) <= cluster.wanted + 1
    if cluster.count(Phase.FAILED):  # what is outdated stays beside it
        assert cluster.count(Phase.SERVING) <= min(cluster.wanted, sum(cluster.rooms.values()))
        return
    assert all(cluster.current(slot) for slot in cluster.slots)
    assert cluster.count(*LIVE) == cluster.wanted
    assert cluster.count(Phase.SERVING) == min(cluster.wanted, cluster.room)


def steady(wanted: int, rooms: list[int]) -> Cluster:
    """All that is wanted serves."""
    cluster = Cluster(wanted, rooms)
    cluster.settle()
    assert cluster.count(Phase.SERVING) == wanted
    cluster.done.clear()
    return cluster


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(("revision", "node")),
    st.data(),
)
def test_with_room_for_one_more_an_update_takes_nothing_away(
    before: int, wanted: int, spare: int, why: str, data: st.DataObject
) -> None:
    """However slowly each of them drains."""
    cluster = steady(before, [before, max(before, wanted) + spare])
    if why == "revision":
        cluster.revision += 1
        cluster.rooms = {0: max(before, wanted) + spare}
    else:
        cluster.leaving.add(0)
    cluster.wanted = wanted
    least = min(wanted, before)
    for _ in range(400):
        cluster.reconcile()
        assert cluster.count(Phase.SERVING) >= least
        moving = [slot for slot in cluster.slots if slot.phase is not Phase.SERVING]
        if not moving:
            break
        cluster.wait(data.draw(st.sampled_from((0.0, 1.0, 3 * _NO_ROOM))))
        others = [slot for slot in moving if slot.phase is not Phase.PLACING]
        assert others, "nothing could ever happen"
        cluster.step(data.draw(st.sampled_from(others)))
    assert [cluster.current(slot) for slot in cluster.slots if slot.phase is Phase.SERVING] == [True] * wanted


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.data())
def test_without_room_an_update_goes_one_at_a_time(wanted: int, data: st.DataObject) -> None:
    cluster = steady(wanted, [wanted])
    cluster.revision += 1
    for _ in range(1000):
        cluster.reconcile()
        assert cluster.count(Phase.SERVING) >= wanted - 1
        assert cluster.count(Phase.DRAINING) <= 1
        moving = [slot for slot in cluster.slots if slot.phase is not Phase.SERVING]
        if not moving:
            break
        cluster.wait(data.draw(st.sampled_from((1.0, _NO_ROOM))))
        cluster.step(data.draw(st.sampled_from(moving)))
    assert all(cluster.current(slot) for slot in cluster.slots)
    assert cluster.count(Phase.SERVING) == wanted


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2), st.integers(1, 3), st.data())
def test_a_revision_that_does_not_load_takes_nothing_away(
    wanted: int, spare: int, changes: int, data: st.DataObject
) -> None:
    """With room. Without, one was drained to make some, and no other is."""
    cluster = steady(wanted, [wanted + spare])
    for _ in range(changes):
        cluster.revision += 1
        cluster.broken.add(cluster.revision)
        for _ in range(40):
            cluster.reconcile()
            if cluster.slots:
                cluster.step(data.draw(st.sampled_from(cluster.slots)))
            cluster.wait(data.draw(st.sampled_from((0.0, 1.0, _NO_ROOM))))
            assert cluster.count(Phase.SERVING) >= wanted - (0 if spare else 1)
    cluster.settle()
    assert cluster.count(Phase.SERVING) >= wanted - (0 if spare else 1)
    cluster.revision = 0  # the operator takes it back
    cluster.settle()
    assert [cluster.current(slot) for slot in cluster.slots if slot.phase is Phase.SERVING] == [True] * wanted


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(0, 5))
def test_what_does_not_serve_yet_goes_before_what_serves(cluster: Cluster, fewer: int) -> None:
    cluster.reconcile()
    cluster.done.clear()
    cluster.wanted = min(cluster.wanted, fewer)
    views = {view.index: view for view in cluster.views()}
    cluster.reconcile()
    drained = [slot for act, slot in cluster.done if act is Act.DRAIN and views[slot.index].wanted]
    starting = [
        slot for slot in cluster.slots if cluster.current(slot) and slot.phase in (Phase.PLACING, Phase.LOADING)
    ]
    assert not (drained and starting), "one that starts stays, where one that serves went"


def test_what_was_given_up_is_not_started_for_ever() -> None:
    for wanted, room in itertools.product((1, 3), (1, 4)):
        cluster = Cluster(wanted, [room])
        cluster.broken.add(0)
        cluster.settle()
        assert [slot.phase for slot in cluster.slots] == [Phase.FAILED] * wanted
        assert sum(act is Act.START for act, _ in cluster.done) == wanted
        cluster.done.clear()
        cluster.settle()
        assert not cluster.done
        cluster.wanted -= 1
        cluster.settle()
        assert [act for act, _ in cluster.done] == [Act.KILL]


@pytest.mark.parametrize("phase", [Phase.PAUSED, Phase.PLACING, Phase.LOADING, Phase.FAILED])
def test_what_serves_nobody_and_is_outdated_goes_at_once(phase: Phase) -> None:
    outdated = SlotView(index=4, phase=phase, wanted=False)
    assert (Act.KILL, 4) in actions(1, [outdated, SlotView(index=0, phase=Phase.SERVING)])


def test_the_least_busy_is_drained_first() -> None:
    slots = [SlotView(index=index, phase=Phase.SERVING, requests=busy) for index, busy in enumerate((5, 0, 3, 0))]
    assert actions(3, slots) == [(Act.DRAIN, 3)]
    assert sorted(index for _, index in actions(1, slots)) == [1, 2, 3]
    olds = [replace(slot, wanted=False) for slot in slots]
    replaced = SlotView(index=7, phase=Phase.SERVING)
    assert actions(4, [*olds, replaced]) == [(Act.DRAIN, 1), (Act.START, 4)]
