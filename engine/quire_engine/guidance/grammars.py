"""Grammars as llguidance reads them: Lark of its dialect (its docs/syntax.md), JSON schemas, or several, by name.

llguidance refuses what it cannot do instead of letting something else pass, which is why it was chosen.
"""

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from quire_engine.errors import InvalidParameter
from quire_engine.guidance.schemas import checked
from quire_engine.guidance.spec import Marker

Result = TypeVar("Result")
_WHITESPACE = r"(\r?\n){0,2}[ \t]{0,40}"  # where JSON has any: as one writes it, for some models would never end
_ESCAPES = 'nrbtf\\"'  # not \u: in it a property's name could be spelled past the property's schema
_NAME = "structured_outputs"
_STACK = 512 << 20  # bytes, of which only those are taken that are touched
_SHORT = 2048  # characters, in which no grammar takes 2 MiB of the stack
_stacks = threading.Lock()  # their size is the whole process's
_SHOWN = 300  # characters of what llguidance says
_UNKNOWN = re.compile(r"Unimplemented keys: (\[.*?\])")
_FORMAT = re.compile(r"Unknown format: (.{1,60})")
_SAMPLED = re.compile(r"^[ \t]*[?!]?\w+\[[^\]\n]*\b(temperature|max_tokens)\b", re.MULTILINE)
_CONTEXT = re.compile(r"\n +\d+ \| .*", re.DOTALL)  # the lines of the grammar that it shows
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_MAX_GBNF = 1 << 23  # characters times rules, which is what it takes to read one: half a second


