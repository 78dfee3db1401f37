"""docs/families.md says what the tests have shown, and nothing else. It is written by `make families-table`."""

from pathlib import Path

import pytest
from conftest import Table
from families import FALLBACK, FAMILIES
from quire_engine.models.families import FAMILIES as SERVED

pytestmark = pytest.mark.xdist_group("families")  # their table is one process's

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
INTRODUCTION = """# Families

What the tests show of each family, on tiny random checkpoints from its own config class in transformers; written by
`make families-table`, and held against a new run by every `make test`.

- **verified**: fp32 logits of every prompt position within 1e-4 of transformers', on two sets of kernels; greedy tokens
  equal: alone, batched, in chunks, from the prefix cache, after preemption.
- **TP 2**: the same tokens on two tensor-parallel ranks.
- **quantization**: weights quantized to fp8 at load (`--quantization fp8`), or the family's own scheme.
- **fp8 cache**: `--kv-cache-dtype fp8`.
- **computed by**: Quire's decoder, or transformers' own code with Quire's attention over the paged cache: whatever
  transformers has for causal language models goes there if the decoder does not know it; slower, and unquantized.
- **LoRA**: adapters are not served yet.

| `architectures` | tiny model | computed by | verified | TP 2 | quantization | fp8 cache | LoRA |
|---|---|---|---|---|---|---|---|
"""


def test_the_table_is_what_was_seen(table: Table, request: pytest.FixtureRequest) -> None:
    lines = table.lines()
    selected = {item.name for item in request.session.items}
    tests = ("test_logits", "test_greedy_tokens", "test_two_ranks")
    run = {family for family in FAMILIES | FALLBACK if {f"{test}[{family}]" for test in tests} <= selected}
    assert set(lines) == run, "tests of families failed, or ran in other processes"
    if request.config.getoption("--write-tables"):
        assert set(lines) == set(FAMILIES | FALLBACK), "the table is written after all of its tests"
        DOCUMENT.write_text(INTRODUCTION + "".join(f"{line}\n" for line in lines.values()))
    written = DOCUMENT.read_text()
    assert written.startswith(INTRODUCTION)
    rows = written.removeprefix(INTRODUCTION).splitlines()
    assert [row.split(" | ")[1] for row in rows] == sorted(FAMILIES | FALLBACK)
    assert set(lines.values()) <= set(rows), "run make families-table"


def test_every_served_architecture_has_a_row() -> None:
    """But those that transformers has no class for, which test_layouts.py and test_draft_heads.py have."""
    rows = DOCUMENT.read_text()
    assert [name for name in SERVED if f"| `{name}` |" not in rows] == ["InternLM2ForCausalLM", "MiMoForCausalLM"]
