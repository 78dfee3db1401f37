"""Whatever is written under the mask of a JSON schema is JSON that the schema holds of, says another implementation."""

import json
import random
import re
from collections.abc import Callable
from datetime import date, time
from decimal import Decimal, InvalidOperation, localcontext
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer
from quire_engine.errors import InvalidParameter
from quire_engine.guidance.grammars import composed, json_schema, limits, reason
from schema_corpus import CORPUS
from schema_keywords import OUTPUTS, REFUSED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from vocabularies import CORPUS as PROSE

END = "</s>"
CHUNKS = 16
WALKS = 8
LONGEST = 1500  # tokens
FORMATS = FormatChecker(formats=("email", "ipv4", "ipv6", "uuid"))


def _checks(name: str) -> Callable[[Callable[[str], object]], Callable[[str], object]]:
    """Registers a check that raises ValueError for a string that is not of a format."""

    def register(check: Callable[[str], object]) -> Callable[[str], object]:
        FORMATS.checks(name, raises=ValueError)(lambda value: not isinstance(value, str) or check(value) is not False)
        return check

    return register


@_checks("date")
def _is_date(value: str) -> date:
    """Of some year: which Februaries have 29 days is more than a regular expression can say."""
    return date.fromisoformat("2000" + value[4:])


@_checks("time")
def _is_time(value: str) -> time:
    return time.fromisoformat(re.sub(r":60(?!\d)(?=[.Zz+-])", ":59", value).upper())


@_checks("date-time")
def _is_date_time(value: str) -> None:
    _is_date(value[:10])
    assert value[10] in "Tt"
    _is_time(value[11:])


@_checks("duration")
def _is_duration(value: str) -> bool:
    return re.fullmatch(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)", value) is not None


