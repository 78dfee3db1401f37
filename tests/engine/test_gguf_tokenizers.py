"""Tokenizers from GGUF files alone: against what llama.cpp expects of its own vocabularies, tokens that its code made
(llama_cpp_tokens.json), and SentencePiece."""

import json
import random
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_engine.config import DEMO_MODEL
from quire_engine.errors import ModelError
from quire_engine.text.gguf.build import build
from quire_engine.text.gguf.pre_types import PRE_TYPES
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.gguf.vocabulary import Kind, Vocabulary
from quire_engine.weights.resolve import ModelFiles, resolve
from sentencepiece import sentencepiece_model_pb2

EXPECTED = json.loads((Path(__file__).parent / "llama_cpp_tokens.json").read_text())
# llama.cpp takes accents off by one part of a letter, and has no parts of Korean syllables; BERT has all.
OTHERWISE = {"bert-bge"}


def files_of(name: str) -> ModelFiles:
    return resolve(DEMO_MODEL if name == "smollm2" else str(llama_cpp.HOME / "models" / f"ggml-vocab-{name}.gguf"))


def vocabulary_of(name: str) -> Vocabulary:
    vocabulary = files_of(name).vocabulary
    assert vocabulary is not None
    return vocabulary


@pytest.mark.parametrize("name", EXPECTED["files"])
def test_tokens_are_llama_cpps(name: str) -> None:
    """Of its own test texts (with special tokens as text, as its test has it), and of one with all sorts of things."""
    files, expected = files_of(name), EXPECTED["files"][name]
    assert files.vocabulary is not None and files.gguf_path is not None
    backend = build(files.vocabulary)
    fast = backend.backend_tokenizer
    assert len(backend) == len(files.vocabulary.tokens)
    assert list(files.vocabulary.ends) == expected["ends"]
    if name not in OTHERWISE:
        assert fast.encode(EXPECTED["text"]).ids == expected["tokens"]
    texts = files.gguf_path.with_suffix(".gguf.inp")
    if not texts.exists():
        return
    fast.encode_special_tokens = True
    lines = files.gguf_path.with_suffix(".gguf.out").read_text().splitlines()
    cases = texts.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    assert len(lines) > 40
    for text, line in zip(cases, lines, strict=False):  # nothing follows the last separator
        assert fast.encode(text, add_special_tokens=False).ids == [int(token) for token in line.split()], text


def test_words_are_cut_as_llama_cpp_cuts_them() -> None:
    """By each of its pre-tokenizer types, with one vocabulary."""
    gpt2 = vocabulary_of("gpt-2")
    listed = {name for group in EXPECTED["pre"] for name in group["names"]}
    assert listed == {name for name, pre in PRE_TYPES.items() if not pre.as_text}
    made: dict[Any, list[int]] = {}
    for group in EXPECTED["pre"]:
        for name in group["names"]:
            if PRE_TYPES[name] not in made:
                vocabulary = Vocabulary(gpt2.path, {**gpt2.metadata, "tokenizer.ggml.pre": name})
                fast = build(vocabulary).backend_tokenizer
                made[PRE_TYPES[name]] = fast.encode(EXPECTED["text"], add_special_tokens=False).ids
            assert made[PRE_TYPES[name]] == group["tokens"], name


@pytest.mark.parametrize("name", ["llama-spm", "baichuan", "nomic-bert-moe"])
def test_tokens_are_sentencepieces(name: str) -> None:
    vocabulary = vocabulary_of(name)
    model = sentencepiece_model_pb2.ModelProto()
    unigram = vocabulary.model == "t5"
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True):
        piece = model.pieces.add(piece=token, score=score)
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.Value(kind.name)
    model.trainer_spec.model_type = 1 if unigram else 2
    model.trainer_spec.byte_fallback = not unigram
    unknown = vocabulary.token("unknown_token_id")
    model.trainer_spec.unk_piece = vocabulary.tokens[unknown or 0]
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = unigram
    model.normalizer_spec.precompiled_charsmap = vocabulary.charsmap
    truth = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    fast = build(vocabulary).backend_tokenizer
    draw = random.Random(0)
    parts = ["a", "b", "ab", "aa", "ha", "the", "Hello", "--", "==", "...", " ", "  ", "\n", "\t", "1", "23", "é", "е"]
    parts += ["你好", "한국", "🌍", "①", "ﬁ", "\u3000", "\u200b", "e\u0301", "ꙮ"]
    for _ in range(500):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 40)))
        assert fast.encode(text, add_special_tokens=False).ids == truth.encode(text), repr(text)


