"""Several places of a row in one step: what is drawn, and what is remembered of it, is what steps of one place give."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import llguidance
import numpy as np
import pytest
import torch
from guided import END, SIZE
from quire_engine.guidance.compiled import Guides
from quire_engine.guidance.cursor import Cursor
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.memory.dry_run import META
from quire_engine.request import EngineSampling, TokenSet
from quire_engine.sampling.sampler import Drawn, Sampler
from quire_engine.step import REJECTED, NewRow, Places, TokenLogprobs
from quire_kernels.sampling import Rows
from quire_kernels.torch_backend import TorchBackend
from test_edits import edited
from test_guidance import SCHEMA, STRUCTURES
from test_guidance_cursor import LIKELY, THINK, THOUGHT, VOCABULARY, content, guides, letters, thinking
from test_sampling import Operations

CPU = torch.device("cpu")
MOST = 30  # tokens of an output
OFTEN = 30  # tokens that are likely, so that what speaks of them matters
SPECS = [GuidanceSpec(content=content(**structure)) for structure, _ in STRUCTURES.values()] + [
    GuidanceSpec(content=content(json=SCHEMA), thinking=thinking(budget=4, closing=(*letters("."), THOUGHT))),
    GuidanceSpec(content=content(choice=["yes", "no"]), thinking=thinking(inside=False, opening=(THINK,))),
    GuidanceSpec(content=content(regex="[a-c]{2,9}"), thinking=thinking()),
    *(guide.spec for guide in guides()),
]
WRITTEN = [*LIKELY, *letters('2"{}:[], cno+'), END]  # with which all of them get somewhere


@dataclass
class Life:
    """A request's: its logits are a function of the last two tokens and the position."""

    number: int
    params: EngineSampling
    prompt: list[int]
    out: list[int] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)

    def logits(self, more: Sequence[int] = ()) -> torch.Tensor:
        log = [*self.prompt, *self.out, *more]
        seed = zlib.crc32(np.array([self.number % 3, len(log) % 3, *log[-2:]], np.int64).tobytes())
        raw = 2 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        if self.params.guidance:
            raw[WRITTEN] += 5
            raw[letters("<n>1.") if self.number % 2 else LIKELY] += 2
        else:
            raw[4:OFTEN] += 5
        return raw

    @property
    def ended(self) -> bool:
        if len(self.out) >= self.params.max_tokens or self.out[-1:] == [-1]:
            return True
        return len(self.out) > self.params.min_tokens and self.out[-1] in self.params.stop_token_ids

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.out)

    def take(self, row: int) -> NewRow:
        return NewRow(row, self.params, len(self.prompt), np.array(self.prompt + self.out, np.int32))


def random_life(generator: np.random.Generator, number: int, guided: bool) -> Life:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(4, OFTEN, count).tolist())

    def one_of(*values: Any) -> Any:
        return values[generator.integers(len(values))]

    prompt = list(tokens(int(generator.integers(1, 25))))
    asked: dict[str, Any] = {
        "bad_words": (*(tokens(one_of(1, 2, 2, 2, 3, 20)) for _ in range(40)), (*prompt[-5:], *tokens(1))),
        "allowed_token_ids": TokenSet.of((*tokens(one_of(1, 8, 20)), *(WRITTEN if guided else ()))),
        "logit_bias": {token: one_of(-100.0, 100.0, 1.5) for token in tokens(6)},
        "repetition_penalty": one_of(0.01, 1.3, 100.0),
        "presence_penalty": one_of(-2.0, 2.0),
        "frequency_penalty": one_of(-2.0, 2.0),
        "temperature": one_of(0.5, 1.0, 1.5),
        "top_k": one_of(1, 5, 40),
        "top_p": one_of(0.3, 0.9),
        "min_p": one_of(0.01, 0.2),
        "logprobs": one_of(0, 1, 5),
    }
    chosen = {"temperature": 0.0} | {name: value for name, value in asked.items() if generator.random() < 0.35}
    stops = (END,) if guided else tokens(3)
    spec = SPECS[generator.integers(len(SPECS))].to_json() if guided else ""
    params = EngineSampling(
        seed=number, min_tokens=one_of(0, 1, 20), stop_token_ids=stops, guidance=spec, max_tokens=MOST, **chosen
    )
    return Life(number, params, prompt)


