"""What policies find in texts that come piece by piece: against whole texts, which Python's own `re` searches."""

import asyncio
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from quire_cluster.governance.checks import filters
from quire_cluster.governance.checks.filters import OutputFilter, Verdict
from quire_cluster.governance.checks.machine import Kind
from quire_cluster.governance.checks.patterns import pattern_machine, word_machine
from quire_cluster.governance.checks.policies import Policies
from quire_cluster.governance.checks.scanner import Scanner
from quire_engine.errors import InvalidParameter

HERE = Path(__file__).parent
ALICE = (HERE.parents[1] / "benchmarks/alice.txt").read_text()
KINDS = ["credit_card", "iban", "email", "us_ssn", "phone", "ip_address"]


class Nobody:
    """Asks nobody."""

    request_id = "1"

    async def webhook(self, url: str, body: Mapping[str, object], timeout: float) -> Mapping[str, object]:
        raise AssertionError("nobody is to be asked")

    async def judge(self, model: str, prompt: str, timeout: float) -> str:
        raise AssertionError("nobody is to be asked")


def policies(*rules: dict[str, Any], folder: Path = HERE) -> Policies:
    return Policies.parse([{"name": f"r{number}", **rule} for number, rule in enumerate(rules)], folder)


def output(*rules: dict[str, Any]) -> OutputFilter:
    filter = policies(*rules).for_("t", "m").output(Nobody())
    assert filter is not None
    return filter


def streamed(
    rules: Sequence[dict[str, Any]], pieces: Sequence[str], made: Policies | None = None
) -> tuple[list[str], bool, tuple[Verdict, ...]]:
    """What had come out after each piece and at the end; whether a rule ended it; and what was found. `made`: policies
    of these rules, which may have served before."""

    async def run() -> tuple[list[str], bool, tuple[Verdict, ...]]:
        filter = (made or policies(*rules)).for_("t", "m").output(Nobody())
        assert filter is not None
        outs = [""]
        for piece in pieces:
            outs.append(outs[-1] + "".join(out.text for out in await filter.push("content", piece)))
            if filter.stopped:
                return outs, True, filter.verdicts
        outs.append(outs[-1] + "".join(out.text for out in await filter.finish()))
        return outs, filter.stopped, filter.verdicts

    return asyncio.run(run())


# A plain implementation for whole texts. Each function says whether text[start:end] is a match, and of which kind.

Finds = Callable[[str, int, int], str | None]


def finds_patterns(patterns: Sequence[str], longest: int) -> Finds:
    def find(text: str, start: int, end: int) -> str | None:
        rest = len(text) - end
        wholes = (re.compile(rf"(?:{pattern})(?=[\s\S]{{{rest}}}\Z)") for pattern in patterns)
        return "pattern" if end - start <= longest and any(w.match(text, start) for w in wholes) else None

    return find


def finds_words(words: Sequence[str]) -> Finds:
    wanted = {word.casefold() for word in words}

    def find(text: str, start: int, end: int) -> str | None:
        is_whole = not re.search(r"\w\Z", text[:start]) and not re.match(r"\w", text[end:])
        return "words" if is_whole and re.sub(r"\s", " ", text[start:end]).casefold() in wanted else None

    return find


def check_digit_fits(text: str) -> bool:
    doubled = {digit: (2 * digit if digit < 5 else 2 * digit - 9) for digit in range(10)}
    digits = [int(one) for one in re.findall("[0-9]", text)]
    even = len(digits) % 2
    return sum(doubled[d] if at % 2 == even else d for at, d in enumerate(digits)) % 10 == 0


def remainder_fits(text: str) -> bool:
    plain, remainder = text.replace(" ", ""), 0
    for one in plain[4:] + plain[:4]:
        value = ord(one) - (48 if one.isdigit() else 55)
        remainder = (remainder * (10 if value < 10 else 100) + value) % 97
    return remainder == 1


def is_address(text: str) -> bool:
    for form in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        try:
            form(text)
        except ValueError:
            continue
        return not text.startswith(":")
    return False


