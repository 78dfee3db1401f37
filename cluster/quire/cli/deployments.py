"""A file of deployments for `quire deploy`: YAML, names with their options. What is wrong is told with its line."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from quire_cluster.deployment import Deployment, make_deployment
from quire_cluster.strict_yaml import OptionLoader
from quire_engine.errors import InvalidParameter

_MOST_BYTES = 1 << 20
TEMPLATE = "chat_template"


@dataclass(frozen=True)
class DeploymentFile:
    """What it says, and where."""

    path: str
    deployments: tuple[Deployment, ...]
    options: dict[str, dict[str, Any]]  # by deployment, without the chat template
    lines: dict[str, int]  # of each deployment, and of each deployment.option

    def located(self, error: InvalidParameter) -> InvalidParameter:
        """The same with the line that it is about, where that is known."""
        return InvalidParameter(f"{self._where(error.parameter or '')}{error}", error.parameter)

    def _where(self, parameter: str) -> str:
        name, _, option = parameter.rpartition(".")
        line = self.lines.get(f"{name}.{option.replace('-', '_')}") or self.lines.get(name) or self.lines.get(parameter)
        return f"{self.path}, line {line}: " if line is not None else f"{self.path}: "


def read_deployments(path: str) -> DeploymentFile:
    """Raises InvalidParameter for what is no such file, or says what cannot be."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        text = content.decode()
        node = yaml.compose(text, OptionLoader)
        given = yaml.load(text, OptionLoader)
    except Exception as error:  # PyYAML raises whatever its constructors meet
        raise InvalidParameter(f"{path} cannot be read: {error}", "file") from error
    if not isinstance(given, dict) or not given:
        raise InvalidParameter(f"{path} is no mapping of names to options; see deploy/models.yaml", "file")
    found = DeploymentFile(path, (), {}, _lines(node))
    deployments = []
    for name, options in given.items():
        if not isinstance(name, str):
            why = f"YAML reads the name {name} as {type(name).__name__}, no text; put it into quotes"
            raise InvalidParameter(f"{path}: {why}", "file")
        if not isinstance(options, dict):
            why = f"{name} is no mapping of options to values; give at least its model"
            raise found.located(InvalidParameter(why, name))
        values = {str(option).replace("-", "_"): value for option, value in options.items()}
        try:
            template = _template(name, values.pop(TEMPLATE, None), Path(path).parent)
            values = _with_absolute_model(values, Path(path).parent)
            deployments.append(make_deployment(name, values, template))
        except InvalidParameter as error:
            raise found.located(error) from error
        found.options[name] = values
    return DeploymentFile(path, tuple(deployments), found.options, found.lines)


def _lines(node: Any) -> dict[str, int]:
    lines: dict[str, int] = {}
    for key, value in node.value:
        lines[key.value] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for option, _ in value.value:
                lines[f"{key.value}.{str(option.value).replace('-', '_')}"] = option.start_mark.line + 1
    return lines


def _template(name: str, given: Any, folder: Path) -> str | None:
    """The text of a file, which lies beside the deployments unless its path is absolute."""
    if given is None:
        return None
    try:
        return (folder / os.path.expanduser(str(given))).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"{name}: chat_template cannot be read: {error}", f"{name}.{TEMPLATE}") from error


def _with_absolute_model(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A model that lies beside the file is one on every node, by its whole path."""
    model = values.get("model")
    if isinstance(model, str) and (folder / model).exists():
        return values | {"model": str((folder / model).resolve())}
    return values
