"""The checks of the benchmarks' cases see what they should."""

import sys
from pathlib import Path

import pytest
import torch
from quire_kernels import hardware
from quire_kernels.hardware import CHIPS
from quire_kernels.paged_attention import triton as attention
from quire_kernels.paged_attention.pieces import Pieces, merge
from tolerance import assert_close

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels"))
import cases_attention

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_lost_piece_of_a_long_context_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut as for a chip of 132 multiprocessors; then the parts are merged without one of them."""
    (case,) = (case for case in cases_attention.CASES if case.name == "decode Llama-3-8B 1 x 32k")
    torch.manual_seed(0)
    built = case.build(CPU, torch.float8_e4m3fn)
    kept: list[tuple[Pieces, torch.Tensor, torch.Tensor]] = []

    def merge_and_keep(pieces: Pieces, query_starts: torch.Tensor, out: torch.Tensor, lse: None) -> None:
        merge(pieces, query_starts, out, lse)
        kept.append((pieces, query_starts, out))

    monkeypatch.setitem(hardware.CHIPS, "interpreter", CHIPS["sm_90"])
    monkeypatch.setattr(attention, "merge", merge_and_keep)
    expected = built.expected()
    assert_close(built.run(), expected, built.terms)
    ((pieces, query_starts, out),) = kept
    assert pieces.listed[0, 1] > 50
    for lost in (20, int(pieces.listed[0, 1]) - 1):
        lse = pieces.lse.clone()
        lse[lost] = float("-inf")
        merge(Pieces(pieces.listed, pieces.parts, lse), query_starts, out, None)
        with pytest.raises(AssertionError, match="not close"):
            assert_close(out, expected, built.terms)
