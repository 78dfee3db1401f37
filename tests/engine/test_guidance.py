"""Outputs with a structure: each is what was asked for, and is the same however it was computed."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from guided import END, SIZE, Guided, finished, output, request
from quire_engine.guidance.cursor import Cursor
from quire_engine.request import EngineSampling, Request, TokenSet

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -5, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "d e"]}, "minItems": 1, "maxItems": 3},
        "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/inner"}]},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}},
}
CHOICES = ["yes", "no", "maybe not", 'é\n"q\\', "/", "yes and no"]
SUM = 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]{1,3}/ | "(" sum ")"\n'
TAGS = {
    "type": "structural_tag",
    "triggers": ["<f"],
    "structures": [
        {"begin": "<f=x>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=>", "schema": {"enum": [0, 2]}, "end": "</f>"},
    ],
}


def is_sum(text: str) -> bool:
    """By taking the innermost brackets away until none are left."""
    while (less := re.sub(r"\(([0-9]{1,3}(\+[0-9]{1,3})*)\)", "0", text)) != text:
        text = less
    return re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*", text) is not None


def describes(text: str) -> bool:
    value = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(value)
    return True


STRUCTURES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": SCHEMA}, describes),
    "json_text": ({"json": json.dumps(SCHEMA)}, describes),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "regex": (
        {"regex": r"(ab|c\d{2,4})+x?"},
        lambda text: re.fullmatch(r"(ab|c\d{2,4})+x?", text) is not None,
    ),
    "anchored": ({"regex": "^a[bc]{3}/$"}, lambda text: re.fullmatch("a[bc]{3}/", text) is not None),
    "choice": ({"choice": CHOICES}, lambda text: text in CHOICES),
    "lark": ({"grammar": SUM}, is_sum),
    "gbnf": (
        {"grammar": 'root ::= "a" ("b" | "c")? [0-9]{2} "::="'},
        lambda text: re.fullmatch("a[bc]?[0-9]{2}::=", text) is not None,
    ),
    "lark with the sign of gbnf": (
        {"grammar": 'start: "a ::= " /[bc]/  // as in GBNF: a ::= b'},
        lambda text: text in ("a ::= b", "a ::= c"),
    ),
    "structural_tag": (
        {"structural_tag": TAGS},
        lambda text: re.fullmatch(r"((?!<f).|<f=x>(0|-?[1-9]\d*)</f>|<f=>[02]</f>)*", text, re.DOTALL) is not None,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(byte_level_folder: Path) -> Guided:
    """One step after the other."""
    return Guided(byte_level_folder, threads=1, async_scheduling=False)


@pytest.fixture(scope="module")
def overlapped(byte_level_folder: Path) -> Guided:
    return Guided(byte_level_folder, threads=1)


def in_few_letters(model: Guided, kind: str) -> dict[str, Any]:
    """Parameters with which outputs come to an end: little space, and tags that begin at all."""
    if kind == "structural_tag":
        letters = [model.prompt(letter)[0] for letter in "<f=x>02/"]
        return {"allowed_token_ids": TokenSet.of((*letters, END)), "logit_bias": {letters[0]: 3.0, letters[1]: 5.0}}
    blank = (token for token, word in enumerate(model.vocabulary.tokens) if word and not word.strip())
    return {"logit_bias": dict.fromkeys(blank, -8.0)}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_an_output_that_ends_is_what_was_asked_for(overlapped: Guided, kind: str) -> None:
    structure, is_right = STRUCTURES[kind]
    spec, params = overlapped.spec(**structure), in_few_letters(overlapped, kind)
    asked = [request(number, overlapped.prompt("the quick"), spec, **params) for number in range(24)]
    ended = [one for one in finished(overlapped.engine(), asked) if one.finish_reason == "stop"]
    assert {one.finish_reason for one in asked} <= {"stop", "length"}
    assert len(ended) >= 6, "too few to tell"
    for one in ended:
        assert is_right(overlapped.text(one)), overlapped.text(one)


def test_tags_are_written_at_all(overlapped: Guided) -> None:
    spec, params = overlapped.spec(structural_tag=TAGS), in_few_letters(overlapped, "structural_tag")
    asked = [request(number, overlapped.prompt("x"), spec, **params) for number in range(24)]
    texts = [overlapped.text(one) for one in finished(overlapped.engine(), asked)]
    assert sum(text.count("</f>") for text in texts) > 5
    assert any(re.search(r"</f>.*</f>", text) for text in texts), "a tag, and another one after it"
    once = overlapped.spec(structural_tag={**TAGS} | {"structures": TAGS["structures"][1:]})
    asked = [request(number, overlapped.prompt("x"), once, **params) for number in range(24)]
    assert not any("<f=x" in overlapped.text(one) for one in finished(overlapped.engine(), asked))


# ---- the same however it is computed --------------------------------------------------------------------------------


def mixed(model: Guided) -> list[Request]:
    """Guided and unguided requests with all that sampling takes."""
    ids = {letter: model.prompt(letter)[0] for letter in 'ab0123"{}e+'}
    more: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.95, "top_k": 200},
        {"temperature": 1.1, "min_p": 0.001, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "temperature": 0.0},
        {"logit_bias": {ids["1"]: 2.5, ids["a"]: -3.0}, "bad_words": ((ids["2"],), (ids["1"], ids["1"]))},
        {"min_tokens": 12, "logprobs": 0},
        {"stop_token_ids": (END, ids["3"], ids["b"]), "min_tokens": 2},
        {"allowed_token_ids": TokenSet.of([*range(250), END])},
    ]
    shared = model.prompt("the quick brown fox jumps over the lazy dog, and the other fox doesn't mind it.")
    asked = []
    for number in range(24):
        kind = ["", *STRUCTURES][number % (len(STRUCTURES) + 1)]
        params = (in_few_letters(model, kind) if kind else {}) | more[number % len(more)]
        spec = model.spec(**STRUCTURES[kind][0]) if kind else ""
        prompt = shared[: 5 * (number % 7)] + model.prompt("abcdefghijklm"[number % 9 :])
        asked.append(request(number, prompt, spec, **({"max_tokens": 20 + 3 * number} | params)))
    return asked


@pytest.fixture(scope="module")
def alone(plain: Guided) -> list[tuple[list[int], str | None]]:
    """Each of them by itself, with an empty cache."""
    return [result(finished(plain.engine(), [one])[0]) for one in mixed(plain)]


def result(one: Request) -> tuple[list[int], str | None]:
    return output(one), one.finish_reason


def results(asked: list[Request]) -> list[tuple[list[int], str | None]]:
    return [result(one) for one in asked]


def test_the_requests_alone_come_to_every_end(alone: list[tuple[list[int], str | None]]) -> None:
    assert {reason for _, reason in alone} >= {"stop", "length"}
    assert sum(reason == "error" for _, reason in alone) < 4, "of which bad_words and the like leave no token"
    assert len({tuple(tokens) for tokens, _ in alone}) > len(alone) // 2


def test_beside_neighbours_and_with_steps_that_overlap(
    plain: Guided, overlapped: Guided, alone: list[tuple[list[int], str | None]]
) -> None:
    for model in (plain, overlapped):
        assert results(finished(model.engine(), mixed(model))) == alone


def test_unguided_rows_do_not_feel_guided_ones(overlapped: Guided, alone: list[tuple[list[int], str | None]]) -> None:
    free = [one for one in mixed(overlapped) if not one.params.guidance]
    assert len(free) >= 2
    assert results(finished(overlapped.engine(), free)) == [alone[one.id] for one in free]


def test_in_parts_and_under_pressure(byte_level_folder: Path, alone: list[tuple[list[int], str | None]]) -> None:
    """Prompts in parts of 16 tokens, pages for three requests: preempted ones go through what they wrote again."""
    model = Guided(byte_level_folder, threads=1, max_num_batched_tokens=16)
    engine, requests = model.engine(num_pages=11), mixed(model)
    for guidance in {one.params.guidance for one in requests} - {""}:
        model.runner.prepare(guidance).result()  # so that all of them come at once
    assert results(finished(engine, requests)) == alone
    assert engine.scheduler.stats.preemptions > 0, "the pressure is gone"


def test_found_in_the_prefix_cache(overlapped: Guided, alone: list[tuple[list[int], str | None]]) -> None:
    engine = overlapped.engine()
    finished(engine, mixed(overlapped))
    before = engine.scheduler.stats.prefix_hits
    again = mixed(overlapped)
    assert results(finished(engine, again)) == alone
    assert engine.scheduler.stats.prefix_hits > before


@pytest.mark.parametrize("number", [1, 2, 6, 8, 10, 12, 19])
def test_resumed_at_every_token(overlapped: Guided, alone: list[tuple[list[int], str | None]], number: int) -> None:
    one = mixed(overlapped)[number]
    whole, reason = alone[number]
    resumed = [
        Request(1000 + cut, one.tokens + whole[:cut], one.num_prompt, one.params, resumed=True)
        for cut in range(len(whole) + (reason == "length"))
    ]
    for again in finished(overlapped.engine(), resumed):
        assert result(again) == (whole, reason), f"cut at {again.id - 1000}"


# ---- with all that changes logits, against transformers' logits and plain Python ------------------------------------


def test_the_likeliest_of_the_allowed_tokens_is_drawn(overlapped: Guided, byte_level_folder: Path) -> None:
    """Allowed are eight letters and space, from 4 to 12 of them; log-probabilities are of the model's own logits."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(byte_level_folder, dtype=torch.float64)
    words = [*overlapped.vocabulary.tokens, *[b""] * (SIZE - len(overlapped.vocabulary.tokens))]
    special = overlapped.vocabulary.delimiters
    spec = overlapped.spec(regex="[a-h ]{4,12}")
    more: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"logit_bias": {overlapped.prompt("j")[0]: 100.0, overlapped.prompt("b")[0]: 5.0}},
        {"bad_words": tuple((overlapped.prompt(letter)[0],) for letter in "abc")},
        {"min_tokens": 7},
        {"allowed_token_ids": TokenSet.of([*range(2, 258), END])},
    ]
    asked = [
        request(
            10 * number + start, overlapped.prompt("abcdef"[: start + 1]), spec, temperature=0.0, logprobs=1, **params
        )
        for number, params in enumerate(more)
        for start in range(5)
    ]
    engine, scores = overlapped.engine(), dict[int, list[float]]()
    for one in asked:
        engine.add(one)
    while engine.has_work:
        for one, found in engine.step().logprobs:
            scores.setdefault(one.id, []).extend(found.logprobs.tolist())
    texts = set()
    for one in asked:
        with torch.inference_mode():
            logits = reference(torch.tensor([one.tokens])).logits[0].numpy()
        written, params = b"", one.params
        for place, token in enumerate(output(one)):
            raw = logits[one.num_prompt - 1 + place]
            complete = len(written) == 12
            left = changed(raw, one.tokens[: one.num_prompt + place], output(one)[:place], params, complete)
            right = [
                token not in special and word != b"" and re.fullmatch(b"[a-h ]{1,12}", written + word) is not None
                for token, word in enumerate(words)
            ]
            right[END] = len(written) >= 4
            left[~np.array(right)] = -np.inf
            assert left[token] >= left.max() - 1e-3 > -np.inf, (written, words[token])
            score = raw[token] - np.log(np.exp(raw - raw.max()).sum()) - raw.max()
            assert scores[one.id][place] == pytest.approx(score, abs=1e-3)
            written += words[token] if token != END else b""
        texts.add(written)
        assert one.finish_reason == "stop"
        assert re.fullmatch(b"[a-h ]{4,12}", written)
    assert len(texts) > 10


