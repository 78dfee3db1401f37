"""Grammars that cannot be served: each ends its own request, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import llguidance
import pytest
import torch
from guided import Guided, finished, output, request
from quire_engine.engine import Engine
from quire_engine.errors import DeadlineExceeded, InvalidParameter
from quire_engine.guidance.spec import GuidanceSpec
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.waiting import WaitsFor


@pytest.fixture(scope="module")
def model(byte_level_folder: Path) -> Iterator[Guided]:
    before = torch.get_num_threads()
    yield Guided(byte_level_folder, threads=1)
    torch.set_num_threads(before)


class Slow:
    """An executor whose grammars are compiled when the test says so."""

    def __init__(self, model: Guided) -> None:
        self.limits, self.submit, self.collect = model.runner.limits, model.runner.submit, model.runner.collect
        self.close = model.runner.close
        self._prepare: Callable[[str], Future[Any]] = model.runner.prepare
        self.asked: list[tuple[str, Future[Any]]] = []

    def prepare(self, guidance: str) -> "Future[Any]":
        future = dict(self.asked).get(guidance) or Future()
        self.asked.append((guidance, future))
        return future

    def compile(self) -> None:
        for spec, future in dict(self.asked).items():
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._prepare(spec).result())
            except InvalidParameter as error:
                future.set_exception(error)
        self.asked.clear()


# ---- while it is compiled -------------------------------------------------------------------------------------------


def test_others_go_on_while_a_grammar_is_compiled(model: Guided) -> None:
    slow = Slow(model)
    engine = Engine(slow)
    guided, free = (
        request(1, model.prompt("a"), model.spec(choice=["yes"])),
        request(2, model.prompt("a"), max_tokens=9),
    )
    engine.add(guided)
    engine.add(free)
    while not free.finish_reason:
        engine.step()
    assert output(guided) == []
    assert engine.scheduler.waiting_for() == {WaitsFor.GRAMMAR: 1}
    [wait] = engine.scheduler.explain([guided])
    assert wait.reason is WaitsFor.GRAMMAR
    assert engine.scheduler.num_waiting == 1
    engine.scheduler.check_integrity()
    slow.compile()
    finished(engine, [])
    assert model.text(guided) == "yes"
    assert not engine.scheduler.waiting_for()


@pytest.mark.parametrize("end", ["abort", "deadline"])
def test_a_request_may_end_while_its_grammar_is_compiled(model: Guided, end: str) -> None:
    slow = Slow(model)
    engine = Engine(slow)
    guided = request(1, model.prompt("a"), model.spec(choice=["yes"]))
    if end == "deadline":
        guided.deadline, guided.arrival = 2.0, 1.0  # of a clock that stands at more than that
    engine.add(guided)
    if end == "abort":
        engine.abort(1)
    assert [one.id for one in engine.step().finished] == [1]
    engine.scheduler.check_integrity()
    assert guided.finish_reason == ("abort" if end == "abort" else "error")
    assert isinstance(guided.error, DeadlineExceeded) == (end == "deadline")
    slow.compile()
    late = request(2, model.prompt("a"), model.spec(choice=["yes"]))
    engine.add(late)
    slow.compile()
    finished(engine, [])
    assert model.text(late) == "yes"


def test_what_nobody_waits_for_any_more_is_not_compiled(model: Guided) -> None:
    """Requests of one spec share what they wait for."""
    slow = Slow(model)
    engine = Engine(slow)
    specs = [model.spec(choice=["no"]), model.spec(choice=["yes"]), model.spec(choice=["yes"])]
    for number, spec in enumerate(specs):
        engine.add(request(number, model.prompt("a"), spec))
    alone, shared = dict(slow.asked).values()
    engine.abort(0)
    engine.abort(1)
    assert alone.cancelled() and not shared.cancelled()
    slow.compile()
    finished(engine, [])
    assert shared.done() and not shared.cancelled()


def test_a_spec_is_compiled_once_however_many_want_it(model: Guided) -> None:
    spec, other = model.spec(regex="[0-9]{3}"), model.spec(regex="[0-9]{4}")
    assert model.runner.prepare(spec) is model.runner.prepare(spec)
    assert model.runner.prepare(spec) is not model.runner.prepare(other)


def test_a_grammar_that_cannot_be_compiled_ends_its_request_before_it_runs(model: Guided) -> None:
    bad = [
        GuidanceSpec(content=json.dumps({"grammars": [{"lark_grammar": "start: nothing"}]})),
        GuidanceSpec(content="{"),
    ]
    wrong = [request(number, model.prompt("a"), spec) for number, spec in enumerate(bad)]
    wrong.append(request(8, model.prompt("a"), '{"content": 1}'))
    wrong.append(request(9, model.prompt("a"), "no JSON"))
    good = request(10, model.prompt("a"), model.spec(choice=["yes"]))
    for one in finished(model.engine(), [*wrong, good])[:-1]:
        assert one.finish_reason == "error"
        assert isinstance(one.error, InvalidParameter)
        assert not one.has_run
    assert model.text(good) == "yes"


# ---- while it is followed -------------------------------------------------------------------------------------------


def test_a_grammar_whose_room_is_used_up_is_compiled_anew(model: Guided, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that follow a grammar share its lexer, and an error of that is for ever: later requests must not meet it."""
    limits = llguidance.LLParserLimits(max_lexer_states=200)
    monkeypatch.setattr("quire_engine.guidance.grammars.limits", lambda: limits)
    monkeypatch.setattr("quire_engine.guidance.rows._QUICK", 1e9)
    spec = model.spec(regex=r"(.|\n)*a(.|\n){300}")
    free = [request(number, model.prompt("b")) for number in range(2)]
    tokens = [output(one) for one in finished(model.engine(), free)]
    for turn in range(3):
        engine = model.engine()
        guided = [request(10 * turn + number, model.prompt("a"), spec, max_tokens=90) for number in range(5, 8)]
        others = [request(number, model.prompt("b")) for number in range(2)]
        finished(engine, [*guided, *others])
        assert [output(one) for one in others] == tokens
        assert any(one.finish_reason == "length" for one in guided)
        for one in guided:
            assert one.finish_reason == "length" or "simplify" in str(one.error)