def test_the_demo_model() -> None:
    files = resolve(DEMO_MODEL)
    tokenizer = Tokenizer.load(files)
    messages = [{"role": "user", "content": "Count: 1, 22\n\n333"}]
    text = tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False)
    assert text.endswith("<|im_start|>user\nCount: 1, 22\n\n333<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer.encode(text)
    assert tokens[:2] == [1, 9690] and tokens.count(2) == 2
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert 2 in end_tokens(files, tokenizer)


# ---- small sections, whole and broken -----------------------------------------------------------------------------
SECTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "pre": "gpt-2",
        "tokens": ["<s>", "</s>", "a", "b", "Ġ", "ab", "Ġa", "<x>"],
        "token_type": [3, 3, 1, 1, 1, 1, 1, 4],
        "merges": ["a b", "Ġ a"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "llama": {
        "tokens": ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab"],
        "token_type": [2, 3, 3, 6, 6, 1, 1, 1, 1, 1],
        "scores": [0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -1.0, -2.0],
    },
    "bert": {
        "tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁a", "b"],
        "token_type": [3, 3, 3, 3, 1, 1],
        "unknown_token_id": 1,
        "cls_token_id": 2,
        "seperator_token_id": 3,
    },
    "t5": {
        "tokens": ["<pad>", "</s>", "<unk>", "▁", "a", "▁a"],
        "token_type": [3, 3, 2, 1, 1, 1],
        "scores": [0.0, 0.0, 0.0, -3.0, -2.0, -1.0],
        "remove_extra_whitespaces": True,
    },
}


def section(model: str, /, **changes: Any) -> Vocabulary:
    """None: left out. Names with `__` for a dot."""
    keys = {"model": model, **SECTIONS[model], **{key.replace("__", "."): value for key, value in changes.items()}}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return Vocabulary(Path("m.gguf"), {"general.architecture": "llama", **metadata})


def encode(vocabulary: Vocabulary, text: str) -> list[str]:
    fast = build(vocabulary).backend_tokenizer
    return [vocabulary.tokens[token] for token in fast.encode(text).ids]


def test_flags() -> None:
    assert encode(section("gpt2"), "ab a<x>") == ["ab", "Ġa", "<x>"]
    assert encode(section("gpt2", add_bos_token=True, add_eos_token=True), "a") == ["<s>", "a", "</s>"]
    assert encode(section("gpt2", pre="llama-bpe"), "a") == ["<s>", "a"], "what the type says where the file does not"
    assert encode(section("gpt2", pre="llama-bpe", add_bos_token=False), "a") == ["a"]
    assert encode(section("llama"), "aé") == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    assert encode(section("llama", add_space_prefix=False, add_bos_token=False), "a a") == ["a", "▁a"]
    assert encode(section("llama"), "a</s>a") == ["<s>", "▁a", "</s>", "▁a"]
    assert encode(section("bert"), "AB b") == ["[CLS]", "▁a", "b", "[UNK]", "[SEP]"]
    assert encode(section("bert", normalizer__lowercase=False), "A") == ["[CLS]", "[UNK]", "[SEP]"]
    assert encode(section("t5"), "  a   a ") == ["▁a", "▁a", "</s>"]
    assert encode(section("t5", add_space_prefix=True, remove_extra_whitespaces=False), "a a") == ["▁a", "▁a", "</s>"]
    fast = build(section("gpt2", add_bos_token=True, add_eos_token=True, add_sep_token=True, seperator_token_id=4))
    assert fast.backend_tokenizer.encode("a", "b").ids == [0, 2, 1, 4, 3, 1]
    assert build(section("llama")).backend_tokenizer.decode([1, 8, 5, 6, 3, 4]) == "a aé"


def test_special_tokens_that_swallow_spaces() -> None:
    """As the models' own tokenizers have it; the files do not say so."""
    plain = section("llama")
    phi = Vocabulary(plain.path, {**plain.metadata, "general.name": "Phi-3 Mini"})
    assert encode(plain, "a</s>  a") == ["<s>", "▁a", "</s>", "▁", "▁", "▁a"]
    assert encode(phi, "a</s>  a") == ["<s>", "▁a", "</s>", "▁a"]
    masked = section("gpt2", pre="jina-v2-de", tokens=[*SECTIONS["gpt2"]["tokens"][:-1], "<mask>"])
    assert encode(masked, "a <mask> a") == ["a", "<mask>", "Ġa"]


def test_chat_templates() -> None:
    one = Vocabulary(Path("m.gguf"), {**section("gpt2").metadata, "tokenizer.chat_template": "{{ messages }}"})
    assert build(one).chat_template == "{{ messages }}"
    two = Vocabulary(Path("m.gguf"), {**one.metadata, "tokenizer.chat_template.tool_use": "{{ tools }}"})
    assert build(two).chat_template == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    broken = Vocabulary(Path("m.gguf"), {**one.metadata, "tokenizer.chat_template": 3})
    with pytest.raises(ModelError, match=r"tokenizer\.chat_template is no text"):
        build(broken)


