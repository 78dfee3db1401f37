"""What a chat template wants of a message, read off its syntax: content as a text or as parts, null or nothing."""

from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

_KIND_TESTS = {"string", "iterable", "sequence", "mapping"}


@dataclass(frozen=True, kw_only=True)
class ContentFacts:
    """Seen once per template."""

    takes_parts: bool  # it goes through a content's parts
    takes_texts: bool  # it knows what to do with a content that is a text
    tests_null: bool  # it asks whether a content is none
    names_developer: bool  # it asks for that role

    @staticmethod
    def of(template: nodes.Template) -> "ContentFacts":
        """Of a parsed template."""
        names = _content_names(template)

        def is_content(node: nodes.Node) -> bool:
            return _is_content(node, names)

        parts = any(is_content(loop.iter) for loop in template.find_all(nodes.For)) or any(
            _field(item) in ("type", "text") and _is_first(_owner(item), is_content)
            for item in template.find_all((nodes.Getattr, nodes.Getitem))
        )
        tests = {test.name for test in template.find_all(nodes.Test) if is_content(test.node)}
        null = "none" in tests or any(
            is_content(compare.expr) and any(_is_null(operand.expr) for operand in compare.ops)
            for compare in template.find_all(nodes.Compare)
        )
        return ContentFacts(
            takes_parts=parts,
            takes_texts=not parts or bool(tests & _KIND_TESTS),
            tests_null=null,
            names_developer=any(const.value == "developer" for const in template.find_all(nodes.Const)),
        )

    def content(self, content: Any) -> Any:
        """Texts for templates that want texts, parts for those that want parts."""
        if content is None:
            return None if self.tests_null else "" if self.takes_texts else []
        if isinstance(content, str):
            return content if self.takes_texts else [{"type": "text", "text": content}]
        return content if self.takes_parts else "\n".join(str(part.get("text", "")) for part in content)


def names_of(template: nodes.Template) -> frozenset[str]:
    """Names that a parsed template could read fields by: its attributes and its texts."""
    attributes = {read.attr for read in template.find_all(nodes.Getattr)}
    return frozenset(
        attributes | {text.value for text in template.find_all(nodes.Const) if isinstance(text.value, str)}
    )


def _content_names(template: nodes.Template) -> set[str]:
    """Variables and macros' parameters that hold a message's content."""
    names: set[str] = set()
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    while True:
        found = set(names)
        for assign in template.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                found.add(assign.target.name)
        for call in template.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                pairs = zip(macro.args, call.args, strict=False)
                found |= {parameter.name for parameter, given in pairs if _is_content(given, names)}
        if found == names:
            return names
        names = found


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.Or):
        return _is_content(node.left, names)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return bool(node.args) and _constant(node.args[0]) == "content"
    return _field(node) == "content"


def _field(node: nodes.Node | None) -> Any:
    """`x.name` and `x["name"]`: the name."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    return _constant(node.arg) if isinstance(node, nodes.Getitem) else None


def _owner(node: nodes.Node) -> nodes.Node | None:
    """`x.name` and `x["name"]`: x."""
    return node.node if isinstance(node, (nodes.Getattr, nodes.Getitem)) else None


def _is_first(node: nodes.Node | None, is_content: Any) -> bool:
    """`content[0]`"""
    return isinstance(node, nodes.Getitem) and isinstance(_constant(node.arg), int) and is_content(node.node)


def _constant(node: nodes.Node) -> Any:
    return node.value if isinstance(node, nodes.Const) else None


def _is_null(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value is None