def finds_personal(kinds: Sequence[str]) -> Finds:
    def is_one(kind: str, text: str, before: str, after: str) -> bool:
        digits = re.sub("[^0-9]", "", text)
        by_digits = not before.isdigit() and not after.isdigit()
        if kind == "credit_card":
            form = re.fullmatch("[2-6]([ -]?[0-9])*", text)
            return bool(form) and 13 <= len(digits) <= 19 and by_digits and check_digit_fits(text)
        if kind == "iban":
            form = re.fullmatch("[A-Z][A-Z][0-9][0-9]( ?[A-Z0-9])*", text)
            size = len(text.replace(" ", ""))
            return (
                bool(form)
                and 15 <= size <= 34
                and not before.isalnum()
                and not after.isalnum()
                and remainder_fits(text)
            )
        if kind == "email":
            local, at, domain = text.partition("@")
            *labels, last = domain.split(".")
            return (
                bool(at and labels and len(text) <= 254)
                and bool(re.fullmatch(r"[A-Za-z0-9._%+-]+", local))
                and not re.fullmatch(r"[A-Za-z0-9._%+-]", before)
                and all(re.fullmatch("[A-Za-z0-9-]+", label) for label in labels)
                and bool(re.fullmatch("[A-Za-z]{2,24}", last))
            )
        if kind == "us_ssn":
            form = re.fullmatch("([0-9]{3})([- ])([0-9]{2})[- ]([0-9]{4})", text)
            return (
                form is not None
                and len(set(re.findall("[- ]", text))) == 1
                and (by_digits and "-" not in (before, after))
                and not re.match("000|666|9", form[1])
                and form[3] != "00"
                and form[4] != "0000"
            )
        if kind == "phone":
            abroad = re.fullmatch(r"\+([ ./-]?\(?[0-9]\)?)*", text) and re.match(r"\+[1-9]", text)
            at_home = re.fullmatch(r"(1[-. ])?(\([2-9]..\) ?|[2-9]..[-. ])[2-9]..[-. ].{4}", text)
            is_form = (abroad and 7 <= len(digits) <= 15) or (at_home and len(digits) == (11 if text[0] == "1" else 10))
            return bool(is_form) and by_digits and before != "+"
        return is_address(text) and not re.fullmatch("[0-9A-Za-z.:]", before) and not re.fullmatch("[0-9A-Za-z]", after)

    def find(text: str, start: int, end: int) -> str | None:
        before, after = text[start - 1 : start] if start else "", text[end : end + 1]
        return next((kind for kind in kinds if is_one(kind, text[start:end], before, after)), None)

    return find


def finds(rule: dict[str, Any]) -> Finds:
    if rule["check"] == "pattern":
        return finds_patterns(rule["patterns"], rule.get("longest", 10_000))
    return finds_words(rule["words"]) if rule["check"] == "words" else finds_personal(rule["kinds"])


def whole(rules: Sequence[dict[str, Any]], text: str) -> tuple[str, bool, dict[tuple[str, str], int]]:
    """What comes out of a text, whether a rule ended it, and how often each kind was found by each rule."""
    stopped, counts = False, dict[tuple[str, str], int]()
    for number, rule in enumerate(rules):
        find, out, start = finds(rule), "", 0
        while start < len(text):
            ends = ((end, kind) for end in range(len(text), start, -1) if (kind := find(text, start, end)))
            end, kind = next(ends, (start + 1, None))
            if kind is None:
                out += text[start]
            else:
                counts[f"r{number}", kind] = counts.get((f"r{number}", kind), 0) + 1
                if rule["action"] == "stop":
                    stopped = True
                    break
                shown = kind if rule["check"] == "pii" else f"r{number}"
                out += text[start:end] if rule["action"] == "flag" else f"[REDACTED:{shown}]"
            start = end
        text = out
    return text, stopped, counts


# What texts and rules are drawn from: few characters, so that matches are frequent.