def test_ends_by_key_and_by_name() -> None:
    tokens = [*SECTIONS["gpt2"]["tokens"][:-1], "<|im_end|>"]
    vocabulary = section("gpt2", tokens=tokens, eot_token_id=2, token_type=[3, 1, 1, 1, 1, 1, 1, 1])
    assert vocabulary.ends == (1, 2, 7)
    assert vocabulary.kinds[7] is Kind.CONTROL, "files have it as a word"
    assert section("gpt2", eos_token_id=0, eom_token_id=3).ends == (0, 1, 3)
    names = ["<|return|>", "<|call|>", "<|end|>", "a", "b", "<|channel|>", "ab", "Ġ"]
    harmony = section("gpt2", tokens=names, merges=["a b"], eos_token_id=0, bos_token_id=None)
    assert harmony.ends == (0, 1), "an analysis is followed by an answer"
    assert harmony.kinds[2] is harmony.kinds[5] is Kind.USER_DEFINED, "read from the answer"


@pytest.mark.parametrize("model", ["rwkv", "plamo2", "hybriddna"])
def test_other_kinds_are_refused_by_name(model: str) -> None:
    metadata = {**section("gpt2").metadata, "tokenizer.ggml.model": model}
    with pytest.raises(ModelError, match=rf"tokenizer\.ggml\.model is '{model}'; read are llama, gpt2"):
        build(Vocabulary(Path("m.gguf"), metadata))


@pytest.mark.parametrize(
    ("model", "key", "value", "words"),
    [
        ("gpt2", "model", None, "is missing"),
        ("gpt2", "tokens", None, "is missing"),
        ("gpt2", "tokens", [], "is empty"),
        ("gpt2", "tokens", [1, 2], "is no list of texts"),
        ("gpt2", "tokens", ["a", "b", "a"], "has 'a' twice"),
        ("gpt2", "token_type", [1, 1], "has 2 integers for 8 tokens"),
        ("gpt2", "token_type", "normal", "is no list of integers"),
        ("gpt2", "merges", None, "is missing"),
        ("gpt2", "merges", ["a b", "b b"], r"has 'b b' \(number 1\), which is not of tokens or makes none"),
        ("gpt2", "merges", ["ab"], r"has 'ab' \(number 0\)"),
        ("gpt2", "merges", [["a", "b"]], "is no list of texts"),
        ("gpt2", "pre", "gpt-9", "is 'gpt-9', which is not known"),
        ("gpt2", "bos_token_id", 8, "is 8, but there are 8 tokens"),
        ("gpt2", "eos_token_id", -5, "is -5, but there are 8 tokens"),
        ("gpt2", "eot_token_id", "</s>", "is '</s>', which is no token id"),
        ("gpt2", "add_bos_token", 1, "is 1, neither true nor false"),
        ("llama", "scores", None, "is missing"),
        ("llama", "scores", [0.0], "has 1 numbers for 10 tokens"),
        ("llama", "scores", [float("nan")] * 10, "has numbers that are not finite"),
        ("bert", "seperator_token_id", None, "is missing"),
        ("t5", "precompiled_charsmap", [1, 2, 3], "is no table of SentencePiece's"),
        ("t5", "precompiled_charsmap", [4, 0, 0, 0, 0, 255, 255, 0, 0], "is no table of SentencePiece's"),
        ("t5", "precompiled_charsmap", [999], "is not made of bytes"),
    ],
)
def test_a_broken_section_is_refused_by_key(model: str, key: str, value: Any, words: str) -> None:
    vocabulary = section(model, **{key: value})
    with pytest.raises(ModelError, match=rf"m\.gguf: tokenizer\.ggml\.{key} {words}"):
        build(vocabulary).backend_tokenizer.encode("a b")
        _ = vocabulary.ends


def test_a_flag_without_its_token() -> None:
    with pytest.raises(ModelError, match=r"add_bos_token is true, but tokenizer\.ggml\.bos_token_id is missing"):
        build(section("gpt2", add_bos_token=True, bos_token_id=None))


def test_what_nobody_knows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    build(section("gpt2", suppress_tokens=[3], fim_pre_token_id=2))
    assert caplog.messages == ["m.gguf: tokenizer.ggml.suppress_tokens is not understood and has no effect"]
    caplog.clear()
    build(section("gpt2", pre=None))
    assert "does not say how text is cut into words" in caplog.messages[0]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text("ab Ġ▁\0", max_size=5),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), model=st.sampled_from(sorted(SECTIONS)))
def test_any_section_works_or_is_refused(data: st.DataObject, model: str) -> None:
    keys = [*SECTIONS[model], "merges", "scores", "precompiled_charsmap", "mask_token_id", "add_eos_token"]
    changes: dict[str, Any] = {}
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)):
        whole = SECTIONS[model].get(key)
        if isinstance(whole, list) and data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(whole) - 1))
            changes[key] = [*whole[:place], data.draw(JUNK | st.sampled_from(whole)), *whole[place + 1 :]]
        else:
            changes[key] = data.draw(JUNK)
    vocabulary = section(model, **changes)
    try:
        tokenizer = Tokenizer(build(vocabulary))
        _ = vocabulary.ends
    except ModelError as error:
        assert "tokenizer.ggml." in str(error)
        return
    assert tokenizer.size == len(vocabulary.tokens)
    tokenizer.decode(tokenizer.encode("ab a\n b"))
