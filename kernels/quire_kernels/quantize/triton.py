"""The fp8 or int8 ending of other kernels."""

import triton
import triton.language as tl

LEAST = tl.constexpr(1e-12)  # of a maximum: rows of zeros have a scale too


@triton.jit
def store_quantized(
    x,
    out_ptr,
    scale_ptr,
    row,
    columns,
    row_in,
    column_in,
    width,
    SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x [ROWS, COLUMNS] fp32, zero where not `row_in` & `column_in`, is stored. With SCALES 2 a row is whole in x."""
    if SCALES == 1:
        scaled = x * (1.0 / tl.load(scale_ptr))
    elif SCALES == 2:
        scale = tl.maximum(tl.max(tl.abs(x), 1), LEAST) * (1.0 / LIMIT)  # [ROWS]
        tl.store(scale_ptr + row, scale, mask=row_in)
        scaled = x / scale[:, None]
    else:
        blocks = tl.reshape(x, [ROWS, COLUMNS // 128, 128])
        scale = tl.maximum(tl.max(tl.abs(blocks), 2), LEAST) * (1.0 / LIMIT)  # [ROWS, COLUMNS / 128]
        first = tl.min(columns, 0) // 128 + tl.arange(0, COLUMNS // 128)
        at = row[:, None] * (width // 128) + first[None, :]
        tl.store(scale_ptr + at, scale, mask=row_in[:, None] & (first < width // 128)[None, :])
        scaled = tl.reshape(blocks / scale[:, :, None], [ROWS, COLUMNS])
    if out_ptr.dtype.element_ty == tl.int8:
        scaled = tl.floor(scaled + 0.5)
    scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    at = row.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out_ptr + at, scaled.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])
