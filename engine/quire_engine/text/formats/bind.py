"""A format and a vocabulary: which delimiters are tokens of their own.

A parser reads marked text, in which each such token is one lone surrogate, which no detokenizer writes: ordinary text
that spells a delimiter is content then.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from quire_engine.text.formats.facts import (
    Calls,
    Either,
    Format,
    Json,
    Literals,
    Mark,
    Maybe,
    Pieces,
    Reasoning,
    Section,
    Style,
    Tagged,
    Text,
)
from quire_engine.text.formats.matching import find
from quire_engine.text.tokenizer import Tokenizer

_FIRST = 0xD800
_TAIL = 64  # tokens that an opener of reasoning and what may stand behind it take at most
_SPACES = " \t\n\r"


@dataclass(frozen=True, kw_only=True)
class BoundFormat:
    """A format whose marks are those of a vocabulary, each spelled as its character in marked text."""

    name: str
    reasoning: Reasoning | None
    calls: Calls | None
    written: Section | None  # how calls are written under a mask
    marks: Mapping[int, str]  # token id → its character
    spelled: Mapping[str, str]  # character → the token's text
    shown: frozenset[str]  # the characters of calls' marks that are text where no calls are looked for

    @property
    def tokens(self) -> dict[str, int]:
        """Character → token id."""
        return {character: token for token, character in self.marks.items()}


def bind(form: Format, tokenizer: Tokenizer) -> BoundFormat:
    """The format as this vocabulary can write it. Marks that the vocabulary lacks are ordinary text."""
    tokens = {text: token for token, text in tokenizer.added_tokens.items()}
    reasoning, calls = form.reasoning, form.calls
    of_reasoning = (
        []
        if reasoning is None
        else [
            reasoning.begin,
            reasoning.end,
            reasoning.before_content,
            reasoning.after_content,
            reasoning.before_calls,
            *reasoning.dropped,
        ]
    )
    of_calls = [] if calls is None else [pieces for one in calls.sections for pieces in _pieces_of(one)]
    used = dict.fromkeys((*_marks(of_reasoning), *_marks(of_calls if calls is None else [*of_calls, *calls.dropped])))
    letters = dict(zip((mark for mark in used if mark in tokens), map(chr, count(_FIRST)), strict=False))
    only_calls = set(_marks(of_calls)) - set(_marks(of_reasoning))
    return BoundFormat(
        name=form.name,
        reasoning=reasoning and _bound_reasoning(reasoning, letters),
        calls=calls
        and replace(
            calls,
            sections=tuple(_bound_section(one, letters) for one in calls.sections),
            dropped=tuple(_bound(pieces, letters) for pieces in calls.dropped),
        ),
        written=None if calls is None else _bound_section(_written(calls, letters), letters),
        marks={tokens[text]: letter for text, letter in letters.items()},
        spelled={letter: text for text, letter in letters.items()},
        shown=frozenset(
            letter
            for text, letter in letters.items()
            if text in only_calls and tokens[text] not in tokenizer.special_tokens
        ),
    )


def begins_in_reasoning(
    form: BoundFormat, prompt: Sequence[int], tokenizer: Tokenizer, *, continued: str | None = None
) -> bool:
    """Whether what follows a prompt is reasoning: it ends with the opener. Reasoning in past turns means nothing.

    `continued`: the text of a final message that is gone on with.
    """
    if form.reasoning is None:
        return False
    tail = marked_tail(form, prompt, tokenizer, _TAIL if continued is None else _TAIL + len(continued.encode()))
    if continued is not None:
        begun, closed = (
            continued.rfind(_plain(pieces, form.spelled)) for pieces in (form.reasoning.begin, form.reasoning.end)
        )
        if begun >= 0 or closed >= 0:
            return begun > closed
        tail = tail.rstrip(_SPACES).removesuffix(continued.strip(_SPACES))
    return _ends_with(form.reasoning.begin, tail.rstrip(_SPACES))


def ends_reasoning(form: BoundFormat, prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends with the end of reasoning: some templates write an empty one where none is wanted."""
    return form.reasoning is not None and _ends_with(
        form.reasoning.end, marked_tail(form, prompt, tokenizer, _TAIL).rstrip(_SPACES)
    )