def test_text_that_nothing_else_may_follow_is_in_the_tokenizer_s_own_tokens(overlapped: Guided) -> None:
    text = "the quick brown fox"
    spec = overlapped.spec(choice=[text])
    [one] = finished(overlapped.engine(), [request(1, overlapped.prompt("a"), spec)])
    assert output(one) == [*overlapped.prompt(text), END]


def changed(raw: Any, log: list[int], out: list[int], params: EngineSampling, complete: bool) -> Any:
    """The logits as all but the structure leaves them; what is complete may end whatever min_tokens says."""
    x = raw.copy()
    if params.allowed_token_ids:
        x[~np.isin(np.arange(len(x)), params.allowed_token_ids.ids())] = -np.inf
    for word in params.bad_words:
        x[word[0]] = -np.inf
    if len(out) < params.min_tokens and not complete:
        x[END] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in set(log):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(out):
        x[token] -= params.presence_penalty
    return x


def test_min_tokens_is_reached_by_ends_where_the_structure_is_complete(overlapped: Guided) -> None:
    spec = overlapped.spec(choice=["yes", "no"])
    [one] = finished(overlapped.engine(), [request(1, overlapped.prompt("a"), spec, min_tokens=9)])
    text = b"".join(overlapped.vocabulary.tokens[token] for token in output(one) if token != END)
    assert text in (b"yes", b"no")
    assert (len(output(one)), one.finish_reason) == (10, "stop")


