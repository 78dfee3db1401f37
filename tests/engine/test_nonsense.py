"""Whatever is given as a schema, a structure or tools can be followed, or is refused by name."""

from contextlib import suppress
from typing import Any

import pytest
from call_formats import NAMES
from hypothesis import given, settings
from hypothesis import strategies as st
from nonsense import CHOICES, JSON, PARAMETERS, STRUCTURES, TOOLS
from quire_engine.errors import InvalidParameter
from quire_engine.guidance.schemas import closed
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.text.formats.chat import ToolUse
from test_answers import chat_format

REFUSED = suppress(InvalidParameter)


@settings(max_examples=300)
@given(schema=PARAMETERS | JSON, shut=st.booleans(), lenient=st.booleans())
def test_any_schema(schema: Any, shut: bool, lenient: bool) -> None:
    with REFUSED:
        StructuredOutputs(json=closed(schema, "x") if shut else schema, lenient=lenient).check()


@settings(max_examples=300)
@given(structure=STRUCTURES)
def test_any_structure(structure: Any) -> None:
    with REFUSED:
        StructuredOutputs.of(structure).check()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(tools=TOOLS, choice=CHOICES, parallel=st.booleans())
def test_any_tools(name: str, tools: Any, choice: Any, parallel: bool) -> None:
    with REFUSED:
        use = ToolUse.of(tools, choice, parallel)
        chat_format(name, True).answer([5], use, None)
