"""Texts on their way through rules.

Each rule reads what the one before it let out, and lets out what it has decided on. One that ends a text lets out what
is before the match; the rules behind it take that as the whole text.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quire_cluster.governance.checks.asking import About, Answer, Ask, Stage, asked
from quire_cluster.governance.checks.machine import Machine
from quire_cluster.governance.checks.rules import MOST_SEEN, Action, AnyRule, JudgeRule, WebhookRule
from quire_cluster.governance.checks.scanner import Scanner

FINISH_REASON = "content_filter"  # of an answer that a rule ended

_AT_ONCE = 512  # characters that are scanned before others get their turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a rule found: never the text itself."""

    rule: str
    action: Action  # what was done
    stage: Stage
    kind: str  # of personal data; else the rule's check; unchecked: nobody answered; timeout: it took too many steps
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InputVerdict:
    """What became of an input."""

    text: str
    stopped: bool  # the request may not be served; `text` is no input then
    verdicts: tuple[Verdict, ...]


@dataclass(slots=True)
class Piece:
    """Text that may go out."""

    channel: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A rule and, but for those that ask others, its automaton."""

    rule: AnyRule
    machine: Machine | None


class Notes:
    """Verdicts while they are counted."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._counts: dict[tuple[str, Action, str], int] = {}

    def add(self, rule: AnyRule, action: Action, kind: str) -> None:
        """One more."""
        key = rule.name, action, kind
        self._counts[key] = self._counts.get(key, 0) + 1

    def verdicts(self) -> tuple[Verdict, ...]:
        """In the order in which the first of each was found."""
        return tuple(
            Verdict(rule=rule, action=action, stage=self._stage, kind=kind, count=count)
            for (rule, action, kind), count in self._counts.items()
        )


class _Step(Protocol):
    """One rule's part of the way of one text."""

    stopped: bool

    async def push(self, text: str, final: bool) -> str: ...


class _Matching:
    """Finds what an automaton does."""

    def __init__(self, rule: AnyRule, machine: Machine, notes: Notes) -> None:
        self.stopped = False
        self._rule = rule
        self._scanner = Scanner(machine)
        self._notes = notes

    async def push(self, text: str, final: bool) -> str:
        if len(text) <= _AT_ONCE:
            return self._scan(text, final)
        out = []
        for begin in range(0, len(text), _AT_ONCE):
            end = begin + _AT_ONCE
            out.append(self._scan(text[begin:end], final and end >= len(text)))
            if self.stopped:
                break
            await asyncio.sleep(0)
        return "".join(out)

    def _scan(self, text: str, final: bool) -> str:
        rule, out = self._rule, []
        for part in self._scanner.push(text, final):
            if part.kind is None:
                out.append(part.text)
                continue
            self._notes.add(rule, rule.action, part.kind.name)
            if rule.action == "stop":
                self.stopped = True
                break
            shown = part.kind.name if rule.check == "pii" else rule.name
            out.append(part.text if rule.action == "flag" else f"[REDACTED:{shown}]")
        if self._scanner.exhausted and not self.stopped:
            self._notes.add(rule, "stop", "timeout")
            self.stopped = True
        return "".join(out)


class _Asking:
    """Holds a text until somebody has been asked about it: an input as a whole, an answer each time that so much of it
    has come."""

    def __init__(self, rule: WebhookRule | JudgeRule, about: About, ask: Ask, notes: Notes) -> None:
        self.stopped = False
        self._rule = rule
        self._about = about
        self._ask = ask
        self._notes = notes
        self._held = ""
        self._out = ""  # the end of what was let out

    async def push(self, text: str, final: bool) -> str:
        self._held += text
        is_due = final or (self._about.stage == "output" and len(self._held) >= self._rule.every)
        if not is_due or not self._held:
            return ""
        held, self._held = self._held, ""
        seen = (self._out + held)[-max(MOST_SEEN, len(held)) :]
        shown = self._decide(held, await asked(self._rule, self._about, seen, len(held), self._ask))
        self._out = (self._out + shown)[-MOST_SEEN:]
        return shown

    def _decide(self, held: str, answer: Answer | None) -> str:
        rule, action = self._rule, self._rule.action
        kind: str = rule.check
        instead = None
        if answer is None:
            action, kind = ("stop" if rule.on_error == "closed" else "flag"), "unchecked"
        elif answer.allowed:
            if answer.text is None or answer.text == held:
                return held
            instead = answer.text
        else:
            instead = answer.text
        self._notes.add(rule, action, kind)
        if action == "stop":
            self.stopped = True
            return ""
        if action == "flag":
            return held
        return f"[REDACTED:{rule.name}]" if instead is None else instead


class Filter:
    """One text's way through the rules, in order."""

    def __init__(self, rules: Sequence[Ready], about: About, ask: Ask, notes: Notes) -> None:
        self.stopped = False
        self.ended = False
        self._steps = [_step(ready, about, ask, notes) for ready in rules]

    async def push(self, text: str, final: bool) -> str:
        """What may go out. `stopped`: it was the last, whatever else comes."""
        assert not self.ended, "a text goes on behind its end"
        for step in self._steps:
            if not text and not final:
                break
            text = await step.push(text, final)
            if step.stopped:
                self.stopped = final = True
        self.ended = final
        return text


def _step(ready: Ready, about: About, ask: Ask, notes: Notes) -> _Step:
    if isinstance(ready.rule, WebhookRule | JudgeRule):
        return _Asking(ready.rule, about, ask, notes)
    assert ready.machine is not None
    return _Matching(ready.rule, ready.machine, notes)


class OutputFilter:
    """One answer's way through the rules; of several answers to a request each has its own. Not for several tasks.

    An answer has channels (content, reasoning, each call's arguments), each a text of its own. Where a rule ends one of
    them, all end, and the answer's finish reason is FINISH_REASON.
    """

    def __init__(self, rules: Sequence[Ready], about: About, ask: Ask) -> None:
        self.stopped = False
        self._notes = Notes(about.stage)
        self._channels: dict[str, Filter] = {}
        self._new = lambda: Filter(rules, about, ask, self._notes)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """So far. Where a rule has ended the answer, what others found behind that place may be among them."""
        return self._notes.verdicts()

    async def push(self, channel: str, text: str, final: bool = False) -> list[Piece]:
        """What may go out now that so much more has come. `final`: nothing more comes in this channel. A task that is
        cancelled takes what it waits for with it.

        Once `stopped` nothing may be pushed any more: what other channels held has come with the last pieces.
        """
        assert not self.stopped, "an answer goes on behind its end"
        filter = self._channels.get(channel)
        if filter is None:
            filter = self._channels[channel] = self._new()
        out = await filter.push(text, final)
        pieces = []
        if filter.stopped:
            self.stopped = True
            pieces = await self.finish()
        if out:
            pieces.append(Piece(channel, out))
        return pieces

    async def finish(self) -> list[Piece]:
        """The answer has ended: what is left in all channels."""
        pieces = []
        for channel, filter in self._channels.items():
            if not filter.ended:
                out = await filter.push("", True)
                self.stopped |= filter.stopped
                if out:
                    pieces.append(Piece(channel, out))
        return pieces
