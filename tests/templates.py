"""Chat templates as models bring them (llama.cpp collects them), for Quire and for transformers."""

import functools
from pathlib import Path

from llama_cpp import HOME
from quire_engine.text.chat_template import ChatTemplate
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEMPLATES = sorted((HOME / "models/templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def read(path: Path) -> ChatTemplate:
    return ChatTemplate(path.read_text(), SPECIAL)


@functools.cache
def transformers_tokenizer() -> PreTrainedTokenizerFast:
    """Of one word, which renders whatever template it is given."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")), **SPECIAL)
