"""Mends Triton's interpreter where it computes wrongly, for tests alone.

Out of the box it multiplies and adds the bit patterns of bf16, truncates fp32 to bf16 and rounds fp8 wrongly, none of
it with an error (triton 3.6 to 3.9). Here conversions are torch's, and arithmetic on bf16 and fp8 is done in fp32 and
rounded back. `test_interpreter.py` is the canary that watches over it.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
_CARRIER = {1: torch.uint8, 2: torch.int16}  # what numpy can hold of types that it lacks
_LACKED = {tl.bfloat16, tl.float8e4nv, tl.float8e4b8, tl.float8e5}


def _to_torch(data: np.ndarray, dtype: Any) -> torch.Tensor:
    wanted = _TORCH[dtype]
    if dtype in _LACKED:
        carried = np.ascontiguousarray(data).view(np.uint8 if wanted.itemsize == 1 else np.int16)
        return torch.from_numpy(carried.copy()).view(wanted)
    return torch.from_numpy(np.ascontiguousarray(data).copy())


def _to_numpy(data: torch.Tensor, dtype: Any) -> np.ndarray:
    if dtype in _LACKED:
        carried = data.contiguous().view(_CARRIER[data.element_size()]).numpy()
        return carried.view(interpreter._get_np_dtype(dtype))
    return data.numpy()


def _convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    return _to_numpy(_to_torch(data, source).to(_TORCH[target]), target)


def install() -> None:
    """Patches the interpreter's builder; call once before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    plain_cast, plain_binary, plain_unary = builder.cast_impl, builder.binary_op, builder.unary_op

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _TORCH and target in _TORCH:
            return handle(_convert(src.data, source, target), target)
        if target in _LACKED:  # from an integer
            return handle(_to_numpy(torch.from_numpy(src.data.astype(np.float64)).to(_TORCH[target]), target), target)
        if source in _LACKED:  # to an integer
            wide = _convert(src.data, source, tl.float32)
            return handle(wide.astype(interpreter._get_np_dtype(target)), target)
        return plain_cast(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        kind = lhs.dtype.scalar
        if kind not in _LACKED:
            return plain_binary(self, lhs, rhs, op)
        wide = op(_convert(lhs.data, kind, tl.float32), _convert(rhs.data, kind, tl.float32))
        return handle(wide if wide.dtype == bool else _convert(wide, tl.float32, kind), kind)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        kind = arg.dtype.scalar
        if kind not in _LACKED:
            return plain_unary(self, arg, op)
        return handle(_convert(op(_convert(arg.data, kind, tl.float32)), tl.float32, kind), kind)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        if a.dtype.scalar in _TORCH:
            wide = torch.matmul(
                _to_torch(a.data, a.dtype.scalar).float(), _to_torch(b.data, b.dtype.scalar).float()
            ).numpy()
        else:
            wide = np.matmul(a.data, b.data, dtype=d.data.dtype)
        return handle((wide + d.data).astype(d.data.dtype), d.dtype.scalar)

    plain_call = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **more: Any) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN are no news to a GPU
            plain_call(self, *arguments, **more)

    interpreter.GridExecutor.__call__ = call
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: cast_impl(self, src, dst_type)
    builder.binary_op = binary_op
    builder.unary_op = unary_op
    builder.create_dot = create_dot
