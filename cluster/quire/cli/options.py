"""Command-line options generated from the fields of the configuration classes, so that each default stands once."""

import argparse
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from types import NoneType
from typing import Any, TypeVar

import yaml
from quire_cluster.strict_yaml import OptionLoader
from quire_engine.config import bounds, kind_of
from quire_engine.errors import InvalidParameter

Config = TypeVar("Config")
_MOST_BYTES = 1 << 20  # of a --config file


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One option per field that has a default. Booleans get a --no- form."""
    hints = typing.get_type_hints(config)
    group = parser.add_argument_group((config.__doc__ or config.__name__).split(":")[0].split("\n")[0].rstrip("."))
    for f in fields(config):
        if f.default is MISSING:
            continue
        kind, default = kind_of(hints[f.name]), shown_default(f)
        names = [*f.metadata["flags"], "--" + f.name.replace("_", "-")]
        help_text = f.metadata["help"]
        if kind in (int, float):
            help_text += f", {bounds(f.metadata)}"
        help_text = f"{help_text} [{default}]".replace("%", "%%")
        settings: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": help_text}
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
        else:
            choices = f.metadata["choices"]
            metavar = f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()
            optional = NoneType in typing.get_args(hints[f.name])
            group.add_argument(*names, type=partial(_value, kind, optional), metavar=metavar, **settings)


def shown_default(f: Field[Any]) -> str:
    """What a field is where it is not given, in words."""
    if isinstance(f.default, bool):
        return str(f.default).lower()
    if isinstance(f.default, float):
        return f"{f.default:g}"
    return str(f.metadata["unset"] if f.default is None else f.default)


def _value(kind: type, optional: bool, text: str) -> Any:
    """A text that is no number stays one, so that it is refused as it would be from a file; but for `none`, which is
    the number that is not given."""
    if optional and kind in (int, float) and text == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        return text


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration from what was given. Raises InvalidParameter."""
    return config(**{name: values[name] for name in names_of([config]) & values.keys()})


def names_of(configs: Iterable[type]) -> set[str]:
    """Every field of these classes."""
    return {f.name for config in configs for f in fields(config)}


def read_config_file(path: str, known: set[str]) -> dict[str, Any]:
    """A YAML mapping of option names (with - or _) to values. Raises InvalidParameter for anything else."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        given = yaml.load(content.decode(), OptionLoader)
    except Exception as error:  # PyYAML raises whatever its constructors meet: KeyError for `!!bool x`
        raise InvalidParameter(f"--config {path} cannot be read: {error}", "config") from error
    if not isinstance(given, dict):
        raise InvalidParameter(f"--config {path} is not a mapping of options to values", "config")
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = str(name).replace("-", "_")
        if field not in known:
            raise InvalidParameter(f"--config {path} has an unknown option: {field:.80}", "config")
        values[field] = value
    return values
