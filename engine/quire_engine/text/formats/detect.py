"""Which format a model has: by name, or by what its chat template writes."""

from collections.abc import Sequence

from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.bind import BoundFormat, marked_tail
from quire_engine.text.formats.facts import Format
from quire_engine.text.formats.families import (
    CALL_NAMES,
    CALL_SIGNS,
    CALLS,
    PLAIN,
    REASONING,
    REASONING_NAMES,
    REASONING_SIGNS,
)
from quire_engine.text.formats.parser import OutputParser
from quire_engine.text.formats.tools import Tool
from quire_engine.text.tokenizer import Tokenizer
from quire_engine.text.tool_facts import PROBE

NONE = "none"
_BEFORE_NAME = 200  # characters of what begins a call


def format_of(tool_parser: str | None, reasoning_parser: str | None, *, otherwise: Format) -> Format:
    """The format of these names, each of which may be "none"; what is not named is as in `otherwise`. Raises
    InvalidParameter for an unknown one."""
    calls, reasoning = otherwise.calls, otherwise.reasoning
    if tool_parser is not None:
        known = _known(tool_parser, CALL_NAMES, "tool_call_parser")
        calls = None if known is None else CALLS[known]
    if reasoning_parser is not None:
        known = _known(reasoning_parser, REASONING_NAMES, "reasoning_parser")
        reasoning = None if known is None else REASONING[known]
    names = (name for name in (tool_parser, reasoning_parser) if name)
    return Format(name="+".join(names) or otherwise.name, reasoning=reasoning, calls=calls)


def detect(template_source: str, tokenizer: Tokenizer) -> Format:
    """The format that a chat template writes; what it does not tell is told by the vocabulary, if anything does."""
    added = "\n".join(tokenizer.added_tokens.values())
    calls = _told_by(CALL_SIGNS, template_source) or _told_by(CALL_SIGNS, added)
    reasoning = _told_by(REASONING_SIGNS, template_source) or _told_by(REASONING_SIGNS, added)
    return Format(
        name="+".join(name for name in (calls, reasoning) if name) or PLAIN.name,
        reasoning=REASONING[reasoning] if reasoning else None,
        calls=CALLS[calls] if calls else None,
    )


def reads(form: BoundFormat, example: str, tokenizer: Tokenizer) -> bool:
    """Whether a call of PROBE in an example is one by this format. An example without any tells nothing."""
    tokens = tokenizer.encode(example, add_special_tokens=False)
    text = marked_tail(form, tokens, tokenizer, max(len(tokens), 1))
    end = text.rfind(PROBE)
    for at in range(end, max(-1, end - _BEFORE_NAME), -1):
        parser = OutputParser(form, [Tool(PROBE, "", {"type": "object"}, False)], in_reasoning=False)
        if any(piece.kind == "call" for piece in parser.push(text[at:]) + parser.finish()):
            return True
    return end < 0


def _told_by(signs: Sequence[tuple[str, tuple[str, ...]]], source: str) -> str | None:
    return next((name for name, marks in signs if all(mark in source for mark in marks)), None)


def _known(name: str, names: dict[str, str], parameter: str) -> str | None:
    if name == NONE:
        return None
    if name not in names:
        raise InvalidParameter(
            f"{parameter} {name[:60]!r} is not known; known are {', '.join(sorted(names))} and {NONE}", parameter
        )
    return names[name]