ALPHABET = "aAbßſsSK1 \n_-"
texts = st.text(ALPHABET, max_size=16)
characters = st.sampled_from(["a", "b", "ß", "s", "1", " ", "[ab]", "[^a]", "[^ab1]", ".", r"\w", r"\d", r"\s", r"\W"])
characters |= st.sampled_from(["[A-Sa]", "(?i:s)", "(?i:k)", "(?i:[^s])", "(?s:.)", r"(?a:\w)", "(?i:ß)"])
sides = st.sampled_from([r"\b", r"\B", "^", r"\A", r"\Z", "(?m:^)", "(?m:$)", r"(?a:\b)", "(?i:(?!S))"])
sides |= st.sampled_from(["(?!a)", "(?=[ab])", "(?<!a)", "(?<=b)", r"(?<!\w)", r"(?!\w)"])
counts = st.sampled_from(["?", "*", "+", "{2}", "{1,3}", "{0,2}", "{2,}", "{3,10}"])
few = st.sampled_from(["?", "{2}", "{0,2}"])  # of groups: `re` takes exponentially long for unbounded ones in others
patterns = st.recursive(
    characters | st.tuples(characters, counts).map("".join),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})")
        | st.tuples(inner, few).map(lambda pair: f"(?:{pair[0]}){pair[1]}")
        | st.tuples(sides, inner).map("".join)
        | st.tuples(inner, sides).map("".join)
        | inner.map(lambda pattern: f"({pattern})")
    ),
    max_leaves=5,
)
actions = st.sampled_from(["redact", "stop", "flag"])
words = st.lists(st.sampled_from(["a", "ss", "straße", "SS", "b_", "a b", "1", "sS a", "k", "--", "ab"]), min_size=1)
pattern_rules = st.fixed_dictionaries(
    {
        "check": st.just("pattern"),
        "patterns": st.lists(patterns, min_size=1, max_size=2),
        "longest": st.integers(1, 9),
        "action": actions,
    }
)
word_rules = st.fixed_dictionaries({"check": st.just("words"), "words": words, "action": actions})
PERSONAL = """4111 1111 1111 1111|378282246310005|5500-0000-0000-0004|4111111111111112|DE89 3704 0044 0532 0130 00|@|x|
GB82WEST12345698765432|GB82WEST12345698765433|me.you+x@mail.example.org|a@b.co|078-05-1120|219 09 9999|666 12 1234|12|7|
+44 20 7946 0958|(212) 555-0123|1-212-555-0123|10.0.0.255|10.0.0.256|2001:db8::8a2e:370:7334|::1|fe80::1|-|é| |, |.|:|
64:ff9b::192.0.2.33"""
personal = st.sampled_from(PERSONAL.replace("\n", "").split("|"))
personal_texts = st.lists(personal, max_size=5).map("".join)
personal_rules = st.fixed_dictionaries(
    {
        "check": st.just("pii"),
        "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=6, unique=True),
        "action": actions,
    }
)


@st.composite
def cut(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    text = draw(texts)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def holds(rules: Sequence[dict[str, Any]], pieces: Sequence[str]) -> None:
    """In these pieces, at once, and by the character, a text comes out as a whole one does."""
    text = "".join(pieces)
    expected, ended, counts = whole(rules, text)
    made = policies(*rules)
    for way in (pieces, [text], list(text), pieces):
        outs, stopped, verdicts = streamed(rules, way, made)
        assert (outs[-1], stopped) == (expected, ended), way
        for out in outs:
            assert expected.startswith(out)
        if not ended:
            assert {(v.rule, v.kind): v.count for v in verdicts} == counts


def accepted(rules: Sequence[dict[str, Any]]) -> bool:
    try:
        policies(*rules)
    except InvalidParameter:
        return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.lists(pattern_rules | word_rules, min_size=1, max_size=3), cut(texts))
@example([{"check": "pattern", "patterns": ["a{3,10}"], "action": "redact"}], ["aa", "a", "aaaaaaaa", "a b"])
@example([{"check": "pattern", "patterns": ["ab|abab1"], "action": "redact"}], ["a", "ba", "ba", "b1"])
@example([{"check": "pattern", "patterns": ["a+"], "longest": 3, "action": "redact"}], ["a" * 8])
@example([{"check": "words", "words": ["strasse"], "action": "redact"}], ["Stra", "ße STRASSE straſſe straße_"])
@example([{"check": "words", "words": ["s"], "action": "redact"}], ["ß s"])
@example([{"check": "pattern", "patterns": ["(?<!b)a"], "action": "redact"}], ["b", "a", " ", "a"])
@example([{"check": "pattern", "patterns": [r"a\b"], "action": "stop"}], ["a", "a", " a"])
@example(
    [
        {"check": "pattern", "patterns": ["b"], "action": "redact"},
        {"check": "pattern", "patterns": [r"a\[REDACTED:r0\]a"], "action": "redact"},
    ],
    ["a", "b", "a"],
)
def test_pieces_come_out_as_the_whole_does(rules: list[dict[str, Any]], pieces: list[str]) -> None:
    assume(accepted(rules))
    holds(rules, pieces)


