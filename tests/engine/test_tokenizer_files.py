"""A tokenizer's files that are not what they should be: which one, and what to do, is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import add_tokenizer
from quire_engine.errors import ModelError
from quire_engine.text.tokenizer import Tokenizer, end_tokens
from quire_engine.weights.resolve import resolve

Change = Callable[[Path], Any]
BOM = b"\xef\xbb\xbf"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer of 300 tokens, and a config."""
    add_tokenizer(tmp_path, 300)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def holds(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def begins(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(BOM + (folder / name).read_bytes())


def ends_early(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def lacks(name: str, *others: Change) -> Change:
    return lambda folder: [(folder / name).unlink(), *(other(folder) for other in others)]


def says(name: str, **facts: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | facts))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (begins("tokenizer.json"), "tokenizer.json begins with a byte order mark.*save it.*--tokenizer"),
        (ends_early("tokenizer.json"), "tokenizer.json is not JSON.*download it again; or .*--tokenizer"),
        (holds("tokenizer.json", b""), "tokenizer.json is not JSON.*download it again; or .*--tokenizer"),
        (holds("tokenizer.json", b"[]"), "tokenizer.json is not a JSON object.*--tokenizer"),
        (holds("tokenizer.json", b"{}"), r"tokenizer.json is not one that tokenizers \d.*Model missing.*--tokenizer"),
        (says("tokenizer.json", version="9.0"), "tokenizer.json is not one .*Unknown tokenizer version '9.0'"),
        (holds("tokenizer.json", b"version https://git-lfs.github.com/spec/v1"), "pointer of Git LFS.*git lfs pull"),
        (lacks("tokenizer.json"), "it has no tokenizer.json, and .*download it; or .*--tokenizer"),
        (
            lacks("tokenizer.json", holds("tokenizer.model", b"version https://git-lfs.github.com/spec/v1")),
            "tokenizer.model is only a pointer of Git LFS",
        ),
        (begins("tokenizer_config.json"), "tokenizer_config.json begins with a byte order mark"),
        (ends_early("tokenizer_config.json"), "tokenizer_config.json is not JSON"),
        (says("tokenizer_config.json", tokenizer_class=5), "tokenizer_config.json or .*AttributeError.*correct it"),
        (says("tokenizer_config.json", eos_token=5), "tokenizer_config.json or .*eos_token has to be.*correct it"),
        (
            says("tokenizer_config.json", tokenizer_class="A", auto_map={"AutoTokenizer": ["a.A", None]}),
            "tokenizer_config.json asks for code of its own",
        ),
        (holds("special_tokens_map.json", b"{"), "special_tokens_map.json is not JSON"),
        (holds("added_tokens.json", b"[]"), "added_tokens.json is not a JSON object"),
        (holds("chat_template.jinja", b"\xff"), "chat_template.jinja is no text in UTF-8"),
        (begins("config.json"), "^config.json begins with a byte order mark"),
        (says("config.json", eos_token_id="2"), "^config.json .*eos_token_id is '2'.*correct it"),
        (says("config.json", eos_token_id=[2, None]), r"^config.json .*eos_token_id is \[2, None\].*correct it"),
        (says("config.json", num_hidden_layers="two"), "^config.json .*num_hidden_layers is 'two'.*correct it"),
        (says("config.json", hidden_size=None), "^config.json .*hidden_size is None.*correct it"),
    ],
)
def test_the_file_at_fault_is_named(folder: Path, change: Change, named: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=named):
        Tokenizer.load(resolve(str(folder)))


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ModelError, match=r"^config.json is no regular file"):
        assert resolve(str(folder)).config


def test_another_tokenizers_files_are_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of `--tokenizer`, beside a model whose own are well."""
    other = tmp_path_factory.mktemp("other")
    add_tokenizer(other, 300)
    ends_early("tokenizer.json")(other)
    with pytest.raises(ModelError, match=rf"{other.name} cannot be read: tokenizer.json is not JSON"):
        Tokenizer.load(resolve(str(folder)), other=str(other))


@pytest.mark.parametrize("value", ["2", [2, None], 2.5, True, [[2]], {"a": 1}])
def test_end_tokens_of_another_kind_are_refused(folder: Path, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    files = resolve(str(folder))
    with pytest.raises(ModelError, match=r"generation_config\.json has eos_token_id .* is no token id; write"):
        end_tokens(files, Tokenizer.load(files))


@pytest.mark.parametrize("own", [True, False])
def test_a_byte_order_mark_does_not_begin_prompts(folder: Path, own: bool) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_bytes(BOM + template.encode())
    given = None if own else f"\ufeff{template}"
    tokenizer = Tokenizer.load(resolve(str(folder)), chat_template=given)
    messages = [{"role": "user", "content": "w5"}]
    assert tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False) == "w5"


def test_a_processors_chat_template_is_the_tokenizers(folder: Path) -> None:
    """Of models of images and text, where theirs alone is there."""
    (folder / "chat_template.jinja").unlink()
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.load(resolve(str(folder)))
    messages = [{"role": "user", "content": "w5"}]
    assert tokenizer.render(messages, add_generation_prompt=True, continue_final_message=False) == "<w5>"
