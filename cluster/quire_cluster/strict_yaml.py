"""YAML without its habit of taking the last of several values."""

from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """Knows no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises ValueError for a key that is there twice."""
        seen = set()
        for key, _ in node.value:
            name = self.spelt(str(key.value))
            if name in seen:
                raise ValueError(f"line {key.start_mark.line + 1} has {name:.80} for the second time; leave one out")
            seen.add(name)
        return super().construct_mapping(node, deep)

    @staticmethod
    def spelt(key: str) -> str:
        """Keys are the same that are spelt the same."""
        return key


class OptionLoader(StrictLoader):
    """Of options, which are written with - or _."""

    @staticmethod
    def spelt(key: str) -> str:
        """With _."""
        return key.replace("-", "_")