def sampler(rows: int) -> Sampler:
    return Sampler(rows, SIZE, CPU, TorchBackend(), Guides(lambda: VOCABULARY))


def draw(one: Sampler, logits: Sequence[torch.Tensor], places: Places) -> Drawn:
    names = ("seeds", "temperature", "top_k", "top_p", "min_p")
    tables = {name: torch.from_numpy(values) for name, values in zip(names, one.tables(places.rows), strict=True)}
    return one.draw(torch.stack(list(logits)), places, Rows(**tables, positions=torch.from_numpy(places.positions)))


def places_of(rows: Iterable[tuple[int, int, Sequence[int]]]) -> Places:
    """Of each row: its number, how long its log is, its drafts."""
    each = [(row, at + n, draft) for row, at, drafts in rows for n, draft in enumerate([-1, *drafts])]
    return Places(*np.array(each, np.int32).T.copy())


def keep_scores(drawn: Drawn, lives: dict[int, Life]) -> None:
    """Those of valid places."""
    first = 0
    for row, width, where in drawn.scored:
        assert drawn.scores is not None
        assert width == lives[row].params.logprobs
        for number, place in enumerate(where):
            if int(drawn.tokens[place]) != REJECTED:
                at = slice(first + number, first + number + 1)
                lives[row].scores.append(drawn.scores.read(at, width))
        first += len(where)


def live(lives: list[Life]) -> None:
    """Step by step, without drafts."""
    one = sampler(len(lives))
    one.set_rows([life.take(row) for row, life in enumerate(lives)])
    going = dict(enumerate(lives))
    while going := {row: life for row, life in going.items() if not life.ended}:
        places = places_of((row, life.position, ()) for row, life in going.items())
        drawn = draw(one, [life.logits() for life in going.values()], places)
        assert not drawn.failed
        keep_scores(drawn, going)
        for life, token in zip(going.values(), drawn.tokens.tolist(), strict=True):
            life.out.append(token)


def guesses(generator: np.random.Generator, coming: Sequence[int]) -> list[int]:
    """Drafts: right for a while, maybe, then tokens of any kind."""
    count, right = int(generator.integers(0, 6)), int(generator.integers(0, 7))
    found = [token for token in coming[: min(count, right)] if token >= 0]
    while len(found) < count:
        kinds = (int(generator.integers(4, OFTEN)), int(generator.integers(SIZE)), END, SIZE + 5, int(coming[0]))
        found.append(max(0, kinds[generator.integers(len(kinds))]))
        if len(found) < len(coming) and generator.random() < 0.5:
            found.append(max(0, coming[len(found)]))  # the wrong one is left, and right ones come
    return found[:5]


def live_by_drafts(
    generator: np.random.Generator, truths: list[Life], rows: int, *, cut: bool = False
) -> tuple[list[Life], int]:
    """The same requests a few at a time, in rows that they leave to others; and how many drafts came true. `cut`: some
    may be rejected although they are right."""
    one = sampler(rows)
    waiting = [Life(truth.number, truth.params, truth.prompt) for truth in truths]
    again, going, true = list(waiting), dict[int, Life](), 0
    while going or waiting:
        news = [(row, waiting.pop(0)) for row in range(rows) if row not in going and waiting]
        going |= dict(news)
        one.set_rows([life.take(row) for row, life in news])
        some = [row for row in generator.permutation(list(going)).tolist() if generator.random() < 0.8] or [*going][:1]
        drafts = {row: guesses(generator, coming(going[row], truths)) for row in some}
        places = places_of((row, going[row].position, drafts[row]) for row in some)
        logits = [going[row].logits(drafts[row][:n]) for row in some for n in range(len(drafts[row]) + 1)]
        drawn = draw(one, logits, places)
        assert not drawn.failed
        assert drawn.tokens.dtype == torch.int32
        keep_scores(drawn, going)
        tokens = drawn.tokens.tolist()
        for row in some:
            life, known, right = going[row], drafts[row], coming(going[row], truths)
            came, tokens = tokens[: len(known) + 1], tokens[len(known) + 1 :]
            valid = 1 + next((n for n, token in enumerate(known) if [token] != right[n : n + 1]), len(known))
            if cut and REJECTED in came[1:valid]:
                valid = came.index(REJECTED)
            expected = [*right[:valid], *[REJECTED] * (len(came) - valid)]
            assert came[: len(right)] == expected[: len(right)]  # what comes after an end is nobody's
            true += min(valid, len(right)) - 1
            life.out += right[:valid]
            del life.scores[len(life.out) if life.scores else 0 :]
            if life.ended:
                del going[row]
    return again, true


