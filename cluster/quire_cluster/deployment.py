"""A deployment: a model as clients name it, with the engine that computes it and how many replicas it may have."""

import hashlib
import json
import typing
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from quire_engine.config import EngineConfig, check, kind_of, option
from quire_engine.errors import InvalidParameter

from quire_cluster.config import ParserConfig

_NAME = 200  # characters, at most
MOST_REPLICAS = 4096
_LISTED = 400  # characters of a message; gRPC has room for 8 KiB, and writes some characters as nine
# What the tokens of an answer depend on: an answer begun by one of these is not gone on with by another.
_MODEL_FIELDS = (
    "model",
    "tokenizer",
    "task",
    "revision",
    "load_format",
    "quantization",
    "kv_cache_dtype",
    "dtype",
    "max_model_len",
)


@dataclass(frozen=True, kw_only=True)
class DeploymentConfig(ParserConfig):
    """The deployment, besides its engine."""

    aliases: str | None = option(
        None, "that clients may call it by, too", form="names (separated by commas)", unset="none"
    )
    min_replicas: int = option(
        1,
        "kept however little there is to do; 0: the first request starts one",
        form="replicas",
        least=0,
        most=MOST_REPLICAS,
    )
    max_replicas: int | None = option(
        None,
        "started for load, at most",
        form="replicas",
        unset="min_replicas, and at least 1",
        least=1,
        most=MOST_REPLICAS,
    )
    target_backlog: float = option(
        2.0, "that prompts may wait before another replica is started", form="seconds", above=0, most=86400
    )
    idle_seconds: float = option(
        300.0, "with too little to do, after which one replica is drained", form="seconds", above=0, most=1e7
    )
    drain_timeout: float = option(
        600.0, "that the requests of a replica get to end before they move on", form="seconds", least=0, most=1e7
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise InvalidParameter(
                f"max_replicas is {self.max_replicas}, which is less than min_replicas, {self.min_replicas}",
                "max_replicas",
            )
        for alias in names_in(self.aliases):
            check_name(alias, "aliases")

    @property
    def most_replicas(self) -> int:
        """max_replicas, or what it is where it is not given."""
        return self.max_replicas if self.max_replicas is not None else max(1, self.min_replicas)


def names_in(text: str | None) -> tuple[str, ...]:
    """Of a list with commas; empty entries stay, to be refused."""
    return tuple(name.strip() for name in text.split(",")) if text is not None else ()


def listed(names: Collection[str]) -> str:
    """For a message, which has no room for any number of them."""
    text = ", ".join(names)
    return text if len(text) <= _LISTED else f"{text[:_LISTED]}... ({len(names)} in all)"


def check_name(name: str, parameter: str) -> None:
    """Raises InvalidParameter for what no client could name."""
    if not (name and name.isprintable() and "," not in name and name == name.strip() and len(name) <= _NAME):
        raise InvalidParameter(
            f"{name!r:.80} is no name for a model: give up to {_NAME} visible characters without a comma", parameter
        )


@dataclass(frozen=True)
class Deployment:
    """What an operator wants. `chat_template`: its text, in place of the model's."""

    name: str
    engine: EngineConfig
    config: DeploymentConfig
    chat_template: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "name")

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call it."""
        return (self.name, *names_in(self.config.aliases))

    @cached_property
    def engine_revision(self) -> str:
        """Replicas with the same one are alike; where it changes they are replaced, one after another."""
        return _digest(asdict(self.engine))

    @cached_property
    def model_revision(self) -> str:
        """Replicas with the same one go on with each other's answers. The chat template is none of it: it is the
        gateways', and an answer that has begun has its prompt."""
        engine = asdict(self.engine)
        return _digest({name: engine[name] for name in _MODEL_FIELDS})

    def to_json(self) -> str:
        """With every field, be it a default: a later version's defaults change nothing that runs."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Deployment":
        """The inverse. Fields that this version does not know are left out."""
        values = json.loads(text)
        return Deployment(
            values["name"],
            EngineConfig(**_known(EngineConfig, values["engine"])),
            DeploymentConfig(**_known(DeploymentConfig, values["config"])),
            values["chat_template"],
        )


def make_deployment(name: str, options: Mapping[str, Any], chat_template: str | None) -> Deployment:
    """From options by their names, with - or _. Raises InvalidParameter, whose parameter is deployment.option."""
    kinds = {
        option: kind_of(annotation)
        for config in (EngineConfig, DeploymentConfig)
        for option, annotation in typing.get_type_hints(config).items()
    }
    values: dict[str, Any] = {}
    for given, value in options.items():
        option = given.replace("-", "_")
        if option not in kinds:
            raise InvalidParameter(f"{name} has an unknown option: {given:.80}", f"{name}.{given}")
        if isinstance(value, list) and option == "aliases" and all(isinstance(one, str) for one in value):
            value = ",".join(value)
        if isinstance(value, float) and kinds[option] is int and value.is_integer():  # JSON has no integers
            value = int(value)
        values[option] = value
    if "model" not in values:
        what = "a checkpoint folder, a .gguf file, a model package or a hub id"
        raise InvalidParameter(f"{name} has no model; give {what}", f"{name}.model")
    try:
        return Deployment(
            name,
            EngineConfig(**_known(EngineConfig, values)),
            DeploymentConfig(**_known(DeploymentConfig, values)),
            chat_template,
        )
    except InvalidParameter as error:
        raise InvalidParameter(f"{name}: {error}", f"{name}.{error.parameter}") from error


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}
