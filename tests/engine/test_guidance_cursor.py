"""Thinking, sections and content of one output, token by token: what may come, and what it is taken for."""

import json
import random
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from guided import ADDED, END, SIZE
from hypothesis import given
from hypothesis import strategies as st
from quire_engine.guidance import compiled, grammars
from quire_engine.guidance.compiled import Guide
from quire_engine.guidance.cursor import Cursor
from quire_engine.guidance.spec import GuidanceSpec, Section, Thinking
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.guidance.vocabulary import Vocabulary
from quire_engine.text.detokenizer import TokenTable
from vocabularies import byte_level

ALL = frozenset(range(SIZE))


def _vocabulary() -> tuple[Vocabulary, dict[str, int]]:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(ADDED))
    table = TokenTable(tokenizer)
    delimiters = dict(zip(ADDED, map(tokenizer.token_to_id, ADDED), strict=True)) | {"<s>": 0, "</s>": END}
    words = [table[token] for token in range(tokenizer.get_vocab_size())]
    vocabulary = Vocabulary(
        tokens=words,
        delimiters=frozenset(delimiters.values()),
        ends=(END,),
        size=SIZE,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )
    return vocabulary, delimiters


VOCABULARY, IDS = _vocabulary()
THINK, THOUGHT, TOOL, TOOLED, CHANNEL, MESSAGE = (IDS[name] for name in ADDED)
LETTERS = {word: token for token, word in enumerate(VOCABULARY.tokens) if len(word) == 1}
DIGITS = frozenset(LETTERS[bytes([digit])] for digit in b"0123456789")


def letters(text: str) -> list[int]:
    """A token for each byte."""
    return [LETTERS[bytes([byte])] for byte in text.encode()]


def token(text: str) -> int:
    """That writes all of it."""
    return VOCABULARY.tokens.index(text.encode())


def content(**structure: Any) -> str:
    return StructuredOutputs.of(structure).spec(IDS).content