def coming(life: Life, truths: list[Life]) -> list[int]:
    return truths[life.number].out[len(life.out) :]


def same(one: TokenLogprobs, other: TokenLogprobs) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name.endswith("logprobs"))
        for name in TokenLogprobs.__slots__
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_drafts_change_nothing(seed: int, guided: bool) -> None:
    generator = np.random.default_rng(seed)
    lives = [random_life(generator, number, guided and number % 4 > 0) for number in range(24)]
    live(lives)
    for life in lives:
        if life.params.temperature == 0 and not life.params.guidance:
            for at, token in enumerate(life.out):
                raw = Life(life.number, life.params, life.prompt, life.out[:at]).logits().numpy()
                left = edited(raw, life.prompt, life.out[:at], life.params)
                assert (left.max() == -np.inf) if token < 0 else left[token] >= left.max() - 1e-3
    again, true = live_by_drafts(generator, lives, 7)
    assert [life.out for life in again] == [life.out for life in lives]
    assert true > 100, "hardly a draft was right"
    if guided:
        assert sum(len(life.out) for life in lives if life.params.guidance) > 100, "outputs end before they begin"
    for life, other in zip(lives, again, strict=True):
        assert len(life.scores) == len(other.scores)
        assert all(map(same, life.scores, other.scores))


# ---- failures -------------------------------------------------------------------------------------------------------


def wanting(life: Life, tokens: str, before: int = 0) -> list[torch.Tensor]:
    """Logits with which these letters are drawn, where they may be."""
    found = []
    for letter in letters(tokens)[before:]:
        found.append(life.logits())
        found[-1][letter] += 100
    return found


def two_lives(spec: GuidanceSpec) -> tuple[Sampler, list[Life]]:
    """Of which one has this spec, and the other may write any letters."""
    one, other = sampler(2), GuidanceSpec(content=content(regex="[a-z]{50}"))
    lives = [Life(n, EngineSampling(temperature=0.0, guidance=g.to_json()), [5]) for n, g in enumerate((spec, other))]
    one.set_rows([life.take(row) for row, life in enumerate(lives)])
    return one, lives


def check_pause(one: Sampler, lives: list[Life], text: str, good: str) -> str:
    """Where all of `text` is wanted and guessed, `good` is drawn, and then the row fails: why."""
    drafts = [letters(text)[:-1], letters("abc")]
    logits = wanting(lives[0], text) + wanting(lives[1], "abcd")
    drawn = draw(one, logits, places_of((row, 1, drafts[row]) for row in (0, 1)))
    assert drawn.failed == {}
    rejected = [REJECTED] * (len(text) - len(good))
    assert drawn.tokens.tolist() == [*letters(good), *rejected, *letters("abcd")]
    logits = wanting(lives[0], "yz") + wanting(lives[1], "efg")
    again = places_of([(0, 1 + len(good), letters("y")), (1, 5, letters("ef"))])
    drawn = draw(one, logits, again)
    assert list(drawn.failed) == [0]
    assert drawn.tokens[1:].tolist() == [REJECTED, *letters("efg")]
    return drawn.failed[0][0]


def test_a_grammar_that_breaks_at_a_draft_fails_its_row_once_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    advance, spec, breaking = Cursor.advance, GuidanceSpec(content=content(regex="[a-z]{40}")), letters("q")

    def raising(cursor: Cursor, token: int) -> None:
        if [token] == breaking and cursor.guide.spec == spec:
            raise RuntimeError("a bug")
        advance(cursor, token)

    one, lives = two_lives(spec)
    monkeypatch.setattr(Cursor, "advance", raising)
    assert "internal" in check_pause(one, lives, "abqcd", "abq")
    one, lives = two_lives(spec)
    drawn = draw(one, wanting(lives[0], "abx") * 2, places_of([(0, 1, letters("abq")[1:]), (1, 1, letters("bx"))]))
    assert drawn.failed == {}, "a guess does no harm"


