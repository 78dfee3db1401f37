"""Models that give vectors or scores instead of tokens: what becomes of a text's hidden states. No torch here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.weights.resolve import ModelFiles

PoolingKind = Literal["last", "mean", "cls"]
_CLASSIFIER = "ForSequenceClassification"
_MODES: dict[str, PoolingKind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooling:
    """Which tokens' states stand for a text, and what is done with them."""

    kind: PoolingKind
    normalize: bool = True  # to length 1
    scores: bool = False  # a classifier of one label, then a sigmoid: a text's (or a pair's) relevance
    separator: int | None = None  # the token after which a pair's second text begins, where models tell them apart
    max_tokens: int | None = None  # of a text, where the model was trained with fewer than it has positions for


def pooling_of(files: ModelFiles, task: str) -> Pooling | None:
    """From the checkpoint's own description; None for a model that generates.

    `task` auto: embed where the checkpoint is a sentence-transformers model or has no head, score where it has a
    classifier. Raises InvalidParameter for a task that the checkpoint cannot do, ModelError for an unknown pooling.
    """
    config = files.config
    name = (config.get("architectures") or [""])[0]
    encoder = name.startswith(("Bert", "Roberta", "XLMRoberta"))
    default: PoolingKind = "cls" if encoder else "last"
    if name.endswith(_CLASSIFIER):
        if task not in ("auto", "score"):
            raise InvalidParameter(f"task is {task}; {name} has a classifier and gives scores: leave it out", "task")
        labels = config.get("num_labels") or len(config.get("id2label") or {0: "", 1: ""})
        if labels != 1:
            raise ModelError(
                f"id2label has {labels} labels; served are classifiers with one, whose score is a relevance"
            )
        pairs = encoder and config["type_vocab_size"] > 1
        separator = _separator(files) if pairs else None
        return Pooling(kind=default, normalize=False, scores=True, separator=separator)
    if task == "score":
        raise InvalidParameter(f"task is score, and {name} has no classifier; leave it out", "task")
    described = _described(files.folder) if files.gguf_path is None else None
    headless = name.endswith("Model") and not name.endswith("LMHeadModel")
    if task == "generate":
        if headless:
            raise InvalidParameter(f"task is generate, and {name} has no head for tokens; leave it out", "task")
        return None
    if described is not None:
        return described
    return Pooling(kind=default) if task == "embed" or headless else None


def _separator(files: ModelFiles) -> int:
    """The id of the tokenizer's separator. Raises ModelError where its files do not say."""
    try:
        named = json.loads((files.folder / "tokenizer_config.json").read_text()).get("sep_token")
        name = named["content"] if isinstance(named, dict) else named
        tokenizer = json.loads((files.folder / "tokenizer.json").read_text())
        known = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        return int((known | tokenizer["model"]["vocab"])[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"tokenizer_config.json and tokenizer.json do not tell the separator ({error}), which a pair's second text "
            "follows"
        ) from error


def _described(folder: Path) -> Pooling | None:
    """As sentence-transformers writes it: modules.json, and a folder for each module."""
    path = folder / "modules.json"
    if not path.exists():
        return None
    try:
        modules = [
            (str(module["type"]).rpartition(".")[2], str(module["path"])) for module in json.loads(path.read_text())
        ]
        kinds = [kind for kind, _ in modules]
        if strange := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
            raise ModelError(
                f"modules.json has {', '.join(sorted(strange))}; served are Transformer, Pooling, Normalize"
            )
        pooling: dict[str, Any] = json.loads((folder / dict(modules)["Pooling"] / "config.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"modules.json is not what sentence-transformers writes ({error})") from error
    chosen = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ModelError(f"the pooling is {', '.join(chosen) or 'missing'}; served is one of {', '.join(_MODES)}")
    return Pooling(
        kind=_MODES[chosen[0]],
        normalize="Normalize" in kinds,
        max_tokens=_max_tokens(folder / dict(modules)["Transformer"]),
    )


def _max_tokens(folder: Path) -> int | None:
    """`max_seq_length`: what sentence-transformers cuts texts to. Here, as elsewhere in servers, a longer one is
    refused. Its file is named after the model's architecture."""
    for path in sorted(folder.glob("sentence_*_config.json")):
        try:
            found = json.loads(path.read_text()).get("max_seq_length")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ModelError(f"{path.name} is not what sentence-transformers writes ({error})") from error
        if found is None:
            continue
        if type(found) is not int or found < 1:
            raise ModelError(f"max_seq_length in {path.name} is {found!r}; it must be a number of tokens")
        return found
    return None
