"""Drafters against a search of every place, and what they keep of requests that have ended."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire_engine.request import EngineSampling, Request
from quire_engine.speculation.draft import Draft, Drafter
from quire_engine.speculation.index import Bounds, Index
from quire_engine.speculation.ngram import NgramDrafter, chance
from quire_engine.speculation.outputs import END
from quire_engine.speculation.suffix import SuffixDrafter

ALL = Bounds(short=2, long=8, walk=10**6, reach=10**6, enough=10**6)  # every place, and all of the log
ids = count()
logs = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most), min_size=1, max_size=120))
cuts = st.lists(st.integers(0, 120), max_size=8).map(sorted)


def request(tokens: Sequence[int], num_prompt: int = 1, salt: bytes = b"") -> Request:
    return Request(next(ids), list(tokens), num_prompt, EngineSampling(), cache_salt=salt)


def agreement(text: Sequence[int], place: int, log: Sequence[int]) -> int:
    """In how many tokens what comes before the place agrees with the end of the log."""
    n = 0
    while n < min(place, len(log)) and text[place - 1 - n] == log[len(log) - 1 - n]:
        n += 1
    return n


def agreeing(text: Sequence[int], log: Sequence[int], least: int) -> list[int]:
    """Every place that agrees in `least` tokens or more, the latest first."""
    return [place for place in range(len(text) - 1, 0, -1) if agreement(text, place, log) >= least]


def longest(text: Sequence[int], log: Sequence[int], places: list[int], reach: int) -> tuple[list[int], int]:
    lengths = [min(reach, agreement(text, place, log)) for place in places]
    most = max(lengths, default=0)
    return [place for place, length in zip(places, lengths, strict=True) if length == most], most


def following(log: Sequence[int], place: int, most: int) -> list[int]:
    """What is read from the place on while it is written to the end."""
    tokens = list(log)
    for ahead in range(most):
        tokens.append(tokens[place + ahead])
    return tokens[len(log) :]


def voted(rows: list[list[int]], length: int) -> tuple[list[int], list[float]]:
    """What most rows go on with, the earlier of equals, while all of it follows once in ten times or more."""
    tokens: list[int] = []
    chances: list[float] = []
    sure = 1.0
    while rows := [row for row in rows if row[: len(tokens)] == tokens]:
        votes = Counter(row[len(tokens)] if len(row) > len(tokens) else END for row in rows)
        token, agree = votes.most_common(1)[0]
        sure *= (likely := agree / (len(rows) + 2 / (length + len(tokens))))
        if token == END or sure < 0.1 or len(tokens) == 6:
            break
        tokens.append(token)
        chances.append(likely)
    return tokens, chances


@st.composite
def some_bounds(draw: st.DrawFn) -> Bounds:
    short = draw(st.integers(1, 3))
    long = short + draw(st.integers(0, 5))
    few = st.integers(1, 8)
    return Bounds(short=short, long=long, walk=draw(few), reach=long + draw(st.integers(0, 5)), enough=draw(few))


@given(text=logs, log=logs, cuts=cuts, bounds=some_bounds())
def test_an_index_finds_what_a_search_of_every_place_finds(
    text: list[int], log: list[int], cuts: list[int], bounds: Bounds
) -> None:
    index, of_log = Index(bounds), Index(bounds)
    for cut in cuts:
        index.search(text[:cut], log[:cut], of_log)
    found = index.search(text, log, of_log)
    near, far = agreeing(text, log, bounds.short), agreeing(text, log, bounds.long)
    looked_at = far if len(near) > bounds.walk and far else near
    places, length = longest(text, log, looked_at[: bounds.walk], bounds.reach)
    assert found.places == (places[: bounds.enough] if length == bounds.reach else places)
    assert found.length == length


def test_an_index_is_the_same_however_a_long_text_came() -> None:
    rng = random.Random(0)
    text = [rng.randrange(60) for _ in range(6000)]
    for size in (1, 7, 47, 48, 1000, 6000):
        index = Index(ALL)
        for end in range(size, len(text) + 1, size):
            index.search(text[:end], text[:end], index)
        found = index.search(text, text, index)
        assert found.places == agreeing(text, text, found.length)
        assert found.places[0] > found.length > 1
        assert longest(text, text, agreeing(text, text, 2), 10**6)[1] == found.length


@given(log=logs, cuts=cuts, shortest=st.integers(1, 4), more=st.integers(0, 5), most=st.integers(0, 12))
def test_ngram_drafts_what_followed_the_latest_of_the_longest(
    log: list[int], cuts: list[int], shortest: int, more: int, most: int
) -> None:
    drafter, asked = NgramDrafter(shortest, shortest + more), request(log[:1])
    for cut in (*cuts, len(log)):
        asked.tokens[:] = log[: max(1, cut)]
        draft = drafter.propose(asked, most)
        near = agreeing(asked.tokens, asked.tokens, shortest)
        far = agreeing(asked.tokens, asked.tokens, shortest + more)
        places, _ = longest(asked.tokens, asked.tokens, far or near[:16], shortest + more)
        assert draft.tokens == (following(asked.tokens, places[0], most) if places else [])
        assert len(draft.chances) == len(draft.tokens)
        assert draft == drafter.propose(asked, most)


@given(log=logs, cuts=cuts, outputs=st.lists(logs, max_size=4))
def test_suffix_drafts_what_most_of_the_longest_went_on_with(
    log: list[int], cuts: list[int], outputs: list[list[int]]
) -> None:
    """Asked now and then, so that places are followed: the same as a search of them all."""
    drafter, asked = SuffixDrafter(bounds=ALL), request(log[:1])
    said: list[int] = []
    for output in outputs:
        drafter.forget(request([9, *output]))
        drafter.forget(request([9, *output], salt=b"another"))
        if len(output) > 2:
            said += [*output, END]
    for cut in (*cuts, len(log)):
        asked.tokens[:] = log[: max(1, cut)]
        draft = drafter.propose(asked, 6)
        own, here = longest(asked.tokens, asked.tokens, agreeing(asked.tokens, asked.tokens, 2), 10**6)
        others, there = longest(said, asked.tokens, agreeing(said, asked.tokens, 2), 10**6)
        if there > here:
            assert draft == Draft(*voted([said[place : place + 6] for place in others], there))
        else:
            assert draft == Draft(*voted([following(asked.tokens, place, 6) for place in own], here))
        assert draft == drafter.propose(asked, 6)


@given(log=logs, cuts=cuts, outputs=st.lists(logs, max_size=4), most=st.integers(0, 8))
def test_suffix_within_its_usual_bounds(log: list[int], cuts: list[int], outputs: list[list[int]], most: int) -> None:
    """What is followed may have been found when it was among the latest: each token followed somewhere, in this log or
    in an output, the two before it."""
    drafter, asked = SuffixDrafter(), request(log[:1])
    for output in outputs:
        drafter.forget(request([9, *output]))
    for cut in (*cuts, len(log)):
        asked.tokens[:] = log[: max(1, cut)]
        draft = drafter.propose(asked, most)
        assert len(draft.tokens) == len(draft.chances) <= most
        text = asked.tokens + draft.tokens
        seen = {triple for row in (asked.tokens, *outputs) for triple in zip(row, row[1:], row[2:], strict=False)}
        for end in range(len(asked.tokens), len(text)):
            triple = (text[end - 2], text[end - 1], text[end])
            assert triple in seen
            seen.add(triple)


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 5), SuffixDrafter()], ids=["ngram", "suffix"])
@pytest.mark.parametrize("period", [[7], [7, 8], [1, 2, 3, 2]], ids=str)
def test_a_period_goes_on(drafter: Drafter, period: list[int]) -> None:
    asked = request([5, *period * 9])
    assert drafter.propose(asked, 9).tokens == (period * 9)[:9]
    asked.tokens += (period * 9)[:7]
    assert drafter.propose(asked, 9).tokens == (period * 16)[7:16]


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 5), SuffixDrafter()], ids=["ngram", "suffix"])
def test_a_long_run_is_found_however_often_its_end_stood_elsewhere_since(drafter: Drafter) -> None:
    elsewhere = [token for number in range(100, 200) for token in (8, 9, number)]
    assert drafter.propose(request([*range(10), 50, *elsewhere, *range(10)]), 1).tokens == [50]


def test_a_drafter_is_sure_of_what_agrees_in_more_and_at_more_places() -> None:
    assert 0 < chance(1, 2, 4) < chance(1, 1, 4) < chance(2, 2, 4) < chance(2, 2, 5) < 1


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 5), SuffixDrafter()], ids=["ngram", "suffix"])
def test_the_end_of_a_request_nobody_asked_about(drafter: Drafter) -> None:
    drafter.forget(request([1, 2, 3]))
    drafter.forget(request([1]))


def test_ended_requests_leave_their_outputs_to_their_tenant_and_nothing_else() -> None:
    drafter = SuffixDrafter()
    ended = request([1, 2, 3, 4, 5, 6, 7], num_prompt=3, salt=b"a")
    drafter.propose(ended, 4)
    drafter.forget(ended)
    assert drafter.propose(request([9, 4, 5], salt=b"a"), 4).tokens == [6, 7]
    for log, salt in (([9, 4, 5], b"b"), ([9, 4, 5], b""), ([9, 1, 2], b"a"), ([9, 2, 3], b"a"), ([9, 3, 4], b"a")):
        assert drafter.propose(request(log, salt=salt), 4) == Draft(), (log, salt)


def test_the_request_s_own_text_comes_first() -> None:
    drafter = SuffixDrafter()
    drafter.forget(request([0, 4, 5, 6]))
    assert drafter.propose(request([4, 5, 7, 4, 5]), 1).tokens == [7]
    assert drafter.propose(request([5, 7, 4, 5]), 1).tokens == [6]


def test_what_is_kept_of_outputs_is_bounded() -> None:
    """By tenant, in tenants and in all; those go first that were not asked about for longest."""
    drafter = SuffixDrafter(tenants=3, tenant_tokens=100, tokens=250)
    rng = random.Random(0)
    for number in range(300):
        salt = b"%d" % rng.randrange(5)
        output = [rng.randrange(1000) for _ in range(rng.randrange(150))]
        drafter.forget(request([0, *output], salt=salt))
        sizes = {tenant: len(outputs.text) for tenant, outputs in drafter.store.items()}
        assert len(sizes) <= 3 and sum(sizes.values()) == drafter.store.size <= 250, number
        assert max(sizes.values(), default=0) <= 100
        if len(output) > 2:
            *_, a, b, c = output
            assert drafter.propose(request([0, a, b], salt=salt), 1).tokens == [c]


@pytest.mark.parametrize("answered", [False, True])
def test_the_tenant_asked_about_or_answered_last_stays(answered: bool) -> None:
    drafter = SuffixDrafter(tenants=2)
    for salt in (b"a", b"b"):
        drafter.forget(request([0, 4, 5, 6], salt=salt))
    if answered:
        drafter.forget(request([0, 1, 2, 3], salt=b"a"))
    else:
        drafter.propose(request([4, 5], salt=b"a"), 1)
    drafter.forget(request([0, 4, 5, 6], salt=b"c"))
    asked = {salt: drafter.propose(request([4, 5], salt=salt), 1).tokens for salt in (b"a", b"b", b"c")}
    assert asked == {b"a": [6], b"b": [], b"c": [6]}


def test_outputs_that_are_followed_may_go() -> None:
    drafter, asked = SuffixDrafter(tenants=1, tenant_tokens=20), request([4, 5])
    drafter.forget(request([0, 4, 5, 6, 7, 8]))
    assert drafter.propose(asked, 1).tokens == [6]
    drafter.forget(request([0, *range(20, 36)]))  # its tenant said so much since
    asked.tokens.append(6)
    assert drafter.propose(asked, 1) == Draft()
    asked.tokens += [30, 31]
    assert drafter.propose(asked, 1).tokens == [32]
    drafter.forget(request([0, 1, 2, 3], salt=b"another"))  # its tenant's turn to go
    asked.tokens.append(32)
    assert drafter.propose(asked, 1) == Draft()
