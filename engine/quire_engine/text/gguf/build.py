"""A tokenizer from a GGUF file alone. Texts become the tokens that llama.cpp makes of them, except where llama.cpp only
comes near to what the model's own tokenizer does (capitals and accents where words are cut by them)."""

import logging
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quire_engine.text.gguf.pre_types import PRE_TYPES, PreType
from quire_engine.weights.gguf.file import shown
from quire_engine.weights.gguf.vocabulary import Kind, Vocabulary

log = logging.getLogger(__name__)

_SPACE = "\u2581"  # SentencePiece's
_WHOLE = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)  # found in a text before anything else
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


class GGUFTokenizer(PreTrainedTokenizerFast):
    """transformers' face of it: chat template and special tokens by name."""

    def __init__(self, fast: Tokenizer, **names: Any) -> None:
        self._tokenizer = fast  # transformers' own argument for it would copy it, which takes seconds
        super().__init__(clean_up_tokenization_spaces=False, **names)


def build(vocabulary: Vocabulary) -> GGUFTokenizer:
    """Raises ModelError, which names the key, for a section that is not sound or a kind of tokenizer that is not
    read."""
    makers = {
        "llama": _sentencepiece,
        "gpt2": _byte_pairs,
        "gemma4": _byte_pairs,
        "whitespace": _byte_pairs,
        "bert": _word_pieces,
        "t5": _unigram,
    }
    make = makers.get(vocabulary.model)
    if make is None:
        raise vocabulary.fault("model", f"is {shown(vocabulary.model)}; read are {', '.join(makers)}")
    fast = make(vocabulary)
    fast.add_tokens(_added(vocabulary))
    names: dict[str, Any] = {}
    for name, key in _NAMES.items():
        if (token := vocabulary.token(key)) is not None:
            names[name] = vocabulary.tokens[token]
    return GGUFTokenizer(fast, chat_template=vocabulary.chat_template, **names)


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's byte pairs: of all neighbours that make a token those go first whose token has the best score."""
    tokens, ids = vocabulary.tokens, vocabulary.ids
    if not vocabulary.scores:
        raise vocabulary.fault("scores", "is missing")
    made = [at for at, kind in enumerate(vocabulary.kinds) if kind not in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE)]
    made.sort(key=lambda at: (-vocabulary.scores[at], at))
    merges = [
        (token[:cut], token[cut:])
        for token in map(tokens.__getitem__, made)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in ids and token[cut:] in ids
    ]
    unknown = vocabulary.token("unknown_token_id")
    fast = Tokenizer(
        models.BPE(
            ids,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    fast.normalizer = _spaces_shown(prefix)
    fast.decoder = _spaces_back(prefix)
    fast.post_processor = _frame(vocabulary, bos=True)
    return fast


def _byte_pairs(vocabulary: Vocabulary) -> Tokenizer:
    """Merges in a given order within words."""
    pre = _pre_type(vocabulary)
    fast = Tokenizer(
        models.BPE(vocabulary.ids, vocabulary.merges, ignore_merges=pre.whole_words, byte_fallback=pre.as_text)
    )
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    if vocabulary.model == "whitespace":
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if vocabulary.flag("normalizer.lowercase", False):
            fast.normalizer = normalizers.Lowercase()
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    elif pre.as_text:
        fast.normalizer = _spaces_shown(False)
        fast.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        fast.decoder = _spaces_back(False)
    else:
        bytes_shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_shown])
        fast.decoder = decoders.ByteLevel()
    fast.post_processor = _frame(vocabulary, bos=pre.add_bos, sep=pre.add_sep)
    return fast


def _pre_type(vocabulary: Vocabulary) -> PreType:
    name = "gemma4" if vocabulary.model == "gemma4" else vocabulary.pre
    if not name:
        log.warning(
            "%s does not say how text is cut into words (tokenizer.ggml.pre); tokens may differ from the model's own; "
            "convert the model again",
            vocabulary.path.name,
        )
        name = "default"
    if name not in PRE_TYPES:
        raise vocabulary.fault("pre", f"is {shown(name)}, which is not known")
    return PRE_TYPES[name]


