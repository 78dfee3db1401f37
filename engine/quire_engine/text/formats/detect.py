"""Which format a model has: by name, or by what its chat template writes."""

from quire_engine.errors import InvalidParameter
from quire_engine.text.formats.facts import Format
from quire_engine.text.formats.families import CALL_NAMES, CALLS, PLAIN, REASONING, REASONING_NAMES, SIGNS
from quire_engine.text.tokenizer import Tokenizer

NONE = "none"


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
    """The format whose delimiters a chat template speaks of, or the vocabulary where the template does not."""
    added = set(tokenizer.added_tokens.values())
    calls, reasoning = PLAIN.calls, PLAIN.reasoning
    named: list[str] = []
    for sign in SIGNS:
        if all(mark in template_source or mark in added for mark in sign.marks) and (
            any(mark in template_source for mark in sign.marks)
        ):
            if sign.calls and calls is PLAIN.calls:
                calls = CALLS[sign.calls]
                named.append(sign.calls)
            if sign.reasoning and reasoning is PLAIN.reasoning:
                reasoning = REASONING[sign.reasoning]
                named.append(sign.reasoning)
    return Format(name="+".join(named) or PLAIN.name, reasoning=reasoning, calls=calls)


def _known(name: str, names: dict[str, str], parameter: str) -> str | None:
    if name == NONE:
        return None
    if name not in names:
        raise InvalidParameter(
            f"{parameter} {name[:60]!r} is not known; known are {', '.join(sorted(names))} and {NONE}", parameter
        )
    return names[name]
