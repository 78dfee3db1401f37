"""Command-line options generated from the fields of the configuration classes, so that each default stands once."""

import argparse
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import yaml
from quire_engine.config import kind_of
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
        kind = kind_of(hints[f.name])
        names = [*f.metadata["flags"], "--" + f.name.replace("_", "-")]
        help_text = f.metadata["help"].replace("%", "%%")
        if f.default is not None and kind is not bool:
            help_text += f" [{f.default}]"
        settings: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": help_text}
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
        elif choices := f.metadata["choices"]:
            group.add_argument(*names, choices=choices, **settings)
        else:
            group.add_argument(*names, type=kind, metavar=kind.__name__.upper(), **settings)


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
        given = yaml.safe_load(content.decode())
    except Exception as error:  # PyYAML raises whatever its constructors meet: KeyError for `!!bool x`
        raise InvalidParameter(f"--config {path} cannot be read: {error}", "config") from error
    if not isinstance(given, dict):
        raise InvalidParameter(f"--config {path} is not a mapping of options to values", "config")
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = str(name).replace("-", "_")
        if field not in known:
            raise InvalidParameter(f"--config {path} has an unknown option: {field:.80}", "config")
        if field in values:
            raise InvalidParameter(f"--config {path} has {field} twice", "config")
        values[field] = value
    return values