def marked_tail(form: BoundFormat, prompt: Sequence[int], tokenizer: Tokenizer, most: int) -> str:
    """The marked text of a prompt's last tokens."""
    written: list[str] = []
    for token in prompt[-most:]:
        mark = form.marks.get(token)
        written.append(mark if mark is not None else tokenizer.token_bytes(token).decode("utf-8", "replace"))
    return "".join(written)


def _ends_with(pieces: Pieces, text: str) -> bool:
    for at in range(len(text)):
        found = find(pieces, text, at, ended=True)
        if not isinstance(found, bool) and found.end == len(text):
            return True
    return False


def _plain(pieces: Pieces, spelled: Mapping[str, str]) -> str:
    """Pieces as they are usually written, but for whitespace."""
    written = ""
    for piece in pieces:
        if isinstance(piece, Either):
            written += _plain(piece.options[0], spelled)
        elif isinstance(piece, Text | Mark):
            written += spelled.get(piece.text, piece.text)
    return written


def _written(calls: Calls, letters: Mapping[str, str]) -> Section:
    """The first section of which the vocabulary has all marks."""
    whole = (one for one in calls.sections if all(mark in letters for mark in _marks(_pieces_of(one))))
    return next(whole, calls.sections[0])


def _pieces_of(section: Section) -> list[Pieces]:
    style = section.call.arguments
    found = [section.begin, section.call.before, section.call.after, section.between or (), section.end, section.apart]
    if isinstance(style, Tagged):
        found += [style.key, style.value, style.close]
    return found + ([style.quote] if isinstance(style, Literals) else [])


def _marks(groups: Sequence[Pieces]) -> Iterator[str]:
    for pieces in groups:
        for piece in pieces:
            if isinstance(piece, Mark):
                yield piece.text
            elif isinstance(piece, Maybe):
                yield from _marks([piece.pieces])
            elif isinstance(piece, Either):
                yield from _marks(piece.options)


def _bound(pieces: Pieces, letters: Mapping[str, str]) -> Pieces:
    bound: Pieces = ()
    for piece in pieces:
        if isinstance(piece, Mark):
            bound += (Mark(letters[piece.text]) if piece.text in letters else Text(piece.text),)
        elif isinstance(piece, Maybe):
            bound += (Maybe(_bound(piece.pieces, letters)),)
        elif isinstance(piece, Either):
            bound += (Either(tuple(_bound(option, letters) for option in piece.options)),)
        else:
            bound += (piece,)
    return bound


def _bound_reasoning(reasoning: Reasoning, letters: Mapping[str, str]) -> Reasoning:
    return replace(
        reasoning,
        begin=_bound(reasoning.begin, letters),
        end=_bound(reasoning.end, letters),
        before_content=_bound(reasoning.before_content, letters),
        after_content=_bound(reasoning.after_content, letters),
        before_calls=_bound(reasoning.before_calls, letters),
        dropped=tuple(_bound(pieces, letters) for pieces in reasoning.dropped),
    )


def _bound_section(section: Section, letters: Mapping[str, str]) -> Section:
    call = section.call
    return replace(
        section,
        begin=_bound(section.begin, letters),
        call=replace(
            call,
            before=_bound(call.before, letters),
            arguments=_bound_style(call.arguments, letters),
            after=_bound(call.after, letters),
        ),
        between=None if section.between is None else _bound(section.between, letters),
        end=_bound(section.end, letters),
        apart=_bound(section.apart, letters),
    )


def _bound_style(style: Style, letters: Mapping[str, str]) -> Style:
    if isinstance(style, Json):
        return style
    if isinstance(style, Literals):
        return replace(style, quote=_bound(style.quote, letters))
    return replace(
        style, key=_bound(style.key, letters), value=_bound(style.value, letters), close=_bound(style.close, letters)
    )
