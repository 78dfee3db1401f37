"""Tiny vocabularies of each kind, made by the `tokenizers` trainers."""

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the other fox doesn't mind it.",
    "naïve café — “quoted” … 你好，世界 🌍🏳️‍🌈 é ñ ß",
    "def f(x):\n\treturn {'a': [1, 2.5e-3]}\n\n\n  thethe other others other's !",
] * 4
SPECIAL = ["<s>", "</s>"]
SPACE = "▁"


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieces(*, prefix: bool) -> Tokenizer:
    marked = Tokenizer(models.BPE())
    marked.normalizer = normalizers.Replace(" ", SPACE)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    marked.train_from_iterator(CORPUS, trainer)
    learnt = marked.get_vocab()
    words = sorted(learnt, key=learnt.__getitem__)
    spellings = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words[3:], SPACE * 2]
    vocabulary = {spelling: place for place, spelling in enumerate(dict.fromkeys(spellings))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", SPACE)
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's BPE as Llama 2 and Mistral have it: a text begins without a space."""
    return _pieces(prefix=True)


def byte_fallback_plain() -> Tokenizer:
    """As Gemma has it: a space is a space."""
    return _pieces(prefix=False)


def unigram() -> Tokenizer:
    """SentencePiece's unigram as T5 has it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words and no decoder: spaces between all of them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_added(make: Callable[[], Tokenizer]) -> Tokenizer:
    """Every kind gets a special token that is no ASCII, and an added one that is not special."""
    tokenizer = make()
    tokenizer.add_special_tokens([AddedToken("<｜end｜>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


KINDS = {
    make.__name__: _with_added(make)
    for make in (byte_level, byte_fallback, byte_fallback_plain, unigram, word_piece, words)
}
