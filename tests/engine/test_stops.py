"""Stop strings in a text that grows, against a naive search through all of it."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from quire_engine.text import stops as module
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.stops import StopMatcher
from quire_engine.text.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast
from vocabularies import KINDS

TOKENIZER = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_level"]))
pieces = st.lists(st.text("ab", max_size=4), max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def at_once(text: str, stops: list[str], include: bool, least: int = 0) -> tuple[str, str | None]:
    """The text cut where a stop string that ends beyond `least` characters begins: of several the first, and of those
    the one named first."""
    found = [
        (at, place, stop)
        for place, stop in enumerate(stops)
        for at in range(max(0, least - len(stop) + 1), len(text))
        if text.startswith(stop, at)
    ]
    if not found:
        return text, None
    at, _, stop = min(found)
    return text[: at + len(stop)] if include else text[:at], stop


def waiting(text: str, stops: list[str]) -> int:
    """Characters at the end that may still become a stop string."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


@given(pieces=pieces, stops=stop_lists, include=st.booleans(), least=st.integers(0, 6))
def test_equals_the_naive_search(pieces: list[str], stops: list[str], include: bool, least: int) -> None:
    """However the text is cut: the same as looking through all of it after each piece, and nothing waits longer than
    it must. In the first `least` pieces no stop string counts, one that ends after them does."""
    matcher = StopMatcher(stops, include)
    shown = fed = ""
    boundary = len("".join(pieces[:least]))
    for number, piece in enumerate(pieces):
        fed += piece
        more, stopped = matcher.push(piece, ends=number >= least)
        shown += more
        if number < least:
            assert stopped is None
        elif (expected := at_once(fed, stops, include, boundary))[1] is not None:
            assert (shown, stopped) == expected
            return
        assert stopped is None
        assert shown == fed[: len(fed) - waiting(fed, stops)]
    assert shown + matcher.flush() == fed


@given(text=st.text("abc", max_size=40), stops=stop_lists, include=st.booleans())
def test_a_whole_text(text: str, stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    shown, stopped = matcher.push(text)
    assert (shown + matcher.flush(), stopped) == at_once(text, stops, include)


def test_many_long_stop_strings_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the automaton are few for each character, and made for the characters that come alone."""
    made = 0
    plain = module.bisect_left

    def counting(*arguments: object, **options: object) -> int:
        nonlocal made
        made += 1
        return plain(*arguments, **options)

    monkeypatch.setattr(module, "bisect_left", counting)
    letters = random.Random(0)
    stops = ["a" * 999 + chr(100 + number) for number in range(32)]
    stops += ["".join(letters.choices("ab", k=1000)) for _ in range(32)]
    matcher = StopMatcher(stops, include=False)
    assert made == 0
    text = "".join(("a" * 998 + "b") * 3 + stop[:900] for stop in stops)
    shown = "".join(matcher.push(text[at : at + 4])[0] for at in range(0, len(text), 4))
    assert shown + matcher.flush() == text
    assert made < 2 * len(text)


def test_a_flushed_matcher_begins_anew() -> None:
    matcher = StopMatcher(["abc"], include=False)
    assert matcher.push("ab") == ("", None)
    assert matcher.flush() == "ab"
    assert matcher.push("c") == ("c", None)


@given(pieces=st.lists(st.sampled_from("abc"), max_size=12), stops=stop_lists, least=st.integers(0, 8))
@example(pieces=["a", "b"], stops=["ab"], least=1)
def test_a_stop_string_counts_once_it_ends_after_the_least_number_of_tokens(
    pieces: list[str], stops: list[str], least: int
) -> None:
    """Wherever it begins, that is: before them too."""
    vocabulary = TOKENIZER.vocabulary()
    output = OutputText(TOKENIZER, SamplingParams(stop=stops, min_tokens=least, max_tokens=99), [vocabulary["c"]])
    text, shown = "", ""
    for number, piece in enumerate(pieces, 1):
        text += piece
        output.push(vocabulary[piece])
        shown += output.take().content
        if number > least and (expected := at_once(text, stops, False, least))[1] is not None:
            assert (shown, output.stopped_by) == expected
            return
        assert output.stopped_by is None
    output.finish()
    assert shown + output.take().content == text