class Walk:
    """A cursor that only goes where it says one may."""

    def __init__(self, guide: Guide) -> None:
        self.guide, self.cursor, self.tokens = guide, Cursor(guide), list[int]()

    def allowed(self) -> frozenset[int]:
        """As the rows of a step read it."""
        cursor = self.cursor
        if cursor.matcher is None:
            return ALL.difference(cursor.never) if cursor.only is None else frozenset(cursor.only)
        bits = np.unpackbits(np.frombuffer(cursor.matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert not cursor.matcher.is_error(), cursor.matcher.get_error()
        return frozenset(np.flatnonzero(bits).tolist()) | frozenset(cursor.besides)

    def go(self, *tokens: int) -> "Walk":
        for one in tokens:
            assert one in self.allowed(), (self.tokens, one)
            self.cursor.advance(one)
            self.tokens.append(one)
        return self

    def write(self, text: str) -> "Walk":
        """In the longest tokens that may come: where nothing else may, that is the tokenizer's own."""
        left = text.encode()
        while left:
            fitting = [one for one in self.allowed() if (word := VOCABULARY.written(one)) and left.startswith(word)]
            self.go(one := max(fitting, key=lambda one: len(VOCABULARY.written(one))))
            left = left[len(VOCABULARY.written(one)) :]
        return self

    @property
    def free(self) -> bool:
        """Whether any text may come."""
        return self.allowed() >= ALL - {END}


def walk(**spec: Any) -> Walk:
    return Walk(Guide(GuidanceSpec.from_json(GuidanceSpec(**spec).to_json()), VOCABULARY))


def thinking(**options: Any) -> Thinking:
    return Thinking(**({"inside": True, "begin": (THINK,), "end": (THOUGHT,)} | options))


def section(opener: tuple[str | int, ...], body: str) -> Section:
    return Section(signs=(opener,), grammar=grammars.composed(grammars.section((opener,), f"body: {body}")))


NUMBER = section(("<n>",), '/[0-9]+/ "."')
TOOL_CALL = section((TOOL,), f'"yes" <[{TOOLED}]>')


# ---- thinking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_thinking_ends_by_force_after_exactly_its_budget(budget: int) -> None:
    now = walk(content=content(choice=["yes"]), thinking=thinking(budget=budget, closing=(*letters("."), THOUGHT)))
    for _ in range(budget):
        assert now.free
        now.go(*letters("x"))
    for forced in (*letters("."), THOUGHT):
        assert now.allowed() == {forced}
        now.go(forced)
    assert now.allowed() == {*letters("y"), *VOCABULARY.breaks}
    now.go(*letters("\n\n"))
    assert now.allowed() == set(letters("y")), "breaks are none of the content, and few"
    now.write("yes")
    assert now.allowed() == {END}


def test_an_output_whose_content_is_constrained_does_not_end_within_thinking() -> None:
    assert END not in walk(content=content(choice=["yes"]), thinking=thinking()).allowed()
    assert END in walk(thinking=thinking()).allowed()


def test_thinking_that_ends_by_itself_is_followed_by_the_content() -> None:
    now = walk(content=content(choice=["yes"]), thinking=thinking(budget=5, closing=(THOUGHT,)))
    now.go(*letters("x"), THOUGHT)
    assert not now.free
    now.write("yes").go(END)
    assert now.cursor.complete


def test_thinking_within_text_ends_where_its_delimiter_does() -> None:
    """A delimiter of several tokens, of which others may be a beginning."""
    now = walk(content=content(choice=["yes"]), thinking=thinking(end=("--/",)))
    for text in ("-", "--", "---", "-/", "--/"[:2]):
        now.go(*letters(text + " "))
        assert now.free
    now.go(*letters("---"))
    assert now.free
    now.go(*letters("/"))
    assert not now.free


def test_thinking_that_is_taken_up_again_has_what_is_left_of_its_budget() -> None:
    """As it is read: a delimiter opens reasoning wherever it stands."""
    now = walk(thinking=thinking(inside=False, opening=(THINK,), budget=2, closing=(THOUGHT,)), sections=(NUMBER,))
    now.go(*letters("ab"))
    assert now.free
    now.go(THINK, *letters("xy"))
    assert now.allowed() == {THOUGHT}
    now.go(THOUGHT)
    assert now.free
    now.go(*letters("c"), THINK)
    assert now.allowed() == {THOUGHT}
    now.go(THOUGHT, *letters("c"))
    assert now.free
    now = walk(thinking=thinking(inside=False, budget=4, closing=(THOUGHT,))).go(THINK, *letters("xy"), THOUGHT)
    assert now.go(THINK).free, "one is left"
    assert now.go(*letters("x")).allowed() == {THOUGHT}


def test_words_that_begin_thinking_do_so_where_content_begins() -> None:
    def start() -> Walk:
        return walk(
            thinking=Thinking(inside=False, begin=("so:",), end=("END",), budget=2, closing=tuple(letters("END")))
        )

    assert not start().go(*letters("\nso:ab")).free
    assert start().go(*letters("a so:ab")).free
    assert start().go(*letters("so:abENDb so:abc")).free


def test_content_may_begin_at_once_or_by_thinking_first() -> None:
    def start() -> Walk:
        return walk(content=content(choice=["yes"]), thinking=thinking(inside=False, opening=(THINK,)))

    assert THINK in start().allowed()
    assert THINK not in start().go(*letters("y")).allowed()
    now = start().go(THINK)
    assert now.free
    assert not now.write("yes").go(THOUGHT).free
    now.write("yes").go(END)


def test_an_opening_that_shares_its_first_token_with_the_content() -> None:
    opening = (CHANNEL, *letters("a"), MESSAGE)
    body = grammars.composed(grammars.lark(f'start: <[{CHANNEL}]> "final" <[{MESSAGE}]> "yes"'))

    def start() -> Walk:
        options = {"inside": False, "begin": (CHANNEL, "a", MESSAGE), "opening": opening}
        return walk(content=body, thinking=thinking(**options))

    assert start().allowed() == {CHANNEL}
    forked = start().go(CHANNEL)
    assert set(letters("a")) < forked.allowed()
    assert set(letters("f")) <= forked.allowed() or token("f") in forked.allowed()
    forked.write("final").go(MESSAGE).write("yes").go(END)
    now = start().go(CHANNEL, *letters("a"))
    assert now.allowed() == {MESSAGE}, "the content has no such beginning"
    assert now.go(MESSAGE).free
    now.go(*letters("hm"), THOUGHT)
    assert now.allowed() == {CHANNEL, *VOCABULARY.breaks}


# ---- sections -------------------------------------------------------------------------------------------------------


def test_an_opener_of_text_is_found_however_it_is_cut_into_tokens() -> None:
    now = walk(sections=(NUMBER,), most=9)
    for before in ("", "a", "<", "<n", "<<"):
        now.go(*letters(before + "<n>"))
        assert now.allowed() == DIGITS
        now.go(*letters("12."))
        assert now.free


def test_an_opener_may_end_within_a_token_that_goes_on() -> None:
    """ "the" opens; "then" is no such part, and stays text."""
    spec = {"sections": (section(("th",), '"e" /[0-9]+/ "."'),), "most": 9}
    now = walk(**spec).go(*letters("x"), token("the"))
    assert now.allowed() == DIGITS
    assert walk(**spec).go(token(" the")).allowed() == DIGITS, "with text before it"
    other = walk(**spec).go(token(" other"), *letters(" "))
    assert other.free, "what follows is no such part"


def test_an_opener_that_follows_one_that_came_to_nothing() -> None:
    spec = {"sections": (section(("th",), '"e" /[0-9]+/ "."'),), "most": 9}
    assert walk(**spec).go(token(" other"), token("the")).allowed() == DIGITS


def test_an_opener_that_is_a_token_is_not_its_spelling() -> None:
    now = walk(sections=(TOOL_CALL,), most=9).go(*letters("<tool>"))
    assert now.free
    now.go(TOOL)
    assert END not in now.allowed()
    assert now.write("yes").go(TOOLED).free


def test_openers_that_are_tokens_count_within_thinking() -> None:
    now = walk(thinking=thinking(), sections=(TOOL_CALL, NUMBER), most=9).go(*letters("x<n>"))
    assert now.free, "text is only text there"
    assert not now.go(TOOL).free
    assert now.write("yes").go(TOOLED).free


@pytest.mark.parametrize(
    ("before", "counts"), [("", True), (" \n", True), ("a", False), (" a ", False), ("<n", False), ("<", False)]
)
def test_an_opener_that_counts_only_first(before: str, counts: bool) -> None:
    first = replace(NUMBER, only_first=True)
    assert walk(sections=(first,), most=9).go(*letters(f"{before}<n>")).free != counts
    both = walk(sections=(first, TOOL_CALL), most=9).go(*letters(before))
    assert not both.go(TOOL).free, "the other one counts everywhere"
    again = walk(sections=(first,), most=9).go(*letters(f"<n>1.{before}<n>"))
    assert again.free != counts, "content begins anew after a section"


def test_an_opener_within_a_token_counts_as_first_only_without_text_before_it() -> None:
    spec = {"sections": (replace(section(("he",), '/[0-9]+/ "."'), only_first=True),)}
    assert walk(**spec).go(token("the")).free
    assert walk(**spec).go(*letters("he")).allowed() == DIGITS


@pytest.mark.parametrize(("options", "count"), [({"most": 3}, 3), ({"most": 9, "then_end": True}, 1), ({}, 1)])
def test_the_output_ends_after_so_many_sections(options: dict[str, Any], count: int) -> None:
    now = walk(sections=(NUMBER,), **options)
    for _ in range(count):
        assert now.free
        now.go(*letters("x<n>1."))
    assert now.allowed() == {END}
    assert now.cursor.complete
    now.go(END, END)


# ---- whatever comes -------------------------------------------------------------------------------------------------


@cache
def guides() -> list[Guide]:
    choice = content(regex=r"[ab]{2,5}<n>\d")
    opening = {"inside": False, "begin": (CHANNEL, "an"), "opening": (CHANNEL, *letters("an")), "end": ("<n>",)}
    specs = [
        GuidanceSpec(content=content(json={"type": "array", "items": {"enum": ["<n>", 1, None]}, "maxItems": 4})),
        GuidanceSpec(content=choice, thinking=thinking(budget=4, closing=(*letters("n>"), THOUGHT), opening=(THINK,))),
        GuidanceSpec(content=choice, thinking=thinking(**opening, budget=3, closing=tuple(letters("<n>")))),
        GuidanceSpec(thinking=thinking(inside=False), sections=(NUMBER, TOOL_CALL), most=2),
        GuidanceSpec(sections=(replace(TOOL_CALL, only_first=True), NUMBER), then_end=True),
        GuidanceSpec(thinking=thinking(), sections=(section((TOOL, "<", CHANNEL), '"n" | "<n>"'), NUMBER), most=3),
    ]
    return [Guide(spec, VOCABULARY) for spec in specs]


LIKELY = [THINK, THOUGHT, TOOL, TOOLED, CHANNEL, *letters("<n><n>yes1.ab")]


@given(st.integers(0, 5), st.integers(0, 1 << 32))
def test_what_may_come_can_be_gone_through_again(number: int, seed: int) -> None:
    """Whatever is taken of it, nothing fails, and who begins anew may do the same at every step."""
    guide, generator = guides()[number], random.Random(seed)
    now, seen = Walk(guide), []
    for _ in range(generator.randrange(40)):
        allowed = now.allowed()
        assert allowed, now.tokens
        seen.append(allowed)
        likely = [one for one in LIKELY if one in allowed] if generator.random() < 0.8 else []
        now.go(generator.choice(likely or sorted(allowed)))
    again = Walk(guide)
    for allowed, one in zip(seen, now.tokens, strict=True):
        assert again.allowed() == allowed
        again.go(one)
    assert again.cursor.complete == now.cursor.complete


@given(st.integers(0, 5), st.integers(0, 1 << 32))
def test_forks_go_their_own_ways(number: int, seed: int) -> None:
    """Each is as if it had come alone, and leaves no trace in what it was forked from."""
    guide, generator = guides()[number], random.Random(seed)
    walks = [Walk(guide)]
    for _ in range(60):
        now = generator.choice(walks)
        if generator.random() < 0.2:
            other = Walk(guide)
            other.cursor, other.tokens = now.cursor.fork(), list(now.tokens)
            walks.append(other)
        allowed = now.allowed()
        likely = [one for one in LIKELY if one in allowed] if generator.random() < 0.8 else []
        now.go(generator.choice(likely or sorted(allowed)))
    for now in walks:
        alone = Walk(guide).go(*now.tokens)
        assert (alone.allowed(), alone.cursor.complete) == (now.allowed(), now.cursor.complete)


@given(st.integers(0, 1 << 32))
def test_sections_are_where_plain_text_search_finds_them(seed: int) -> None:
    """With one-letter tokens: every opener in free text begins a section, which goes on to its end."""
    generator = random.Random(seed)
    now = Walk(guide_of_numbers())
    text = ""
    for _ in range(60):
        allowed = {VOCABULARY.tokens[one].decode() for one in now.allowed() & set(letters("<n>x12."))}
        assert allowed == reference(text), text
        text += (letter := generator.choice(sorted(allowed)))
        now.go(*letters(letter))


@cache
def guide_of_numbers() -> Guide:
    return Guide(GuidanceSpec(sections=(NUMBER,), most=1 << 20), VOCABULARY)


def reference(text: str) -> set[str]:
    """What may follow."""
    while "<n>" in text:
        _, _, after = text.partition("<n>")
        number, ended, text = after.partition(".")
        if not ended:
            return set("12.") if number else set("12")
    return set("<n>x12.")


@pytest.mark.parametrize("text", ["a<think>b", "<tool>", "x</s>"])
def test_a_text_that_is_spelled_like_a_delimiter_is_written_without_it(text: str) -> None:
    """A value of a schema, say: a grammar tokenizes what it leaves no choice about, and tokenizers know delimiters."""
    delimiter = re.search("<.*?>", text)
    assert delimiter is not None and IDS[delimiter[0]] in VOCABULARY.encode(text), "this one does"
    made = walk(content=content(json={"const": text})).write(json.dumps(text))
    assert not VOCABULARY.delimiters & set(made.tokens)
    assert made.allowed() == {END}


def test_a_byte_of_no_utf8_is_never_written() -> None:
    """llguidance begins delimiters with it."""
    assert LETTERS[b"\xff"] not in walk(content=content(json={"type": "string"})).write('"').allowed()
    assert LETTERS[b"\xff"] not in walk(content=grammars.composed(grammars.lark(f"start: <[{TOOL}]>"))).allowed()


def test_compiled_grammars_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their number and by their size; one that is larger than all of that is kept by itself."""
    monkeypatch.setattr(compiled, "_KEPT", 3)
    monkeypatch.setattr(compiled, "_KEPT_SIZE", 2000)
    guides = compiled.Guides(lambda: VOCABULARY)
    specs = [GuidanceSpec(content=grammars.composed(grammars.one_of([f"{n}" * 40]))).to_json() for n in range(5)]
    made = [guides.prepare(spec).result() for spec in specs]
    assert guides.prepare(specs[4]).result() is made[4]
    assert guides.prepare(specs[2]).result() is made[2]
    assert guides.prepare(specs[0]).result() is not made[0]
    large = GuidanceSpec(content=grammars.composed(grammars.one_of(["x" * 4000]))).to_json()
    kept = guides.prepare(large).result()
    assert guides.prepare(large).result() is kept
    assert guides.prepare(specs[2]).result() is not made[2]
    guides.close()
