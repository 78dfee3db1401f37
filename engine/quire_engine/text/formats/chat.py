"""A model's answers to conversations: what they have to look like, and how they are read, by one description."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import eq
from threading import Lock
from typing import Any

from quire_engine.errors import InvalidParameter
from quire_engine.guidance import grammars
from quire_engine.guidance.spec import GuidanceSpec, Marker, Section, Thinking
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.text.formats.bind import BoundFormat, begins_in_reasoning, bind, ends_reasoning
from quire_engine.text.formats.detect import detect, format_of, reads
from quire_engine.text.formats.facts import Pieces, Space
from quire_engine.text.formats.families import PLAIN
from quire_engine.text.formats.grammar import CallRules, call_rules, opener_of
from quire_engine.text.formats.lark import Lark
from quire_engine.text.formats.parser import OutputParser
from quire_engine.text.formats.tools import Tool, tools_of
from quire_engine.text.tokenizer import Tokenizer

MAX_CALLS = 128  # of one answer
_KEPT = 64  # rules of tools
_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """The tools that a request offers, and what of them it wants to be called. `choice`: auto, none or required;
    `named`: these and no others."""

    tools: tuple[Tool, ...] = ()
    choice: str = "none"
    named: frozenset[str] | None = None
    parallel: bool = True

    @staticmethod
    def of(tools: Any, choice: Any, parallel: bool | None) -> "ToolUse":
        """From OpenAI's fields. Raises InvalidParameter."""
        known = tuple(tools_of(tools))
        if choice is not None and choice not in ("auto", "none") and not known:
            raise InvalidParameter("tool_choice wants tools; give some, or leave it out", "tool_choice")
        found, named, single = _chosen(choice)
        for name in sorted((named or frozenset()) - {tool.name for tool in known}):
            raise InvalidParameter(f"tool_choice names {name[:64]!r}, which is none of the tools", "tool_choice")
        return ToolUse(
            tools=known,
            choice=found if known else "none",
            named=named,
            parallel=not single and (parallel is None or parallel),
        )

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.named is None or tool.name in self.named)

    @property
    def must(self) -> bool:
        """Whether one has to be called."""
        return self.choice == "required"


def _chosen(choice: Any) -> tuple[str, frozenset[str] | None, bool]:
    """The word, the tools that it is about (None: all), and whether it is about one call. Raises InvalidParameter for
    what is neither a word nor tools."""
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return choice or "auto", None, False
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function" and (name := _name_of(choice)) is not None:
        return "required", frozenset({name}), True
    if kind == "allowed_tools" and choice.keys() == {"type", "allowed_tools"}:
        allowed = choice["allowed_tools"]
        if isinstance(allowed, Mapping) and allowed.keys() == {"mode", "tools"} and isinstance(allowed["tools"], list):
            names = frozenset(name for tool in allowed["tools"] if (name := _name_of(tool)) is not None)
            if len(names) == len(allowed["tools"]) > 0 and allowed["mode"] in ("auto", "required"):
                return allowed["mode"], names, False
    one = '{"type": "function", "function": {"name": ...}}'
    raise InvalidParameter(
        f"tool_choice is {choice!r:.80}; give auto, none, required, {one}, or allowed_tools with a mode and several",
        "tool_choice",
    )


