"""The policies of a cluster, and those of them that one request is under."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quire_cluster.governance.checks.asking import About, Ask
from quire_cluster.governance.checks.filters import Filter, InputVerdict, Notes, OutputFilter, Ready
from quire_cluster.governance.checks.machine import Kind
from quire_cluster.governance.checks.patterns import pattern_machine, word_machine
from quire_cluster.governance.checks.pii import pii_machine
from quire_cluster.governance.checks.rules import AnyRule, PatternRule, PiiRule, WordsRule, read_rules, refused

_MOST_KEPT = 1024  # pairs of a tenant and a model


class RuleSet:
    """What requests of one tenant to one model are under. It serves any number of them, in one event loop."""

    def __init__(self, rules: Sequence[Ready], tenant: str, model: str) -> None:
        self._input = tuple(ready for ready in rules if "input" in ready.rule.on)
        self._output = tuple(ready for ready in rules if "output" in ready.rule.on)
        self._tenant = tenant
        self._model = model

    @property
    def checks_input(self) -> bool:
        """Whether any rule is on what is sent."""
        return bool(self._input)

    @property
    def checks_output(self) -> bool:
        """Whether any is on what is answered."""
        return bool(self._output)

    async def check_input(self, text: str, ask: Ask) -> InputVerdict:
        """What becomes of one text of a request."""
        notes = Notes("input")
        filter = Filter(self._input, About(stage="input", tenant=self._tenant, model=self._model), ask, notes)
        shown = await filter.push(text, final=True)
        return InputVerdict(text=shown, stopped=filter.stopped, verdicts=notes.verdicts())

    def output(self, ask: Ask) -> OutputFilter | None:
        """For one answer; None: it goes out as it is."""
        if not self._output:
            return None
        return OutputFilter(self._output, About(stage="output", tenant=self._tenant, model=self._model), ask)


class Policies:
    """All of a `policies:` list."""

    def __init__(self, rules: Sequence[AnyRule]) -> None:
        """Raises InvalidParameter for a pattern that cannot be kept to."""
        self._rules = tuple(map(_ready, rules))
        self._kept: dict[tuple[str, str], RuleSet] = {}

    @classmethod
    def parse(cls, given: Sequence[Mapping[Any, Any]], folder: Path) -> "Policies":
        """As YAML was read; files are named as seen from the folder. Raises InvalidParameter, which names the rule, the
        field, and what to write instead."""
        return cls(read_rules(given, folder))

    @property
    def canonical(self) -> list[dict[str, Any]]:
        """The same rules, each with all its fields, and the words of files: they can be sent to other hosts and parsed
        there."""
        return [ready.rule.model_dump(mode="json") for ready in self._rules]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form as JSON, in hexadecimal digits: another where anything is decided otherwise."""
        text = json.dumps(self.canonical, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def for_(self, tenant: str, model: str) -> RuleSet:
        """The rules for a tenant's requests to a model, by the one name that rules shall know it by."""
        kept = self._kept.get((tenant, model))
        if kept is None:
            if len(self._kept) == _MOST_KEPT:
                self._kept.clear()
            kept = RuleSet([one for one in self._rules if _is_for(one.rule, tenant, model)], tenant, model)
            self._kept[tenant, model] = kept
        return kept


def _is_for(rule: AnyRule, tenant: str, model: str) -> bool:
    return any(fnmatchcase(tenant, glob) for glob in rule.tenants) and any(
        fnmatchcase(model, glob) for glob in rule.models
    )


def _ready(rule: AnyRule) -> Ready:
    machine = None
    if isinstance(rule, PiiRule):
        machine = pii_machine(rule.kinds)
    elif isinstance(rule, PatternRule):
        kind = Kind(name=rule.check)
        try:
            machine = pattern_machine([(pattern, kind) for pattern in rule.patterns], rule.longest)
        except ValueError as error:
            raise refused(rule.name, "patterns", str(error)) from error
    elif isinstance(rule, WordsRule):
        try:
            machine = word_machine(rule.words, Kind(name=rule.check))
        except ValueError as error:
            raise refused(rule.name, "words", str(error)) from error
    return Ready(rule=rule, machine=machine)