def limits() -> Any:
    """What a grammar may cost: to compile, and in each step. Measured: a compilation ends within half a second."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_grammar_size=50_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_items_in_row=10_000,  # an object may have so many properties left to come, times four
        max_lexer_states=50_000,
        verbose_errors=False,
    )


def reason(error: str) -> str:
    """What llguidance says, in one short line."""
    if error.startswith("panic:"):
        return "it is too large or too deep, or a part of it is of the wrong kind"
    if (found := _UNKNOWN.search(error)) is not None:
        return f"a JSON schema has {', '.join(json.loads(found[1]))}, which no grammar can hold; leave it out"
    if "limit" in error or "too big" in error:
        return "it takes too much to follow; make it smaller or simpler"
    if "NoExtensionBias" in error:
        return "it allows no output, or only ones without end; mend it"
    if (found := _FORMAT.fullmatch(error)) is not None:
        return f"a JSON schema has the format {found[1]}, which no grammar is known for; leave it out"
    if "regex for integer range" in error or "regex for float range" in error:
        return "a JSON schema has a bound of numbers that is too large to be kept to; leave it out"
    if "coerce_one_of" in error:
        return "oneOf has choices that may overlap; use anyOf"
    return " ".join(_CONTEXT.sub("", error).replace("<non-verbose/>", "").split())[:_SHOWN].rstrip(" .")


def json_schema(
    schema: Any, *, parameter: str = "structured_outputs", lenient: bool = False, whitespace: str = _WHITESPACE
) -> dict[str, Any]:
    """A grammar of the JSON texts that a schema describes. `lenient`: keywords that no grammar can hold are not held,
    where they are refused otherwise. `whitespace`: a regular expression of what may stand where JSON has any. Raises
    InvalidParameter."""
    options: dict[str, Any] = {"whitespace_pattern": whitespace, "json_allowed_escapes": _ESCAPES}
    if lenient:
        options["lenient"] = True
    return {"json_schema": {**checked(schema, parameter, lenient=lenient), "x-guidance": options}}


def lark(text: str) -> dict[str, Any]:
    """A grammar in Lark."""
    return {"lark_grammar": text}


def composed(*grammars: dict[str, Any], **named: dict[str, Any]) -> str:
    """The first grammar, and those that it names (@name)."""
    others = [{"name": name} | grammar for name, grammar in named.items()]
    return json.dumps({"grammars": [*grammars, *others]}, separators=(",", ":"))


def regex(pattern: str) -> dict[str, Any]:
    """A grammar of the texts that match a regular expression (Rust's syntax) from their beginning to their end."""
    from llguidance import regex_to_lark

    return lark(f"start: TEXT\nTEXT: /{regex_to_lark(pattern)}/")


def one_of(texts: Sequence[str]) -> dict[str, Any]:
    """A grammar of these texts."""
    return lark("start: TEXT\nTEXT: " + " | ".join(map(quoted, texts)))  # as rules, each would count on its own


def from_ebnf(text: str) -> dict[str, Any]:
    """A grammar in Lark, or in GBNF (whose rules have "::="). Raises InvalidParameter for the latter where it cannot be
    read or would take long, and for Lark that holds options of llguidance's, or schemas that it should not get."""
    rules = sum(1 for _ in _GBNF_RULE.finditer(text))
    if not rules:
        _check_lark(text)
        return lark(text)
    if rules * len(text) > _MAX_GBNF:
        raise InvalidParameter(
            f"the grammar has {rules} rules of GBNF in {len(text)} characters, which would take too long to read; "
            "write it in Lark, or with fewer rules",
            _NAME,
        )
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return lark(gbnf_to_lark(text))
    except Exception as error:  # the class itself is what it raises
        raise InvalidParameter(f"the grammar cannot be read as GBNF: {str(error)[:_SHOWN]}", _NAME) from error


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def literal(marker: Marker) -> str:
    """A delimiter as Lark writes it."""
    return " ".join(f"<[{part}]>" if isinstance(part, int) else quoted(part) for part in marker)


def marker_of(text: str, delimiters: Mapping[str, int]) -> Marker:
    """A text, in which what is spelled like a delimiter of the vocabulary is that token."""
    if not delimiters:
        return (text,) if text else ()
    longest_first = sorted(delimiters, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return tuple(delimiters.get(part, part) for part in parts if part)


def check(grammar: str) -> None:
    """Raises InvalidParameter for a grammar that cannot be followed. It must name no tokens: none are known here."""
    if problem := problem_of(grammar):
        raise InvalidParameter(f"the grammar cannot be used: {problem}", _NAME)


def problem_of(grammar: str) -> str:
    """Why such a grammar cannot be followed, even where each byte is a token; "" where it can."""
    _, problem = compiled(grammar, _bytes_alone(), b"{")
    return problem


def compiled(grammar: str, tokenizer: Any, brace: Sequence[int]) -> tuple[Any, str]:
    """A matcher, and why it cannot be used, or "". `tokenizer`: llguidance's. `brace`: the tokens of "{"."""
    from llguidance import LLMatcher

    matcher = _in_depth(lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=limits()), len(grammar))
    trial = matcher.deep_copy()
    if not matcher.is_error():  # some that can be compiled allow nothing, or take too much: here, or in an object
        trial.compute_bitmask()
    if not trial.is_error() and trial.try_consume_tokens(list(brace)):
        trial.compute_bitmask()
    return matcher, reason(trial.get_error()) if trial.is_error() else ""


@cache
def _bytes_alone() -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _in_depth(work: Callable[[], Result], size: int) -> Result:
    """What llguidance compiles it goes through by recursion, and a stack that ends takes the process with it: so this
    runs in a thread whose stack no grammar of the size that is read comes to the end of. `size`: characters of this
    one; in a short one it does not go deep."""
    if size <= _SHORT:
        return work()
    with _stacks:
        before = threading.stack_size(_STACK)
        try:
            pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            future = pool.submit(work)
        finally:
            threading.stack_size(before)
    with pool:
        return future.result()


def _check_lark(text: str) -> None:
    if (found := _SAMPLED.search(text)) is not None:
        raise InvalidParameter(f"the grammar holds {found[1]}, which is for the request to say; leave it out", _NAME)
    if "%llguidance" in text:
        raise InvalidParameter("the grammar holds %llguidance, which is not for callers; leave it out", _NAME)
    for found in re.finditer(r"%json\s*", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(f"the grammar holds %json without a JSON schema ({error})", _NAME) from error
        checked(schema, _NAME)


def section(openers: Sequence[Marker], body: str) -> dict[str, Any]:
    """A grammar of one of the openers and what comes after it: a rule, named `body`, and those it needs.

    Where an opener is text it may begin within a token, which writes something before it.
    """
    from llguidance import regex_to_lark

    starts, leads = [], []
    for number, (first, *rest) in enumerate(openers):
        if isinstance(first, int):
            starts.append(f"{literal((first, *rest))} body")
        else:
            starts.append(f"lead_{number} {literal(tuple(rest))} body")
            leads.append(f"lead_{number}[lazy]: /(?s:.)*{regex_to_lark(re.escape(first))}/")
    return lark("\n".join([f"start: {' | '.join(starts)}", *leads, body]))
