"""Random tokens of every kind of vocabulary as text: one after the other, all at once, and as the library has it.

What is compared: the pieces of a stream, joined, with `tokenizers`' own `decode` of all ids (which is transformers'
without its clean-up of spaces), special tokens skipped or not. There is one difference, and it is SentencePiece's own
way: where byte tokens that follow one another are not UTF-8 throughout, `tokenizers` gives up all of them, and here
U+FFFD stands for the bytes that are no character alone. Nobody who reads a stream could take characters back.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from quire_engine.text.detokenizer import Detokenizer, TokenTable
from quire_engine.text.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast
from vocabularies import CORPUS, KINDS, SPECIAL

BYTE = re.compile(r"<0x(..)>")
TOKENIZERS = {kind: Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast)) for kind, fast in KINDS.items()}
kinds = pytest.mark.parametrize("kind", KINDS)
picks = st.lists(st.integers(0, 10**6), max_size=40)


def ids_of(fast: tokenizers.Tokenizer, numbers: list[int]) -> list[int]:
    """Every second number picks a part of a character or an added token, if there are any."""
    vocabulary = fast.get_vocab()
    few = [token for word, token in vocabulary.items() if len(fast.decode([token]).strip("\ufffd ")) == 0]
    few += sorted(fast.get_added_tokens_decoder())
    every = sorted(vocabulary.values())
    return [(few if number % 2 else every)[number // 2 % len(few if number % 2 else every)] for number in numbers]


def characters(run: bytes) -> str:
    """As SentencePiece reads bytes: one at a time, where they begin no character."""
    text = ""
    while run:
        for length in (1, 2, 3, 4):
            try:
                text += run[:length].decode()
            except UnicodeDecodeError:
                continue
            run = run[length:]
            break
        else:
            text, run = text + "\ufffd", run[1:]
    return text


def library(fast: tokenizers.Tokenizer, ids: list[int], skip: bool) -> str:
    """What `tokenizers` makes of the ids, once bytes that are no character are spelled as the bytes of U+FFFD."""
    special = {token for token, added in fast.get_added_tokens_decoder().items() if added.special and skip}
    if fast.token_to_id("<0x00>") is None:
        return fast.decode(ids, skip_special_tokens=skip)
    mended: list[int] = []
    run = b""
    for token in [*(token for token in ids if token not in special), None]:
        found = None if token is None else BYTE.fullmatch(fast.id_to_token(token))
        if found:
            run += bytes.fromhex(found[1])
            continue
        mended += [fast.token_to_id(f"<0x{byte:02X}>") for byte in characters(run).encode()]
        mended += [] if token is None else [token]
        run = b""
    return fast.decode(mended, skip_special_tokens=skip)


@kinds
@given(numbers=picks, skip=st.booleans())
def test_stream_equals_decode(kind: str, numbers: list[int], skip: bool) -> None:
    fast, tokenizer = KINDS[kind], TOKENIZERS[kind]
    ids = ids_of(fast, numbers)
    stream = tokenizer.stream(skip_special_tokens=skip, spaces_between_special_tokens=True)
    pieces = []
    for token in ids:
        pieces.append(stream.step(token))
        assert stream.length == len("".join(pieces))
    text = "".join(pieces) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip) == library(fast, ids, skip)


@kinds
@given(text=st.sampled_from(CORPUS), skip=st.booleans())
def test_texts_come_back(kind: str, text: str, skip: bool) -> None:
    """Of whole characters everything is as the libraries have it, and no half one is ever shown."""
    fast, tokenizer = KINDS[kind], TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    stream = tokenizer.stream(skip_special_tokens=skip, spaces_between_special_tokens=True)
    pieces = [stream.step(token) for token in ids]
    hub = PreTrainedTokenizerFast(tokenizer_object=fast)
    expected = hub.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(pieces) + stream.flush() == fast.decode(ids, skip_special_tokens=skip) == expected
    assert "\ufffd" not in "".join(pieces)


@kinds
@given(numbers=picks, cut=st.integers(0, 40), skip=st.booleans())
@example(numbers=[303, 4, 4, 4], cut=4, skip=True)  # a part of a character, then tokens that are skipped
def test_an_output_goes_on_from_its_prompt(kind: str, numbers: list[int], cut: int, skip: bool) -> None:
    """Cut anywhere, in the middle of a character too: both parts together are the text of all."""
    fast, tokenizer = KINDS[kind], TOKENIZERS[kind]
    ids = ids_of(fast, numbers)
    first = tokenizer.stream(skip_special_tokens=skip, spaces_between_special_tokens=True)
    prompt = "".join(map(first.step, ids[:cut]))
    second = tokenizer.stream(skip_special_tokens=skip, spaces_between_special_tokens=True, after=ids[:cut])
    output = "".join(map(second.step, ids[cut:])) + second.flush()
    assert prompt + output == library(fast, ids, skip)
    assert second.length == len(output)


@kinds
@given(numbers=picks)
@example(numbers=[])
def test_tokens_joined_give_the_text(kind: str, numbers: list[int]) -> None:
    fast, tokenizer = KINDS[kind], TOKENIZERS[kind]
    ids = ids_of(fast, numbers)
    start = tokenizer.encode("fox")
    joined = b"".join(map(tokenizer.token_bytes, ids))
    both = library(fast, start + ids, False)
    before = library(fast, start, False)
    shown = characters(joined) if "byte_fallback" in kind else joined.decode(errors="replace")
    assert before + shown == both


def test_names_of_tokens() -> None:
    for kind in ("byte_fallback", "byte_fallback_plain", "unigram"):
        tokenizer = TOKENIZERS[kind]
        assert tokenizer.token_text(tokenizer.vocabulary()["▁the"]) == " the"
        begins = " the" if kind == "byte_fallback_plain" else "the"
        assert tokenizer.token_text(tokenizer.vocabulary()["▁the"], begins=True) == begins
    assert TOKENIZERS["word_piece"].token_text(KINDS["word_piece"].token_to_id("the")) == " the"
    assert TOKENIZERS["byte_level"].token_text(KINDS["byte_level"].token_to_id("Ã")) == "bytes:\\xc3"
    fallback = TOKENIZERS["byte_fallback"]
    assert fallback.token_bytes(fallback.vocabulary()["<0xC3>"]) == b"\xc3"
    assert fallback.token_text(fallback.vocabulary()["<0xC3>"]) == "bytes:\\xc3"
    assert fallback.token_text(fallback.vocabulary()["<0x41>"]) == "A"


def test_what_a_library_takes_back() -> None:
    """The tokens that stopped a whole replica's session: the library's incremental decoder raises at the last one."""
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.vocabulary()[word] for word in ("<0x41>", "<0xC3>", "a")]
    stream = tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True)
    assert [stream.step(token) for token in ids] == ["A", "", "\ufffda"]


@pytest.mark.parametrize(("kind", "part"), [("byte_level", "Ã"), ("byte_fallback", "<0xC3>")])
def test_an_output_of_one_part_of_a_character(kind: str, part: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.stream(skip_special_tokens=True, spaces_between_special_tokens=True, after=tokenizer.encode("a"))
    assert stream.step(tokenizer.vocabulary()[part]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_without_spaces() -> None:
    tokenizer, fast = TOKENIZERS["words"], KINDS["words"]
    ids = [fast.token_to_id(word) for word in ("fox", *SPECIAL, "other", "</s>")]
    for spaces, expected in ((True, "fox <s> </s> other </s>"), (False, "fox <s></s> other </s>")):
        stream = tokenizer.stream(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert "".join(map(stream.step, ids)) + stream.flush() == expected


def test_bytes_as_sentencepiece_reads_them(tmp_path: Path) -> None:
    """Against SentencePiece itself, with a vocabulary that it made."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "pieces"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    pieces = {truth.id_to_piece(token): token for token in range(truth.get_piece_size())}
    model = tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.decoder = KINDS["byte_fallback"].decoder
    table = TokenTable(fast)

    @given(st.lists(st.integers(3, truth.get_piece_size() - 1), max_size=30), st.lists(st.integers(3, 258)))
    def compare(some: list[int], more: list[int]) -> None:
        ids = [pieces["▁the"], *more[: len(more) // 2], *some, *more[len(more) // 2 :]]
        stream = Detokenizer(table, skip_special_tokens=False, spaces_between_special_tokens=True)
        assert "".join(map(stream.step, ids)) + stream.flush() == truth.decode(ids)

    compare()


class Counting:
    """A tokenizer that counts what it is asked."""

    def __init__(self, fast: tokenizers.Tokenizer) -> None:
        self.fast = fast
        self.decoder = self
        self.calls = self.tokens = 0
        self.id_to_token: Callable[[int], str | None] = fast.id_to_token
        self.get_added_tokens_decoder: Callable[[], dict[int, Any]] = fast.get_added_tokens_decoder

    def decode(self, spellings: list[str]) -> str:
        self.calls += 1
        self.tokens += len(spellings)
        return self.fast.decoder.decode(spellings)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("tail", [[0x80], [0xE4], [0xE4, 0xBD], [0xF0, 0x9F, 0x8C], [0x41, 0xC3]])
def test_the_work_of_a_token_is_bounded(kind: str, tail: list[int]) -> None:
    """However long a tail that never becomes a character: no text waits, and the library is not asked again."""
    fast = Counting(KINDS[kind])
    table = TokenTable(fast)
    stream = Detokenizer(table, skip_special_tokens=True, spaces_between_special_tokens=True)
    known = {table[token]: token for token in KINDS[kind].get_vocab().values() if len(table[token]) == 1}
    ids = [known[bytes([byte])] for byte in tail * (4000 // len(tail))]
    asked = fast.calls
    shown = ""
    for number, token in enumerate(ids, 1):
        shown += stream.step(token)
        assert number - len(shown.encode("utf-8", "replace")) <= 3, "no more than a part of a character waits"
    written = b"".join(table[token] for token in ids)
    whole = characters(written) if kind == "byte_fallback" else written.decode(errors="replace")
    assert shown + stream.flush() == whole
    assert fast.calls - asked <= 1, "every token is known by now, but for how it begins a text"