@settings(max_examples=80, deadline=None)
@given(personal_rules, cut(personal_texts))
def test_personal_data_comes_out_as_of_the_whole(rule: dict[str, Any], pieces: list[str]) -> None:
    holds([rule], pieces)


@settings(max_examples=60, deadline=None)
@given(st.lists(personal_rules | word_rules | pattern_rules, min_size=2, max_size=4), cut(personal_texts | texts))
def test_rules_of_all_kinds_in_a_row(rules: list[dict[str, Any]], pieces: list[str]) -> None:
    assume(accepted(rules))
    holds(rules, pieces)


@settings(deadline=None)
@given(cut(texts), st.sampled_from(["ab", "a[ab]{1,4}", "(?i:s)+", "-_*"]))
def test_what_is_looked_for_never_goes_out(pieces: list[str], pattern: str) -> None:
    """Not even for a moment, and whatever came before."""
    for action in ("redact", "stop"):
        outs, _, _ = streamed([{"check": "pattern", "patterns": [pattern], "longest": 6, "action": action}], pieces)
        for out in outs:
            assert not re.search(pattern, out.replace("[REDACTED:r0]", "|"))


def simple(text: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(text), max_size=30).map("".join)


@settings(deadline=None)
@given(cut(simple("ab1- ")), st.sampled_from([r"[ab]{2,4}1", r"\b1-?1\b", "a{3,10}", "-[^-]{1,20}-", "b1|a1"]))
def test_where_no_order_counts_it_is_finditer(pieces: list[str], pattern: str) -> None:
    """The longest match is the first that `re` finds, where alternatives do not differ in length."""
    outs, _, _ = streamed([{"check": "pattern", "patterns": [pattern], "action": "redact"}], pieces)
    assert outs[-1] == re.sub(pattern, "[REDACTED:r0]", "".join(pieces))


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4), st.text("abc", max_size=30))
def test_no_more_is_held_than_what_one_begins_with(wanted: list[str], text: str) -> None:
    scanner = Scanner(pattern_machine([("|".join(wanted), Kind(name="x"))], None))
    told = 0
    for number, character in enumerate(text, 1):
        told += sum(len(part.text) for part in scanner.push(character, False))
        assert told + scanner.held == number
        assert any(one.startswith(text[told:number]) for one in wanted)


@pytest.mark.parametrize(
    ("pattern", "pieces", "outs"),
    [
        ("secret", ["a s", "ee", " sec", "ond"], ["a ", "a see", "a see ", "a see second"]),
        ("secret", ["no such", " thing", "!"], ["no such", "no such thing", "no such thing!"]),
        ("a{3,5}", ["baa", "a", "ab"], ["b", "b", "b[REDACTED:r0]b"]),
        ("ab", ["a", "b", "c"], ["", "", "[REDACTED:r0]c"]),
    ],
)
def test_only_what_may_become_a_match_is_held(pattern: str, pieces: list[str], outs: list[str]) -> None:
    found, _, _ = streamed([{"check": "pattern", "patterns": [pattern], "action": "redact"}], pieces)
    assert found[1:-1] == outs


@settings(deadline=None)
@given(cut(personal_texts | texts), patterns)
def test_what_it_takes_depends_on_no_pieces(pieces: list[str], pattern: str) -> None:
    try:
        machine = pattern_machine([(pattern, Kind(name="x"))], 6)
    except ValueError:
        assume(False)
    at_once, by_piece = Scanner(machine), Scanner(machine)
    at_once.push("".join(pieces), True)
    for piece in pieces:
        by_piece.push(piece, False)
    by_piece.push("", True)
    assert by_piece.steps == at_once.steps


def test_it_takes_a_step_for_a_character() -> None:
    """Or two where a word may become an address; twice the text takes twice as many."""
    rules = [
        pattern_machine([(r"sk-[A-Za-z0-9]{20,64}", Kind(name="x"))], None),
        pattern_machine([(r"(?<![a-z.])[a-z.]+@[a-z.]+\.[a-z]{2,9}", Kind(name="x"))], 200),
        word_machine(["rabbit", "white queen", "march hare"], Kind(name="x")),
    ]
    for machine in rules:
        once, twice = Scanner(machine), Scanner(machine)
        for character in ALICE:
            once.push(character, False)
        for _ in range(2):
            for begin in range(0, len(ALICE), 7):
                twice.push(ALICE[begin : begin + 7], False)
        assert once.steps < 3 * len(ALICE)
        assert abs(twice.steps - 2 * once.steps) < 100


