"""Conversations to prompts, through the model's chat template: a program of the operator's over what callers send.

Rendering may take so long and give so much; both are looked at wherever the template reads an attribute or an item,
calls something, or gives a piece of text. What that cannot stop is a template that loops over numbers of its own, for
its operator wrote it, and a single operation on one text, which takes no longer than the text is long.
"""

import json
import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.text.messages import REASONING, conversation
from quire_engine.text.template_facts import ContentFacts, names_of
from quire_engine.text.tool_facts import ToolFacts
from quire_engine.text.tool_turns import for_template

log = logging.getLogger(__name__)
RENDER_SECONDS = 10.0
MAX_RENDERED = 1 << 25  # characters
_OWN = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
}
_MARK = "CONTINUE_FINAL_MESSAGE_HERE "
_until: ContextVar[float] = ContextVar("until")


class _TooSlow(Exception):
    """The time is up."""


class ChatTemplate:
    """Compiled once, for any number of threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """`special_tokens`: what the template calls them (bos_token, ...) → their text. Raises ModelError."""
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        if not isinstance(source, str):
            raise ModelError(
                f"the chat template is not valid Jinja (no text, but {source!r:.40}); give another one with "
                "--chat-template"
            )
        source = source.removeprefix("\ufeff")  # an editor's mark, which would begin every prompt
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ModelError(
                f"the chat template is not valid Jinja ({error}); give another one with --chat-template"
            ) from error
        self._special = dict(special_tokens)
        read = find_undeclared_variables(tree)
        self.variables = frozenset(read - _OWN - self._special.keys() - environment.globals.keys())
        self._reserved = frozenset(_OWN | self._special.keys() | environment.globals.keys())
        self._names = names_of(tree)
        self._facts = ContentFacts.of(tree)
        self._knows_developer = self._facts.names_developer and self._writes_developers()
        self._tools = ToolFacts.of(self._attempt)
        self._told = False  # that tools are described in words
        self.source = source
        self.knows_tools = self._tools.knows_tools

    @property
    def example(self) -> str:
        """A conversation with a call of tool_facts.PROBE, as the template writes it; nothing where it writes none."""
        return self._tools.example

    def describe_tools(self) -> None:
        """Has tools described in words, and called in words: how else the model writes calls is not known."""
        self.knows_tools = False

    def _writes_developers(self) -> bool:
        """OpenAI's newer models call the system prompt the developer's. Some templates ask for that role to skip it."""
        self._knows_developer = True
        turns = [{"role": "developer", "content": _MARK}, {"role": "user", "content": "Hi"}]
        return _MARK.strip() in self._attempt(turns, None)

    def _attempt(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        try:
            return self._write([self._for_template(turn) for turn in turns], tools, opening=True, variables={})
        except InvalidParameter:
            return ""

    def check_variables(self, given: Mapping[str, Any]) -> None:
        """Raises InvalidParameter for variables that the template does not read or that are not a caller's."""
        for name in given:
            if name in self._reserved:
                raise InvalidParameter(
                    f"chat_template_kwargs holds {name}, which is not for callers to set; leave it out",
                    "chat_template_kwargs",
                )
            if name not in self.variables:
                known = f"it reads {', '.join(sorted(self.variables))}" if self.variables else "it reads none"
                raise InvalidParameter(
                    f"chat_template_kwargs holds {name[:60]!r}, which the chat template does not read ({known})",
                    "chat_template_kwargs",
                )

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """As transformers' apply_chat_template gives it, with arguments and ids of calls as this template wants them.
        `tools`: as OpenAI's API has them; a template that does not know them gets them described in words. Raises
        InvalidParameter for whatever the template raises."""
        self.check_variables(variables)
        turns = conversation(messages, also_read=self._names)
        if continue_final_message and turns and "tool_calls" in turns[-1]:
            raise InvalidParameter(
                "continue_final_message needs a last message without tool_calls, which have an end", "messages"
            )
        described = tools if tools and not self.knows_tools else None
        if described and not self._told:
            self._told = True
            log.warning(
                "the chat template does not know tools; they are described in the system prompt, and calls of them are "
                "<tool_call>JSON</tool_call>"
            )
        given = [self._for_template(turn) for turn in for_template(turns, self._tools, described)]
        continued = _mark_end(given) if continue_final_message else ""
        known = (tools or None) if self.knows_tools else None
        text = self._write(given, known, opening=add_generation_prompt, variables=variables)
        return _cut_at_mark(text, continued) if continue_final_message else text

    def _write(
        self,
        given: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        opening: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The template as it is, within its bounds. Raises InvalidParameter."""
        _until.set(time.monotonic() + RENDER_SECONDS)
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                {"documents": None}
                | self._special
                | dict(variables)
                | {"tools": tools, "messages": given, "add_generation_prompt": opening}
            ):
                size += len(piece)
                if size > MAX_RENDERED:
                    raise InvalidParameter(
                        f"the chat template makes more than {MAX_RENDERED} characters of these messages; send fewer",
                        "messages",
                    )
                _check_time()
                pieces.append(piece)
        except InvalidParameter:
            raise
        except _TooSlow:
            raise InvalidParameter(
                f"the chat template takes more than {RENDER_SECONDS:.0f} s for these messages; send fewer", "messages"
            ) from None
        except Exception as error:  # templates are programs: whatever they raise is about these messages
            raise InvalidParameter(
                f"the chat template refuses these messages: {str(error)[:200]}", "messages"
            ) from error
        return "".join(pieces)

    def _for_template(self, message: dict[str, Any]) -> dict[str, Any]:
        """Reasoning under each of its names, and content in the form that this template reads."""
        found = dict(message)
        reasoning = next((found[name] for name in REASONING if name in found), None)
        if reasoning is not None:
            found = {"thinking": reasoning} | found | {"reasoning_content": reasoning}
        if found["role"] == "developer" and not self._knows_developer:
            found["role"] = "system"
        found["content"] = self._facts.content(_without_images(message.get("content")))
        return found


def _without_images(content: Any) -> Any:
    """Templates are told that there is one."""
    if not isinstance(content, list):
        return content
    if any(part["type"] == "image_url" for part in content):
        raise InvalidParameter("the model takes no images; send text alone", "messages")
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def _check_time() -> None:
    if time.monotonic() > _until.get():
        raise _TooSlow


class _Sandbox(ImmutableSandboxedEnvironment):
    """Looks at the clock wherever a template touches what it was given."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_time()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        _check_time()
        return super().call(context, obj, *arguments, **named)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is all that matters."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` without the class's own attributes."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """As dict's."""
        return dict.fromkeys(*arguments)


class _Namespace(Namespace):
    """Without underscored names, which reach into the interpreter."""

    def __init__(*arguments: Any, **named: Any) -> None:  # `self` may be a name of the template's
        attributes = dict(*arguments[1:], **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(arguments[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Marks where the last message ends, in place; its text."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, list):
        if content and "text" in content[-1]:
            text = str(content[-1]["text"])
            last["content"] = [*content[:-1], {**content[-1], "text": text + _MARK}]
            return text
    elif isinstance(content, str):
        last["content"] = content + _MARK
        return content
    raise InvalidParameter("continue_final_message needs a last message that ends with a text to continue", "messages")


def _cut_at_mark(text: str, continued: str) -> str:
    """All before the mark; where the template trims texts, the end is trimmed as well."""
    mark = text.rfind(_MARK.strip())
    if mark < 0 or continued.strip() not in text:
        raise InvalidParameter(
            "the chat template does not write the last message as it is, so that it cannot be continued; leave "
            "continue_final_message out",
            "continue_final_message",
        )
    return text[:mark] if text.startswith(_MARK, mark) else text[:mark].rstrip()
