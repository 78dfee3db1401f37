"""Compiles every Triton kernel for targets that are not here. Run as a script: the interpreter must not be on.

Prints one JSON object per kernel and target.
"""

import json
import sys
from typing import Any

import triton
from quire_kernels.paged_attention.triton import _paged_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
POINTERS = {"q_ptr": "q", "out_ptr": "q", "key_ptr": "q", "value_ptr": "q"}
INDEXES = ("tables_ptr", "query_starts_ptr", "context_lens_ptr")
STRIDES = ("q_stride", "out_stride", "table_stride")


def source(dtype: str, window: int, group: int, dim: int, rows: int) -> ASTSource:
    """The kernel at a real configuration."""
    signature = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(INDEXES, "*i32")
    signature |= dict.fromkeys(STRIDES, "i64") | {"scale_log2": "fp32"}
    constants = {
        "WINDOW": window,
        "KV_HEADS": 8,
        "GROUP": group,
        "D": dim,
        "D_PADDED": triton.next_power_of_2(dim),
        "BLOCK_SIZE": 16,
        "TILE_TOKENS": rows // group,
        "M": rows,
        "N": 16,
    }
    names = _paged_attention.arg_names
    aligned = [*POINTERS, *INDEXES, "q_stride", "out_stride"]
    attributes: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    ordered = {name: signature.get(name, "constexpr") for name in names}
    return ASTSource(fn=_paged_attention, signature=ordered, constexprs=constants, attrs=attributes)


def main() -> None:
    """All configurations for all targets."""
    for target, gpu in TARGETS.items():
        for dtype, window, group, dim, rows in (
            ("bf16", 0, 4, 128, 16),
            ("bf16", 0, 4, 128, 64),
            ("fp16", 4096, 8, 64, 16),
            ("bf16", 0, 1, 96, 64),
        ):
            compiled = triton.compile(source(dtype, window, group, dim, rows), target=gpu, options={"num_warps": 4})
            binary = compiled.asm.get("cubin") or compiled.asm.get("hsaco")
            found = {
                "target": target,
                "configuration": f"{dtype} window {window} group {group} dim {dim} rows {rows}",
                "shared": compiled.metadata.shared,
                "within": compiled.metadata.shared <= SHARED_LIMIT[target],
                "bytes": len(binary),
            }
            json.dump(found, sys.stdout)
            print(flush=True)


if __name__ == "__main__":
    main()