def _name_of(tool: Any) -> str | None:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not tool.keys() <= {"type", "function"}:
        return None
    function = tool.get("function")
    if not isinstance(function, Mapping) or len(function) != 1 or not isinstance(function.get("name"), str):
        return None
    return str(function["name"])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the answers to one conversation are guided and read."""

    guidance: GuidanceSpec | None = None  # None: they may look like anything
    marks: Mapping[int, str] = field(default_factory=dict)  # delimiters, as a parser gets them
    form: BoundFormat | None = None
    tools: tuple[Tool, ...] = ()
    in_reasoning: bool = False
    only_calls: bool = False  # there is no content

    def parser(self) -> OutputParser | None:
        """A fresh one for each choice; None: all is content."""
        if self.form is None:
            return None
        return OutputParser(self.form, self.tools, in_reasoning=self.in_reasoning, only_calls=self.only_calls)


ALL_CONTENT = Answer()


class ChatFormat:
    """How one model writes reasoning and calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        auto: bool = True,
    ) -> None:
        """What is not given is read off the chat template. `auto`: whether the model may choose to call a tool. Raises
        InvalidParameter for an unknown name."""
        self._auto = auto
        template = tokenizer.tool_template
        found = detect(template.source, tokenizer) if template is not None else PLAIN
        if template is not None and tool_parser is None:
            known = template.knows_tools and found.calls is not None
            if not known or not reads(bind(found, tokenizer), template.example, tokenizer):
                tokenizer.describe_tools()
                found = replace(found, calls=PLAIN.calls)
        self._form = bind(format_of(tool_parser, reasoning_parser, otherwise=found), tokenizer)
        self._tokenizer = tokenizer
        self._lark = Lark(self._form.tokens)
        self._rules: OrderedDict[str, CallRules] = OrderedDict()  # agents send the same tools again and again
        self._lock = Lock()

    @property
    def name(self) -> str:
        """For the log."""
        return self._form.name

    @property
    def reasons(self) -> bool:
        """Whether its answers may have reasoning."""
        return self._form.reasoning is not None

    def answer(
        self,
        prompt: Sequence[int],
        use: ToolUse,
        structure: StructuredOutputs | None,
        *,
        thinking_budget: int | None = None,
        continued: str | None = None,
    ) -> Answer:
        """How answers to this prompt are guided and read. `continued`: the text of a last message that is gone on with.
        Raises InvalidParameter for what does not go together. Takes milliseconds, or up to a second for hostile tools.
        """
        form, tools = self._form, use.callable
        if thinking_budget is not None and form.reasoning is None:
            raise InvalidParameter(
                "this model's answers have no reasoning, so there is no thinking_token_budget; leave it out",
                "thinking_token_budget",
            )
        inside = begins_in_reasoning(form, prompt, self._tokenizer, continued=continued)
        thinking = self._thinking(prompt, inside=inside, budget=thinking_budget)
        spec = self._spec(use, structure, thinking)
        return Answer(guidance=spec, marks=form.marks, form=form, tools=tools, in_reasoning=inside, only_calls=use.must)

    def _spec(
        self, use: ToolUse, structure: StructuredOutputs | None, thinking: Thinking | None
    ) -> GuidanceSpec | None:
        tools = use.callable
        if tools and not use.must and not self._auto:
            raise InvalidParameter(
                "tool_choice auto was switched off (--no-enable-auto-tool-choice); give required, none or a function",
                "tool_choice",
            )
        if not tools:
            return self._structured(structure, thinking)
        rules = self._rules_of(tools, parallel=use.parallel)
        if structure is not None and structure.structural_tag is not None:
            raise InvalidParameter("a structural_tag does not go with tools; leave one out", "structured_outputs")
        before = self._form.reasoning.before_calls if self._form.reasoning is not None else ()
        calls = self._lark.sequence(before, "calls_all")
        if use.must:
            content = grammars.composed(grammars.lark(f"start: {calls}\n{rules.lark}"))
            return GuidanceSpec(content=content, thinking=thinking)
        if structure is not None:
            either = f"start: {calls} | {self._wrapped('@answer')}\n{rules.lark}"
            content = grammars.composed(grammars.lark(either), answer=structure.content())
            return GuidanceSpec(content=content, thinking=thinking)
        ways = self._ways(rules, parallel=use.parallel)
        return GuidanceSpec(
            thinking=thinking,
            sections=tuple(map(_section, ways)),
            most=MAX_CALLS,
            then_end=not all(way.repeats for way in ways),
        )

    def _ways(self, rules: CallRules, *, parallel: bool) -> list[CallRules]:
        """Of all ways to write calls, those that can be told apart by their signs."""
        ways = [rules]
        for place, section in enumerate(self._form.calls.sections if self._form.calls is not None else ()):
            if section != self._form.written:
                other = self._rules_of(rules.tools, parallel=parallel, place=place)
                if not any(_are_alike(sign, known) for sign in other.signs for way in ways for known in way.signs):
                    ways.append(other)
        return ways

    def _rules_of(self, tools: Sequence[Tool], *, parallel: bool, place: int | None = None) -> CallRules:
        """`place`: of the way to write calls among all that are read; None: the one that is written."""
        key = json.dumps([[(tool.name, tool.parameters, tool.strict) for tool in tools], parallel, place])
        with self._lock:
            if (found := self._rules.get(key)) is not None:
                self._rules.move_to_end(key)
                return found
        section = self._form.calls.sections[place] if place is not None and self._form.calls is not None else None
        rules = call_rules(self._form, tools, parallel=parallel, most=MAX_CALLS, section=section)
        with self._lock:
            self._rules[key] = rules
            if len(self._rules) > _KEPT:
                self._rules.popitem(last=False)
        return rules

    def _wrapped(self, content: str) -> str:
        """Content that is constrained, within what the family writes around it."""
        reasoning = self._form.reasoning
        if reasoning is None:
            return content
        return self._lark.sequence(reasoning.before_content, content, reasoning.after_content)

    def _structured(self, structure: StructuredOutputs | None, thinking: Thinking | None) -> GuidanceSpec | None:
        if structure is None:
            budgeted = thinking is not None and thinking.budget is not None
            return GuidanceSpec(thinking=thinking) if budgeted else None
        if self._form.reasoning is None or structure.structural_tag is not None:
            return replace(structure.spec(self._tokenizer.delimiters), thinking=thinking)
        answer = grammars.lark(f"start: {self._wrapped('@answer')}")
        return GuidanceSpec(content=grammars.composed(answer, answer=structure.content()), thinking=thinking)

    def _thinking(self, prompt: Sequence[int], *, inside: bool, budget: int | None) -> Thinking | None:
        """None where it is over when the answer begins."""
        reasoning = self._form.reasoning
        if reasoning is None or (not inside and ends_reasoning(self._form, prompt, self._tokenizer)):
            return None
        begin, end = self._marker(reasoning.begin), self._marker(reasoning.end)
        may_open = not inside and bool(begin) and isinstance(begin[0], int)
        return Thinking(
            inside=inside,
            begin=begin,
            end=end,
            opening=self._tokens(begin) if may_open else (),
            budget=budget,
            closing=self._tokens(end),
        )

    def _marker(self, pieces: Pieces) -> Marker:
        """As it is usually written, space aside."""
        return opener_of(self._lark, tuple(piece for piece in pieces if not isinstance(piece, Space)))

    def _tokens(self, marker: Marker) -> tuple[int, ...]:
        tokens: list[int] = []
        for part in marker:
            tokens += [part] if isinstance(part, int) else self._tokenizer.encode(part, add_special_tokens=False)
        return tuple(tokens)


def _section(rules: CallRules) -> Section:
    grammar = grammars.composed(grammars.section(rules.openers, f"body: calls_body\n{rules.lark}"))
    return Section(signs=tuple(rules.signs), grammar=grammar, only_first=rules.only_first)


def _are_alike(sign: Marker, other: Marker) -> bool:
    """Whether one begins with the other, so that they cannot be told apart when it has come."""
    return all(map(eq, _letters(sign), _letters(other)))


def _letters(sign: Marker) -> list[str | int]:
    return [letter for part in sign for letter in (part if isinstance(part, str) else (part,))]
