"""Calls as a grammar, in llguidance's Lark: made of the same facts that the parser reads by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.bind import BoundFormat
from quire_engine.text.formats.facts import Blank, Either, Literals, Mark, Pieces, Section, Space, Tagged, Text, leading
from quire_engine.text.formats.lark import Lark
from quire_engine.text.formats.tools import Tool
from quire_engine.text.formats.values import LiteralRules, json_rule, kept_to, pair_rules

Opener = tuple[str | int, ...]
_MAX_OPENERS = 8  # of one section


@dataclass(frozen=True, kw_only=True)
class CallRules:
    """Rules of a grammar, named `calls_...`, for a vocabulary in which every mark of the format is a special token:
    else a mask would allow it within a text, where the parser takes it for the delimiter that it is."""

    tools: list[Tool]  # with schemas that a grammar can hold to
    lark: str  # `calls_open` and `calls_body`: a section's opener and all the rest of it; `calls_all`: all calls
    openers: list[Opener]  # what may begin a section within content: texts and token ids, one after the other
    signs: list[Opener]  # what tells that one has begun: an opener, or more of it where it might be content as well
    only_first: bool  # whether a section counts only where content begins
    repeats: bool  # whether a further section may follow one


def call_rules(
    form: BoundFormat, tools: Sequence[Tool], *, parallel: bool, most: int, section: Section | None = None
) -> CallRules:
    """Calls of these tools, `most` at most, and one where they are not `parallel`. `section`: another
    way of the format's to write them, which wants the `tools` of the first one's rules; None: the way that is written
    where calls are required. Raises InvalidParameter for a tool whose schema cannot be a grammar."""
    tools = [kept_to(tool) for tool in tools] if section is None else list(tools)
    section = section or form.written
    if section is None or not tools:
        raise InvalidParameter(
            "this model's format has no tool calls; leave tool_choice out, or have the server started with a "
            "tool-call parser",
            "tool_choice",
        )
    lark = Lark(form.tokens)
    before = section.call.before
    name = before.index(Blank.NAME)
    opened = leading(section.begin) is not None
    opening, rest = _opening(section.begin) if opened else (before[:name], ())
    first = before[:name] if opened else ()
    calls = [_call(lark, section, tool, place) for place, tool in enumerate(tools)]
    lark.rule("calls_named", " | ".join(calls))
    more = max((most if parallel else 1) - 1, 0)
    several = section.between is not None and more
    following = f"({lark.sequence(section.between or (), before[:name], 'calls_named')}){{0,{more}}}" if several else ""
    lark.rule("calls_open", lark.sequence(opening))
    lark.rule("calls_body", lark.sequence(rest, first, "calls_named", following, section.end))
    again = f"({lark.sequence(section.apart, 'calls_open calls_body')}){{0,{more}}}"
    repeats = bool(section.repeats and more)
    lark.rule("calls_all", lark.sequence("calls_open calls_body", again if repeats and not several else ""))
    openers = [opener_of(lark, pieces) for pieces in islice(_openings(opening), _MAX_OPENERS)]
    signs = openers
    if section.only_first:
        signs = [opener_of(lark, _named(section, tool)) for tool in tools]
    elif all(isinstance(piece, Text) and piece.text.isalpha() for piece in opening):
        signs = [opener_of(lark, section.begin)]  # a word alone is content
    return CallRules(
        tools=tools,
        lark=lark.text(),
        openers=openers,
        signs=signs,
        only_first=section.only_first,
        repeats=repeats,
    )


def _named(section: Section, tool: Tool) -> Pieces:
    """How a section begins whose first call is of this tool, up to what ends the name."""
    before = section.call.before
    name = before.index(Blank.NAME)
    end = next((place for place in range(name + 1, len(before)) if isinstance(before[place], Text | Mark)), name)
    begin = section.begin[1:] if section.begin and isinstance(section.begin[0], Space) else section.begin
    return (*begin, *before[:name], Text(tool.name), *before[name + 1 : end + 1])


def _call(lark: Lark, section: Section, tool: Tool, place: int) -> str:
    """A call from its name on."""
    call, name = section.call, f"calls_of_{place}"
    if isinstance(call.arguments, Tagged):
        arguments = pair_rules(lark, call.arguments, tool, name)
    elif isinstance(call.arguments, Literals):
        arguments = LiteralRules(lark, call.arguments, tool, name).arguments()
    else:
        arguments = json_rule(tool, tool.parameters)
    rest = call.before[call.before.index(Blank.NAME) + 1 :]
    return lark.rule(name, lark.sequence((Text(tool.name), *rest), arguments, call.after))


def _opening(begin: Pieces) -> tuple[Pieces, Pieces]:
    """A section's beginning, cut behind the texts and tokens that tell that it is one."""
    start = next(place for place, piece in enumerate(begin) if not isinstance(piece, Space))
    end = next(
        (place for place in range(start, len(begin)) if not isinstance(begin[place], Text | Mark | Either)), len(begin)
    )
    return begin[start:end], begin[end:]


def _openings(opening: Pieces) -> Iterator[Pieces]:
    """The ways to write it, the usual one first."""
    options = [piece.options if isinstance(piece, Either) else ((piece,),) for piece in opening]
    return (tuple(piece for option in chosen for piece in option) for chosen in product(*options))


def opener_of(lark: Lark, pieces: Pieces) -> Opener:
    """The texts and token ids of pieces, as they are usually written."""
    opener: list[str | int] = []
    for piece in pieces:
        if isinstance(piece, Mark):
            opener.append(lark.tokens[piece.text])
        elif isinstance(piece, Either):
            opener += opener_of(lark, piece.options[0])
        elif isinstance(piece, Text | Space):
            opener.append(piece.text if isinstance(piece, Text) else piece.usual)
    merged: list[str | int] = []
    for one in opener:
        if merged and isinstance(one, str) and isinstance(last := merged[-1], str):
            merged[-1] = last + one
        else:
            merged.append(one)
    return tuple(one for one in merged if one != "")