@pytest.mark.parametrize("pattern", ["(?:a+)+b", "(?:a|a)*b", "(?:a|aa)+b", "(?:a*)*b", "(?:.*a){12}b"])
def test_what_takes_others_for_ever_takes_steps_in_proportion(pattern: str) -> None:
    longest, size = 50, 2000
    scanner = Scanner(pattern_machine([(pattern, Kind(name="x"))], longest))
    scanner.push("a" * size, True)
    assert not scanner.exhausted
    assert scanner.steps <= size * longest * 200


def test_a_rule_that_takes_too_many_steps_ends_the_answer() -> None:
    rule = {"check": "pattern", "patterns": ["(?:.?){500}b"], "longest": 500, "action": "flag"}
    outs, stopped, verdicts = streamed([rule], ["fine, " * 3, "a" * 5000, "a" * 5000])
    assert stopped
    assert [(v.action, v.kind) for v in verdicts] == [("stop", "timeout")]
    assert ("fine, " * 3 + "a" * 5000).startswith(outs[-1])


def test_long_texts_let_others_have_their_turn() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        beside = asyncio.create_task(others())
        rules = policies({"check": "pattern", "patterns": ["ab"], "action": "flag"}).for_("t", "m")
        verdict = await rules.check_input("ab" * 50_000, Nobody())
        assert verdict.verdicts == (Verdict(rule="r0", action="flag", stage="input", kind="pattern", count=50_000),)
        beside.cancel()

    asyncio.run(run())
    assert turns > 100_000 / filters._AT_ONCE / 2


def test_what_was_worked_out_is_forgotten_and_worked_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire_cluster.governance.checks.machine._MOST_KEPT", 5)
    holds([{"check": "pattern", "patterns": [r"\ba[ab]{2,5}1"], "action": "redact"}], ["abab1 aa", "1 abbb", "ba1 ab1"])


