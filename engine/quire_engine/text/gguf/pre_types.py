"""How text is cut into words before its bytes are merged, for each of llama.cpp's `tokenizer.ggml.pre`: as the models'
own tokenizers do it."""

from dataclasses import dataclass

# Expressions of several models. A model's expressions cut one after the other: what matches from what does not.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"


def _cased(but: str, after: str) -> str:
    """Words of capitals and then small letters, of all letters `but` some."""
    start = r"[^\r\n\p{L}\p{N}]?"
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]"
    return f"{start}{upper}*{lower}+{after}|{start}{upper}+{lower}*{after}"


_GPT4O = rf"{_cased('', _SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_KIMI = r"\p{Han}+|" + _cased(r"&&[^\p{Han}]", _SHORT + "?") + rf"|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # counted from the right
_LINES = r"[^\n]+|\n+"
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True, kw_only=True)
class PreType:
    """One of them."""

    cuts: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is not merged anew
    add_bos: bool = False  # where the file does not say
    add_sep: bool = False
    as_text: bool = False  # merged are characters, not bytes; spaces are written as U+2581


_DIGITS_AND_GPT2 = PreType(cuts=(r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreType(cuts=(_GPT2,))
_ROBERTA = PreType(cuts=(_GPT2,), add_sep=True)
_LLAMA_BPE = PreType(cuts=(_LLAMA3,), whole_words=True, add_bos=True)
_QWEN = PreType(cuts=(_QWEN2,))
_OPENAI = PreType(cuts=(_GPT4O,))
_DEEPSEEK = PreType(cuts=(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK3))
_BAILING = PreType(
    cuts=(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)
_AYA = PreType(cuts=(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))
_GEMMA4 = PreType(cuts=(_LINES,), as_text=True, add_bos=True)

PRE_TYPES: dict[str, PreType] = {
    "a.x-4.0": _PLAIN_GPT2,
    "afmoe": PreType(
        cuts=(
            _THREES,
            "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
            "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            _DEEPSEEK3,
        )
    ),
    "bailingmoe": _BAILING,
    "bailingmoe2": _BAILING,
    "bloom": PreType(cuts=(_BLOOM,)),
    "chameleon": PreType(
        cuts=(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "chatglm-bpe": PreType(cuts=(_LLAMA3,)),
    "codeshell": _DIGITS_AND_GPT2,
    "cohere2moe": _AYA,
    "command-r": PreType(cuts=(r"\p{N}", _GPT2)),
    "dbrx": PreType(cuts=(_LLAMA3,)),
    "deepseek-coder": PreType(cuts=("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, r"\p{N}")),
    "deepseek-llm": PreType(
        cuts=(
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_TO_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-r1-qwen": _QWEN,
    "deepseek-v3": _DEEPSEEK,
    "default": PreType(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "exaone": _DIGITS_AND_GPT2,
    "exaone-moe": PreType(
        cuts=(
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "exaone4": _PLAIN_GPT2,
    "f2llmv2": _QWEN,
    "falcon": PreType(cuts=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "falcon-h1": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "gemma4": _GEMMA4,
    "gigachat": _PLAIN_GPT2,
    "glm4": PreType(cuts=(_LLAMA3,), whole_words=True),
    "glm5": PreType(cuts=(_LLAMA3,), whole_words=True),
    "gpt-2": _PLAIN_GPT2,
    "gpt-4o": _OPENAI,
    "gpt3-finnish": PreType(cuts=(_BLOOM,)),
    "granite-docling": _PLAIN_GPT2,
    "granite-embed-multi-311m": _GEMMA4,
    "granite-embed-multi-97m": PreType(cuts=(_GPT4O,), whole_words=True),
    "grok-2": _QWEN,
    "hunyuan": _QWEN,
    "hunyuan-dense": _DEEPSEEK,
    "hy_v4": _DEEPSEEK,
    "jais": _PLAIN_GPT2,
    "jais-2": PreType(
        cuts=(
            rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|"
            + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
            + r"|\s{1}",
        )
    ),
    "jina-de": _PLAIN_GPT2,
    "jina-es": _PLAIN_GPT2,
    "jina-v1-en": _ROBERTA,
    "jina-v2-code": _ROBERTA,
    "jina-v2-de": _PLAIN_GPT2,
    "jina-v2-es": _PLAIN_GPT2,
    "jina-v5-nano": _LLAMA_BPE,
    "joyai-llm": _DEEPSEEK,
    "kanana2": _OPENAI,
    "kimi-k2": PreType(cuts=(_KIMI,)),
    "kormo": _QWEN,
    "laguna": PreType(cuts=(_LINES, _QWEN2)),
    "lfm2": _LLAMA_BPE,
    "llada-moe": _BAILING,
    "llama-bpe": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama4": _OPENAI,
    "megrez": _QWEN,
    "mellum": _PLAIN_GPT2,
    "mellum2": _DIGITS_AND_GPT2,
    "midm-2.0": _LLAMA_BPE,
    "minerva-7b": _DIGITS_AND_GPT2,
    "minicpm5": PreType(
        cuts=(r"\p{N}{1,3}", rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SIGNS}|{_SPACES}"),
        whole_words=True,
    ),
    "minimax-m2": _OPENAI,
    "modern-bert": _PLAIN_GPT2,
    "mpt": PreType(cuts=(_GPT2,)),
    "olmo": PreType(cuts=(_GPT2,)),
    "phi-2": _PLAIN_GPT2,
    "pixtral": _LLAMA_BPE,
    "poro-chat": PreType(cuts=(_BLOOM,)),
    "qwen2": _QWEN,
    "qwen35": PreType(
        cuts=(
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        ),
    ),
    "refact": _DIGITS_AND_GPT2,
    "roberta-bpe": _ROBERTA,
    "sarvam-moe": PreType(cuts=(_LINES,), as_text=True),
    "seed-coder": PreType(cuts=(rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)),
    "smaug-bpe": PreType(cuts=(_LLAMA3,)),
    "smollm": _DIGITS_AND_GPT2,
    "solar-open": _QWEN,
    "spark2_5": PreType(
        cuts=(
            r"\p{N}{1,3}",
            _HAN_AND_KANA,
            _DEEPSEEK3.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]"),
            r"\p{N}",
        )
    ),
    "stablelm2": _QWEN,
    "starcoder": _DIGITS_AND_GPT2,
    "superbpe": PreType(cuts=(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "talkie": _OPENAI,
    "tekken": PreType(
        cuts=(rf"{_cased('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
        whole_words=True,
        add_bos=True,
    ),
    "tiny_aya": _AYA,
    "trillion": _PLAIN_GPT2,
    "ufakzeka": PreType(cuts=(rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}",)),
    "viking": PreType(cuts=(_BLOOM, r"\p{N}")),
    "whitespace": PreType(cuts=(r"\S+",), as_text=True),
    "youtu": PreType(
        cuts=(
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
            f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|{_HAN_AND_KANA}",
            rf"{_cased('', _SHORT + '?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
        ),
        whole_words=True,
    ),
}