def _word_pieces(vocabulary: Vocabulary) -> Tokenizer:
    """BERT's: the longest token first. Files mark the beginnings of words, where BERT marks what is inside."""
    pieces: dict[str, int] = {}
    named = {vocabulary.token(key) for key in _NAMES.values()}
    for at, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if kind in _WHOLE or at in named:
            piece = token
        else:
            piece = token[1:] if token.startswith(_SPACE) and len(token) > 1 else "##" + token
        if pieces.setdefault(piece, at) != at:
            raise vocabulary.fault("tokens", f"has {piece[:80]!r} twice")
    unknown = vocabulary.token("unknown_token_id")
    if unknown is None:
        raise vocabulary.fault("unknown_token_id", "is missing")
    fast = Tokenizer(models.WordPiece(pieces, unk_token=vocabulary.tokens[unknown]))
    lowercase = vocabulary.flag("normalizer.lowercase", True)
    fast.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=vocabulary.flag("normalizer.strip_accents", lowercase)
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    first, last = vocabulary.token("cls_token_id"), vocabulary.token("seperator_token_id")
    first = vocabulary.token("bos_token_id") if first is None else first
    if first is None or last is None:
        raise vocabulary.fault("seperator_token_id" if last is None else "cls_token_id", "is missing")
    fast.post_processor = _template(["first", "$A", "last"], ["$B:1", "last:1"], {"first": first, "last": last})
    return fast


def _unigram(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's unigrams: the most probable way to write the text."""
    if not vocabulary.scores:
        raise vocabulary.fault("scores", "is missing")
    scores = [
        (token, 0.0 if kind is Kind.USER_DEFINED else score)
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, vocabulary.scores, strict=True)
    ]
    fast = Tokenizer(models.Unigram(scores, unk_id=vocabulary.token("unknown_token_id")))
    steps: list[normalizers.Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    prefix = vocabulary.flag("add_space_prefix", False)
    if vocabulary.flag("remove_extra_whitespaces", False):
        prefix = True
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    fast.normalizer = normalizers.Sequence([*steps, _spaces_shown(prefix)])
    fast.decoder = _spaces_back(prefix)
    fast.post_processor = _frame(vocabulary, eos=True)
    return fast


def _spaces_shown(prefix: bool) -> normalizers.Normalizer:
    shown = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), shown]) if prefix else shown


def _spaces_back(prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _frame(
    vocabulary: Vocabulary, *, bos: bool = False, eos: bool = False, sep: bool = False
) -> processors.PostProcessor:
    """Special tokens around a text, and between two; what the file does not say as given."""
    wanted = {}
    for name, default, key in (
        ("bos", bos, "bos_token_id"),
        ("eos", eos, "eos_token_id"),
        ("sep", sep, "seperator_token_id"),
    ):
        token = vocabulary.token(key)
        if not vocabulary.flag(f"add_{name}_token", default and token is not None):
            continue
        if token is None:
            raise vocabulary.fault(f"add_{name}_token", f"is true, but tokenizer.ggml.{key} is missing")
        wanted[name] = token
    first = ["$A"]
    second = ["$B:1"]
    if "eos" in wanted:
        first, second = [*first, "eos"], [*second, "eos:1"]
    if "bos" in wanted:
        first, second = ["bos", *first], second if "sep" in wanted else ["bos:1", *second]
    return _template(first, ["sep:1", *second] if "sep" in wanted else second, wanted)


def _template(first: list[str], second: list[str], tokens: dict[str, int]) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=first,
        pair=[*first, *second],
        special_tokens=[{"id": name, "ids": [token], "tokens": [name]} for name, token in tokens.items()],
    )


def _added(vocabulary: Vocabulary) -> list[AddedToken]:
    """Tokens that are found in a text before it is cut into words."""
    left, right = _strips(vocabulary)
    return [
        AddedToken(
            token,
            special=kind is not Kind.USER_DEFINED,
            normalized=False,
            lstrip=token in left,
            rstrip=token in right,
        )
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in _WHOLE
    ]


def _strips(vocabulary: Vocabulary) -> tuple[set[str], set[str]]:
    """Tokens that swallow the space before them, and after them. Files do not say so; the models are known by name."""
    name = str(vocabulary.metadata.get("general.name", "")).lower()
    arch = str(vocabulary.metadata.get("general.architecture", ""))
    if vocabulary.pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or arch in ("nomic-bert-moe", "jina-bert-v3"):
        return {"<mask>"}, set()
    if "modern-bert" in name:
        return {"[MASK]"}, set()
    if "phi-3" in name or "phi3" in name:
        special = {token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in _WHOLE}
        return set(), special - {"<unk>", "<s>", "<|endoftext|>"}
    return set(), set()
