"""Command-line options generated from the fields of the configuration classes, so that each default stands once."""

import argparse
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from quire_engine.errors import InvalidParameter

Config = TypeVar("Config")


def _plain_type(annotation: Any) -> type:
    """int of `int | None`."""
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return typing.cast(type, annotation)


def add_options(parser: argparse.ArgumentParser, config: type, *, leave_out: Iterable[str] = ()) -> None:
    """One option per field. Booleans get a --no- form."""
    hints = typing.get_type_hints(config)
    group = parser.add_argument_group((config.__doc__ or config.__name__).split(":")[0].split("\n")[0].rstrip("."))
    for f in fields(config):
        if f.name in leave_out or f.default is MISSING:
            continue
        kind = _plain_type(hints[f.name])
        names = [*f.metadata.get("flags", ()), "--" + f.name.replace("_", "-")]
        help_text = f.metadata.get("help", "").replace("%", "%%")
        if f.default is not None and kind is not bool:
            help_text += f" [{f.default}]"
        settings: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": help_text}
        if kind is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
        else:
            group.add_argument(
                *names,
                type=kind,
                choices=f.metadata.get("choices"),
                metavar=kind.__name__.upper(),
                **settings,
            )


def build(config: type[Config], values: dict[str, Any]) -> Config:
    """The configuration from what was given. Raises InvalidParameter."""
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    return config(**{name: value for name, value in values.items() if name in known})


def read_config_file(path: str, known: set[str]) -> dict[str, Any]:
    """A YAML mapping of option names (with - or _) to values. Raises InvalidParameter for anything else."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidParameter(f"--config {path} cannot be read: {error}", "config") from error
    if not isinstance(content, dict):
        raise InvalidParameter(f"--config {path} is not a mapping of options to values", "config")
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := sorted(values.keys() - known):
        raise InvalidParameter(f"--config {path} has unknown options: {', '.join(unknown)}", "config")
    return values