@_checks("hostname")
def _is_hostname(value: str) -> bool:
    return all(re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", label) for label in value.split("."))


@_checks("uri")
def _is_uri(value: str) -> bool:
    return bool(urlsplit(value).scheme) and not re.search(r"[\s<>\"{}|\\^`]", value)


@cache
def vocabulary() -> tuple[LLTokenizer, list[bytes]]:
    """A byte-level one of a thousand tokens, many of which join what JSON keeps apart, and the bytes of each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        json.dumps(schema, separators=separators) for schema in CORPUS.values() for separators in [(",", ":"), None]
    ]
    tokenizer.train_from_iterator(texts + PROSE, trainer)
    made = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(END))
    return made, [made.decode_bytes([token]) for token in range(made.vocab_size)]


def guided_by(schema: Any, *, lenient: bool = False) -> LLMatcher:
    """A matcher at the beginning of an output. Raises InvalidParameter."""
    grammar = composed(json_schema(schema, lenient=lenient))
    return LLMatcher(vocabulary()[0], grammar, log_level=0, limits=limits())


def refusal_of(schema: Any) -> str:
    """Why a schema cannot be guided by; empty if it can."""
    try:
        return reason(guided_by(schema).get_error())
    except InvalidParameter as error:
        return str(error)


def write(schema: Any, draws: random.Random) -> str:
    """What a model writes that draws at random from what the mask lets it: for a while it would go on, then end."""
    matcher = guided_by(schema)
    tokenizer, spellings = vocabulary()
    end = tokenizer.eos_token
    eager_from = draws.choice([0, 10, 40, 80])
    written = b""
    for step in range(LONGEST):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert not matcher.is_error(), matcher.get_error()
        allowed = np.flatnonzero(mask).tolist()
        assert allowed, f"nothing may follow {written!r}"
        eager = step >= eager_from
        if end in allowed and (len(allowed) == 1 or eager or draws.random() < 0.1):
            assert matcher.is_accepting()
            return written.decode()
        choices = [token for token in allowed if token != end]
        if draws.random() < (0.9 if eager else 0.6):
            choices = _apt(choices, spellings, _orders(written, eager, draws))
        token = draws.choice(choices)
        assert matcher.consume_token(token), matcher.get_error()
        written += spellings[token]
    pytest.fail(f"not ended after {LONGEST} tokens: {written[:200]!r} …")


def _orders(written: bytes, eager: bool, draws: random.Random) -> list[bytes]:
    """First bytes of tokens, in groups, those before others that lead to the end soonest, or farthest from it."""
    if re.sub(rb"\\.", b"", written, flags=re.DOTALL).count(b'"') % 2:  # within a string
        return [b'"', b" @:-/.T", b"0123456789"] if draws.random() < 0.5 else [b'"']
    return [b"}]", b",:", b'"nft-0123456789'] if eager else [b",:", b'{["', b"nft-0123456789"]


def _apt(choices: list[int], spellings: list[bytes], orders: list[bytes]) -> list[int]:
    """The shortest tokens of the first group that there is one of."""
    for order in orders:
        found = [token for token in choices if spellings[token][0] in order]
        if found:
            shortest = min(len(spellings[token]) for token in found)
            return [token for token in found if len(spellings[token]) == shortest]
    return choices


def _decimal(number: str) -> Decimal:
    """As it is written, for floats would be no multiples of 0.1; infinite or zero where the exponent is beyond it."""
    try:
        return Decimal(number)
    except InvalidOperation:
        return Decimal(float(number))


def faults_of(schema: Any, text: str) -> list[str]:
    """What is wrong with an output."""
    exact = json.loads(json.dumps(schema), parse_float=_decimal)
    validator = validator_for(schema, default=Draft202012Validator)(exact, format_checker=FORMATS)
    with localcontext(prec=LONGEST):
        return [fault.message for fault in validator.iter_errors(json.loads(text, parse_float=_decimal))]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_written_under_the_masks_of_a_schema_is_valid(chunk: int) -> None:
    wrong = {}
    for name in sorted(CORPUS)[chunk::CHUNKS]:
        for seed in range(WALKS):
            text = write(CORPUS[name], random.Random(f"{name} {seed}"))
            if faults := faults_of(CORPUS[name], text):
                wrong[f"{name}, {seed}"] = (text[:200], faults)
    assert wrong == {}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_no_mask_can_hold_is_refused_by_name(name: str) -> None:
    schema, word = REFUSED[name]
    assert word.lower() in refusal_of(schema).lower()


def takes(schema: Any, text: str, *, lenient: bool = False) -> bool:
    """Whether a text can be written, byte by byte, and end there."""
    matcher = guided_by(schema, lenient=lenient)
    assert not matcher.is_error(), matcher.get_error()
    spellings = vocabulary()[1]
    single = {spelling: token for token, spelling in enumerate(spellings) if len(spelling) == 1}
    tokens = [single[bytes([byte])] for byte in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "9223372036854775807"),
        ({"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}, "-0.5"),
        ({"const": 2**60 + 1}, "1152921504606846977"),
        ({"enum": ["a", 2**60 + 1]}, "1152921504606846977"),
        ({"const": {"id": 2**60 + 1}}, '{"id": 1152921504606846977}'),
        ({"enum": [123456789.123456789]}, "123456789.12345679"),
    ],
)
def test_numbers_that_cannot_be_kept_to_are_free_where_a_schema_may_be_kept_to_in_part(schema: Any, text: str) -> None:
    assert _is_valid(schema, text)
    assert takes(schema, text, lenient=True)


def test_what_is_left_of_an_enum_of_integers_is_that_they_are() -> None:
    schema = {"enum": [2**60, 1]}
    assert takes(schema, "1", lenient=True)
    assert not takes(schema, '"1"', lenient=True)


def _is_valid(schema: Any, text: str) -> bool:
    try:
        return not faults_of(schema, text)
    except json.JSONDecodeError:
        return False


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_can_be_written_if_and_only_if_it_is_valid(name: str) -> None:
    schema, right, wrong = OUTPUTS[name]
    assert (_is_valid(schema, right), _is_valid(schema, wrong)) == (True, False), "as another implementation has it"
    assert (takes(schema, right), takes(schema, wrong)) == (True, False)


def test_the_corpus_is_of_schemas() -> None:
    assert len(CORPUS) >= 320
    for schema in CORPUS.values():
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