MANY = [f'm{n}: /[a-z]/ {n % 7 * "/[a-z]/ "} "{n}"' for n in range(60)]
TOO_MUCH: dict[str, tuple[dict[str, int], dict[str, str], str, str]] = {  # limits, content, what is wanted and drawn
    "at the token": (
        {"max_items_in_row": 40},
        {"grammar": "\n".join(['start: "xx" many', "many: " + " | ".join(f"m{n}" for n in range(60)), *MANY])},
        "xxab",
        "x",
    ),
    "at the mask": ({"max_lexer_states": 60}, {"regex": r"(.|\n)*a(.|\n){300}"}, "bazyxw", "baz"),
}


@pytest.mark.parametrize("where", TOO_MUCH)
def test_a_matcher_that_gives_up_behind_drafts_fails_its_row_once_they_are_drawn(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, structure, wanted, drawn = TOO_MUCH[where]
    monkeypatch.setattr("quire_engine.guidance.grammars.limits", lambda: llguidance.LLParserLimits(**limits))
    monkeypatch.setattr("quire_engine.guidance.rows._QUICK", 0.0)
    one, lives = two_lives(GuidanceSpec(content=content(**structure)))
    assert "simplify" in check_pause(one, lives, wanted, drawn)


def test_grammars_are_compiled_anew_between_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows, and what guesses are followed to, fill a lexer together."""
    spec = GuidanceSpec(content=content(regex=r"(.|\n)*a(.|\n){300}"))
    lives = [Life(n, EngineSampling(seed=n, max_tokens=12, guidance=spec.to_json()), [5 + n]) for n in range(12)]
    live(lives)
    limits, dropped, drop = llguidance.LLParserLimits(max_lexer_states=100), list[str](), Guides.drop
    monkeypatch.setattr("quire_engine.guidance.grammars.limits", lambda: limits)
    monkeypatch.setattr("quire_engine.guidance.rows._QUICK", 1e9)
    monkeypatch.setattr(Guides, "drop", lambda self, *dropping: (dropped.append("one"), drop(self, *dropping)))
    again, true = live_by_drafts(np.random.default_rng(0), lives, 5, cut=True)
    assert [life.out for life in again] == [life.out for life in lives]
    assert true > 20
    assert dropped, "there was room"


# ---- the device -----------------------------------------------------------------------------------------------------


class _Nowhere(TorchBackend):
    """Draws without a number in sight."""

    def draw(self, logits: torch.Tensor, rows: Rows, filtered: bool) -> torch.Tensor:
        return torch.empty(len(logits), dtype=torch.int32, device=META)


def test_drafts_are_verified_on_the_device_in_as_many_operations_for_all_rows() -> None:
    """Reading a value of it would raise."""
    counts = []
    for rows, most in ((3, 1), (24, 6)):
        one = Sampler(rows, SIZE, META, _Nowhere())
        everything = EngineSampling(
            bad_words=((1,), (2, 3), (4, 5, 6)),
            repetition_penalty=1.2,
            logit_bias={1: 2.0},
            logprobs=2,
            min_tokens=3,
            stop_token_ids=(9,),
            allowed_token_ids=TokenSet.of((1, 2, 3, 4)),
        )
        one.set_rows([NewRow(row, everything, 2, np.arange(3, dtype=np.int32)) for row in range(rows)])
        places = places_of((row, 3, list(range(row % (most + 1)))) for row in range(rows))
        tensors = [torch.from_numpy(values).to(META) for values in (*one.tables(places.rows), places.positions)]
        names = ("seeds", "temperature", "top_k", "top_p", "min_p", "positions")
        logits = torch.empty((len(places.rows), SIZE), device=META)
        with Operations() as operations:
            drawn = one.draw(logits, places, Rows(**dict(zip(names, tensors, strict=True))))
        assert drawn.tokens.shape == places.rows.shape
        assert [where for _, _, where in drawn.scored] == list(places.by_row().values())
        counts.append(operations.count)
    assert counts[0] + 10 > counts[1]  # pieces of the upload aside