def test_a_matcher_that_gives_up_ends_its_request_alone(model: Guided, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = llguidance.LLParserLimits(max_items_in_row=40)
    monkeypatch.setattr("quire_engine.guidance.grammars.limits", lambda: limits)
    many = [f'm{n}: /[a-z]/ {n % 7 * "/[a-z]/ "} "{n}"' for n in range(60)]
    grammar = "\n".join(['start: "xx" many', "many: " + " | ".join(f"m{n}" for n in range(60)), *many])
    bad = request(1, model.prompt("a"), model.spec(grammar=grammar))
    good = request(2, model.prompt("a"), model.spec(choice=["yes", "no"]))
    engine = model.engine()
    finished(engine, [bad, good])
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, InvalidParameter)
    assert "simplify" in str(bad.error)
    assert model.text(good) in ("yes", "no")


# ---- what would take too much ---------------------------------------------------------------------------------------


def _chain(count: int, step: str, last: str, first: str) -> str:
    return "\n".join([first, *(step.format(n, n + 1) for n in range(count)), last.format(count)])


HOSTILE: dict[str, dict[str, Any]] = {
    "multipleOf": {"json": {"type": "integer", "multipleOf": 1000003}},
    "multipleOf, merged": {"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}},
    "multipleOf in a grammar": {"grammar": 'start: %json {"type": "integer", "multipleOf": 1000003}'},
    "multipleOf in a tag": {
        "structural_tag": {
            "type": "structural_tag",
            "triggers": ["<f"],
            "structures": [{"begin": "<f>", "schema": {"multipleOf": 1000003}, "end": ""}],
        }
    },
    "multipleOf beyond floats": {"json": {"multipleOf": 10**400}},
    "multipleOf as text beyond floats": {"json": '{"multipleOf": 1' + 400 * "0" + "}"},
    "patterns": {"json": {"patternProperties": {f"^a{n}$": {} for n in range(1000)}}},
    "names": {"json": {"properties": {f"p{n}": {} for n in range(10_000)}}},
    "properties of one object": {"json": {"properties": {f"p{n}": {} for n in range(2600)}}},
    "required": {"json": {"required": [f"p{n}" for n in range(30_000)]}},
    "required that is no list": {"json": {"minProperties": 2, "required": 5}},
    "depth": {"json": json.loads(200 * '{"items":' + "{}" + 200 * "}")},
    "depth as text": {"json": 50_000 * "[" + 50_000 * "]"},
    "length": {"json": {"const": "x" * (1 << 18)}},
    "integers": {"json": {"const": 2**60}},
    "NaN": {"json": '{"const": NaN}'},
    "draft 3": {"json": {"extends": {}}},
    "nullable": {"json": {"type": "string", "nullable": True}},
    "a keyword": {"json": {"type": "array", "uniqueItems": True}},
    "a schema elsewhere": {"json": {"$ref": "http://localhost:1/schema"}},
    "a file": {"json": {"$ref": "file:///etc/passwd"}},
    "options of llguidance's": {"grammar": "%llguidance {}\nstart: /a/"},
    "half a character": {"regex": "\ud800"},
    "half a character among choices": {"choice": ["a", "\udc00"]},
    "half a character in a schema": {"json": '{"const": "\\ud800"}'},
    "half a character in a tag": {
        "structural_tag": json.dumps(
            {"type": "structural_tag", "triggers": ["\ud800"], "structures": [{"begin": "\ud800f", "end": ""}]}
        )
    },
    "infinity as text": {"json": '{"minimum": 1e400}'},
    "rules of GBNF": {"grammar": _chain(5000, 'r{} ::= "a" r{}', 'r{} ::= "b"', "root ::= r0")},
    "lookahead": {"regex": "(?=a)b"},
    "back-references": {"regex": r"(a)\1"},
    "sampling in Lark": {"grammar": "start: x\nx[temperature=0.5]: /a*/"},
    "brackets": {"grammar": "root ::= " + 20_000 * "("},
    "brackets in Lark": {"grammar": "start: " + 20_000 * "("},
    "an unknown rule": {"grammar": "start: other"},
    "a fault that cannot be shown whole": {"json": {"patternProperties": ["x" * 63 + "é" * 9]}},
    "a name that is none": {"json": {"properties": {"a": {}}, "required": [[]]}},
    "an object that is neither": {"json_object": []},
    "a schema of itself": {"json": {"$ref": "#"}},
    "wrong kinds everywhere": {"json": {"properties": 5, "required": "x", "items": 3, "$defs": [], "enum": 7}},
    "too many choices": {"choice": [str(n) for n in range(10_001)]},
    "no schema": {"json": [1]},
    "false": {"json": False},
    "false beside another": {"regex": False, "choice": ["a"]},
    "a false text": {"grammar": False},
    "an object's sign that is none": {"json_object": []},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_before_it_reaches_an_engine(name: str) -> None:
    with pytest.raises(InvalidParameter) as refusal:
        StructuredOutputs.of(HOSTILE[name]).check()
    assert len(str(refusal.value)) < 600
    assert "/" not in str(refusal.value).replace("file:///etc/passwd", "").replace("http://localhost:1/schema", "")


LETHAL: dict[str, dict[str, Any]] = {
    "references": {
        "json": {"$ref": "#/$defs/a0"}
        | {
            "$defs": {f"a{n}": {"properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(1900)}
            | {"a1900": {}}
        }
    },
    "bare references": {
        "json": {"$ref": "#/$defs/a0"}
        | {"$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(6000)} | {"a6000": {}}}
    },
    "rules": {"grammar": _chain(8000, "a{}: a{}", 'a{}: "x"', "start: a0")},
    "terminals": {"grammar": _chain(8000, "A{}: A{}", 'A{}: "x"', "start: A0")},
    "doubled terminals": {"grammar": _chain(40, "A{0}: A{1} A{1}", 'A{}: "x"', "start: A0")},
    "ambiguity": {"grammar": 'start: a\na: a a | a a a | "x"'},
    "a rule of itself": {"grammar": "start: start"},
    "a schema of itself": {"json": {"$ref": "#"}},
    "repetitions": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "states": {"regex": r"(.|\n)*a(.|\n){300}"},
    "optional properties": {
        "json": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(2400)}}
    },
    "choices": {"choice": [f"{n:05}" for n in range(10_000)]},
    "a long constant": {"json": {"const": "x" * 200_000}},
    "combinations": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"{m}{n}": {}}} for n in range(8)]} for m in range(12)]}
    },
    "bounds": {"json": {"type": "string", "minLength": 10**9, "maxLength": 10**9}},
    "many items": {"json": {"type": "array", "minItems": 10**15, "maxItems": 10**15}},
}
_SURVIVE = """
import json, sys
sys.path[:0] = ["tests"]
from pathlib import Path
import torch
from guided import Guided, finished, request
from quire_engine.errors import InvalidParameter
from quire_engine.guidance.structure import StructuredOutputs
from test_guidance_refusals import LETHAL
torch.set_num_threads(1)
model = Guided(Path(sys.argv[1]), threads=1)
asked = []
for number, structure in enumerate(LETHAL.values()):
    try:
        StructuredOutputs.of(structure).check()
    except InvalidParameter:
        pass
    try:
        asked.append(request(number, model.prompt("a"), model.spec(**structure), max_tokens=30))
    except InvalidParameter:
        pass
asked.append(request(100, model.prompt("a"), model.spec(choice=["yes"])))
finished(model.engine(), asked)
print(json.dumps([[one.finish_reason, str(one.error or "")] for one in asked]))
"""


def test_what_would_end_the_process_does_not(byte_level_folder: Path) -> None:
    """In a process of its own: through the gateway's check, the worker's compilation, and 30 tokens."""
    paths = [*sys.path, str(Path(__file__).parent), str(Path(__file__).parents[1])]
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{_SURVIVE}", str(byte_level_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    *ends, last = json.loads(answer.stdout.splitlines()[-1])
    assert last == ["stop", ""]
    assert ends[list(LETHAL).index("choices")] == ["stop", ""]
    for reason, error in ends:
        assert reason in ("stop", "length") or "grammar" in error, error