GOOD = {
    "credit_card": ["4111 1111 1111 1111", "378282246310005", "6011-1111-1111-1117", "4222222222222"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "NO9386011117947"],
    "email": ["a@b.co", "first.last+tag@mail.example.org"],
    "us_ssn": ["078-05-1120", "219 09 9999"],
    "phone": ["+44 20 7946 0958", "+1 (212) 555-0123", "(212) 555-0123", "212-555-0123", "1-212-555-0123"],
    "ip_address": ["192.0.2.1", "2001:db8::1", "fe80::1", "64:ff9b::192.0.2.33"],
}
BAD = {
    "credit_card": ["4111 1111 1111 1112", "0000 0000 0000 0000", "94111111111111111", "1234567890"],
    "iban": ["DE89 3704 0044 0532 0130 01", "DE89", "XDE89370400440532013000"],
    "email": ["a@b", "@example.org", "a at b.co"],
    "us_ssn": ["000-12-3456", "666-12-3456", "912-12-3456", "123-00-4567", "123-45-0000", "078051120", "078-05 1120"],
    "phone": ["2125550123", "+0123456789", "112-555-0123"],
    "ip_address": ["300.1.1.1", "1.2.3", "12:30:45", "std::vector", "::", "aa:bb:cc:dd:ee:ff", "01.02.03.04"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_personal_data_by_published_examples(kind: str) -> None:
    rule = {"check": "pii", "kinds": [kind], "action": "redact"}
    for text in GOOD[kind]:
        assert streamed([rule], list(f"It is {text}."))[0][-1] == f"It is [REDACTED:{kind}].", text
    for text in BAD[kind]:
        assert streamed([rule], list(f"It is {text}, no?"))[0][-1] == f"It is {text}, no?", text


def test_channels_are_texts_of_their_own() -> None:
    async def run() -> None:
        rule = {"check": "words", "words": ["red rum"], "action": "stop"}
        filter = output(rule)
        assert await filter.push("reasoning", "it was red") == [filters.Piece("reasoning", "it was ")]
        assert await filter.push("content", " rum, red ", True) == [filters.Piece("content", " rum, red ")]
        assert [piece.text for piece in await filter.push("call:0", '{"a": "b red')] == ['{"a": "b ']
        assert not filter.stopped
        pieces = await filter.push("call:0", ' Rum"}')
        assert pieces == [filters.Piece("reasoning", "red")]
        assert filter.stopped
        assert filter.verdicts == (Verdict(rule="r0", action="stop", stage="output", kind="words", count=1),)

    asyncio.run(run())


def test_rules_are_for_tenants_models_and_stages() -> None:
    rule = {"check": "words", "words": ["x"], "action": "flag"}
    found = policies(
        {**rule, "tenants": ["research-*"]}, {**rule, "models": ["big", "b?"]}, {**rule, "on": ["input"]}, rule
    )

    async def names(tenant: str, model: str) -> tuple[list[str], list[str]]:
        rules = found.for_(tenant, model)
        assert found.for_(tenant, model) is rules
        verdict = await rules.check_input("x", Nobody())
        filter = rules.output(Nobody())
        assert filter is not None
        await filter.push("content", "x", True)
        return [v.rule for v in verdict.verdicts], [v.rule for v in filter.verdicts]

    assert asyncio.run(names("research-1", "m")) == (["r0", "r2", "r3"], ["r0", "r3"])
    assert asyncio.run(names("sales", "b1")) == (["r1", "r2", "r3"], ["r1", "r3"])
    assert policies({**rule, "on": ["input"]}).for_("t", "m").output(Nobody()) is None
    for number in range(3000):
        found.for_(f"research-{number}", "m")
    assert asyncio.run(names("research-1", "m")) == (["r0", "r2", "r3"], ["r0", "r3"])


def test_inputs_are_redacted_or_refused() -> None:
    rules = policies(
        {"check": "pii", "kinds": ["email"], "action": "redact", "on": ["input"]},
        {"check": "pattern", "patterns": ["EMAIL|email"], "action": "flag"},
        {"check": "words", "words": ["bomb"], "action": "stop"},
    ).for_("t", "m")
    verdict = asyncio.run(rules.check_input("to a@b.co and c@d.eu", Nobody()))
    assert (verdict.text, verdict.stopped) == ("to [REDACTED:email] and [REDACTED:email]", False)
    assert [(v.rule, v.action, v.stage, v.kind, v.count) for v in verdict.verdicts] == [
        ("r0", "redact", "input", "email", 2),
        ("r1", "flag", "input", "pattern", 2),
    ]
    assert asyncio.run(rules.check_input("a Bomb", Nobody())).stopped
    assert asyncio.run(rules.check_input("", Nobody())).verdicts == ()


WRITTEN = """
- name: no-card-numbers
  on: [output]
  check: pii
  kinds: [credit_card, iban]
  action: redact
  tenants: ['research-*']
- {name: no-secrets, check: pattern, patterns: ['sk-[A-Za-z0-9]{20,64}', '(?<!x)y+'], longest: 80, action: stop}
- {name: words, check: words, file: words.txt, action: flag}
- {name: opa, check: webhook, url: 'http://localhost:8181/v1/data/quire/allow', every: 100, action: stop}
- {name: judge, check: judge, model: guard, prompt: 'Is it safe? {text}', stop_on: unsafe, action: stop}
"""


def test_the_file_as_yaml_reads_it(tmp_path: Path) -> None:
    """Which takes `on` for true."""
    (tmp_path / "words.txt").write_text("foo\n\nbar baz\n")
    read = Policies.parse(yaml.safe_load(WRITTEN), tmp_path)
    first, _, third, fourth, fifth = read.canonical
    assert first["on"] == ["output"]
    assert third["words"] == ["foo", "bar baz"]
    assert (fourth["timeout"], fourth["on_error"], fourth["every"]) == (2.0, "closed", 100)
    assert (fifth["timeout"], fifth["on_error"], fifth["every"]) == (10.0, "closed", 400)
    assert Policies.parse(read.canonical, Path("/nowhere")).digest == read.digest
    assert re.fullmatch("[0-9a-f]{64}", read.digest)
    digests = {read.digest}
    for old, new in [
        ("y+", "z+"),
        ("100", "101"),
        ("research", "sales"),
        ("[output]", "[input]"),
        ("every: 100, action: stop", "every: 100, action: flag"),
    ]:
        digests.add(Policies.parse(yaml.safe_load(WRITTEN.replace(old, new)), tmp_path).digest)
    (tmp_path / "words.txt").write_text("foo\nbar\n")
    digests.add(Policies.parse(yaml.safe_load(WRITTEN), tmp_path).digest)
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("fields", "field", "mend"),
    [
        ("check: pattern, patterns: ['a+']", "patterns", "longest: 80"),
        ("check: pattern, patterns: ['a{1,5000}']", "patterns", "longest: 80"),
        ("check: pattern, patterns: ['a*']", "patterns", r"write \+ in place of \*"),
        ("check: pattern, patterns: ['(']", "patterns", "no regular expression"),
        ("check: pattern, patterns: ['a+?b'], longest: 9", "patterns", "leave out its \\?"),
        ("check: pattern, patterns: ['a++b'], longest: 9", "patterns", "leave out its second \\+"),
        ("check: pattern, patterns: ['(?>a+)b'], longest: 9", "patterns", "write \\(\\?:"),
        ("check: pattern, patterns: ['(a)\\1']", "patterns", "write out what may stand there"),
        ("check: pattern, patterns: ['(a)?b(?(1)c|d)']", "patterns", "as alternatives"),
        ("check: pattern, patterns: ['ab$']", "patterns", r"write \\Z"),
        ("check: pattern, patterns: ['a(?=bc)']", "patterns", "a single one or a set"),
        ("check: pattern, patterns: ['(?<!ab)c']", "patterns", "a single one or a set"),
        ("check: pattern, patterns: ['abc'], longest: 2", "patterns", "raise it"),
        ("check: pattern, patterns: ['(a{1,60}b{1,60}){1,60}'], longest: 80", "patterns", "4096 steps"),
        ("check: pattern, patterns: ['a'], longest: 9999", "longest", "4096"),
        ("check: pattern, patterns: ['a'], longst: 9", "longst", "mend its spelling"),
        ("check: pattern, patterns: []", "patterns", "at least 1"),
        ("check: words, words: [yes, foo]", "words.0", "quotes"),
        ("check: words, words: [' ']", "words", "characters"),
        ("check: words, file: none.txt", "file", "one word stands on a line"),
        ("check: words, file: 3", "file", "words.txt"),
        ("check: words, file: a, words: [b]", "file", "leave one out"),
        ("check: pii, kinds: [name]", "kinds.0", "credit_card"),
        ("check: pii", "kinds", "write it"),
        ("check: regex, patterns: [a]", "check", "pii, pattern, words, webhook, judge"),
        ("patterns: [a]", "check", "pii, pattern, words, webhook, judge"),
        ("check: words, words: [a], action: block", "action", "redact"),
        ("check: words, words: [a], on: [prompt]", "on.0", "input"),
        ("check: words, words: [a], on: [input], 'on': [input]", "on", "leave one out"),
        ("check: webhook, url: 'ftp://a/b'", "url", "http://"),
        ("check: webhook, url: 'http://me:word@a/b'", "url", "password"),
        ("check: webhook, url: 'http://['", "url", "http://"),
        ("check: webhook, url: 'http://a/b', every: yes", "every", "quotes"),
        ("check: judge, model: m, stop_on: ' ', prompt: '{text}'", "stop_on", "begins with"),
        ("check: webhook, url: 'http://a/b', timeout: 0", "timeout", "greater than 0"),
        ("check: webhook, url: 'http://a/b', on_error: ignore", "on_error", "closed"),
        ("check: judge, model: m, stop_on: no, prompt: '{text}'", "stop_on", "quotes"),
        ("check: judge, model: m, stop_on: unsafe, prompt: 'Is it safe?'", "prompt", "{text}"),
    ],
)
def test_what_is_refused_and_how_to_mend_it(fields: str, field: str, mend: str, tmp_path: Path) -> None:
    action = "" if "action" in fields else ", action: flag"
    given = yaml.safe_load(f"- {{name: mine, {fields}{action}}}")
    with pytest.raises(InvalidParameter, match=mend) as refused:
        Policies.parse(given, tmp_path)
    assert str(refused.value).startswith(f"policies: rule mine: {field}: ")


def test_rules_have_names_of_their_own() -> None:
    rule = {"name": "a", "check": "words", "words": ["x"], "action": "flag"}
    with pytest.raises(InvalidParameter, match="rule a: name: another rule"):
        Policies.parse([rule, rule], HERE)
    with pytest.raises(InvalidParameter, match="rule number 2: name: it is missing"):
        Policies.parse([rule, {"check": "words", "words": ["x"], "action": "flag"}], HERE)
    with pytest.raises(InvalidParameter, match="rule a b: name"):
        Policies.parse([rule | {"name": "a b"}], HERE)
    with pytest.raises(InvalidParameter, match="rule number 1: it: "):
        Policies.parse(["a"], HERE)
