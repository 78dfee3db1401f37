"""docs/families.md says what the tests have shown, and nothing else. It is written by `make families-table`."""

from pathlib import Path

import pytest
import transformers
from conftest import Table
from families import FALLBACK, FAMILIES
from quire_engine.models.families import FAMILIES as SERVED
from quire_engine.models.vit_facts import NATIVE
from quire_engine.weights.text_parts import TEXT_PARTS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vlms import VLMS

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


IMAGES = """
## Images beside text

Of each of these the tests have a tiny checkpoint with its own processor, and pictures of several sizes, alone and
several, first, amid and last in a text: fp32 logits within 1e-4 of transformers' whole model given the same messages
through its own processor, and 24 greedy tokens equal: alone, beside texts, in chunks that end amid an image, from the
prefix cache, after preemption, resumed by another engine (`tests/engine/test_images.py`), on two ranks and on two
stages (`test_ranks.py`), and after a worker was killed amid streams (`tests/end_to_end/test_images.py`).

- **text**: the family that computes it, in the table above.
- **positions**: a token of an image has a time, a row and a column (M-RoPE), or stands in a row with the text.
- **vision**: what computes embeddings from pixels: Quire's vision transformer, of which a family is a page of facts; or
  transformers' own code, which also computes towers that depart from their family's published ones, and says so.

| `architectures` | tiny model | text | positions | vision |
|---|---|---|---|---|
"""


def image_rows() -> list[str]:
    rows = []
    for name, vlm in VLMS.items():
        kind = getattr(transformers, vlm.config).model_type
        architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
        part = TEXT_PARTS[architecture]
        text = f"`{part.family}`" if part.family else "what `text_config` names"
        positions = "time, row and column" if part.sections else "in a row"
        if part.bidirectional_images:
            positions += "; tokens of an image see all of it"
        vision = "Quire's tower" if kind in NATIVE else "transformers' code"
        rows.append(f"| `{architecture}` | {name} | {text} | {positions} | {vision} |")
    return sorted(rows)


def test_the_table_is_what_was_seen(table: Table, request: pytest.FixtureRequest) -> None:
    lines = table.lines()
    selected = {item.name for item in request.session.items}
    tests = ("test_logits", "test_greedy_tokens", "test_two_ranks")
    run = {family for family in FAMILIES | FALLBACK if {f"{test}[{family}]" for test in tests} <= selected}
    assert set(lines) == run, "tests of families failed, or ran in other processes"
    if request.config.getoption("--write-tables"):
        assert set(lines) == set(FAMILIES | FALLBACK), "the table is written after all of its tests"
        images = IMAGES + "".join(f"{row}\n" for row in image_rows())
        DOCUMENT.write_text(INTRODUCTION + "".join(f"{line}\n" for line in lines.values()) + images)
    written, _, _ = DOCUMENT.read_text().partition(IMAGES)
    assert written.startswith(INTRODUCTION)
    rows = written.removeprefix(INTRODUCTION).splitlines()
    assert [row.split(" | ")[1] for row in rows] == sorted(FAMILIES | FALLBACK)
    assert set(lines.values()) <= set(rows), "run make families-table"


def test_every_served_architecture_has_a_row() -> None:
    """But those that transformers has no class for, which test_layouts.py and test_draft_heads.py have."""
    rows = DOCUMENT.read_text()
    assert [name for name in SERVED if f"| `{name}` |" not in rows] == ["InternLM2ForCausalLM", "MiMoForCausalLM"]


def test_every_architecture_that_takes_images_has_a_row() -> None:
    _, _, written = DOCUMENT.read_text().partition(IMAGES)
    assert written.splitlines() == image_rows(), "run make families-table"
    assert [name for name in TEXT_PARTS if f"| `{name}` |" not in written] == []