def test_a_structure_that_nothing_else_allows_ends_the_request_alone(overlapped: Guided) -> None:
    spec = overlapped.spec(choice=["yes", "no"])
    never = request(1, overlapped.prompt("a"), spec, allowed_token_ids=TokenSet.of([overlapped.prompt("z")[0], END]))
    other = request(2, overlapped.prompt("a"), spec)
    finished(overlapped.engine(), [never, other])
    assert never.finish_reason == "error"
    assert "token" in str(never.error)
    assert overlapped.text(other) in ("yes", "no")


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_grammar_that_fails_ends_its_request_alone(
    overlapped: Guided, alone: list[tuple[list[int], str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, spec = Cursor.advance, overlapped.spec(regex="[a-z]{50}")

    def raising(cursor: Cursor, token: int) -> None:
        if cursor.guide.spec.to_json() == spec:
            raise RuntimeError("a bug")
        advance(cursor, token)

    monkeypatch.setattr(Cursor, "advance", raising)
    engine = overlapped.engine()
    bad = request(500, overlapped.prompt("a"), spec)
    assert results(finished(engine, [*mixed(overlapped), bad])[:-1]) == alone
    assert bad.finish_reason == "error"
    assert "internal" in str(bad.error)
    monkeypatch.undo()
    [good] = finished(engine, [request(501, overlapped.prompt("a"), spec)])
    assert re.fullmatch("[a-z]{50}", overlapped.text(good))
