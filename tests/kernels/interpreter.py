"""Triton's interpreter, mended: importing this module makes it convert and multiply narrow floats as a GPU does.

Seen in triton 3.6 and 3.9: from float32, bfloat16 is cut off rather than rounded; e4m3 loses the carry of a rounding
(126.8 becomes 64); a product of bfloat16 tiles multiplies their bit patterns. Arithmetic on bfloat16 tiles does the
latter, too, and raises here: kernels compute in float32.

A tensor core sums up every element of a product in one order. BLAS, which multiplies here, has another order for the
rows at a tile's edge: tests that compare bits set `sums_in_order`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
sums_in_order = False
_BITS = {16: torch.int16, 8: torch.uint8}
_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
_binary, _unary = interpreter.InterpreterBuilder.binary_op, interpreter.InterpreterBuilder.unary_op


def _convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source != tl.float32 or target not in _NARROW:
        return _convert(data, source, target, rounding)
    wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
    if target == tl.float8e4nv:  # as cvt.satfinite does
        wide = wide.clamp(-448, 448)
    width = target.primitive_bitwidth
    narrow = wide.to(_NARROW[target]).view(_BITS[width]).numpy()
    return narrow.view(f"uint{width}")


def _create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
    if not sums_in_order:
        return _dot(self, a, b, d, *options)
    total = np.zeros_like(d.data)
    for left, right in zip(a.data.astype(total.dtype).T, b.data.astype(total.dtype), strict=True):
        total += np.multiply.outer(left, right)
    return interpreter.TensorHandle(total + d.data, d.dtype.scalar)


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise TypeError(f"{op.__name__} of bfloat16 tiles is wrong in the interpreter; compute in float32")
    return _binary(self, lhs, rhs, op)


def _unary_op(self: Any, arg: Any, op: Any) -> Any:
    if arg.dtype.scalar == tl.bfloat16:
        raise TypeError(f"{op.__name__} of a bfloat16 tile is wrong in the interpreter; compute in float32")
    return _unary(self, arg, op)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.binary_op = _binary_op
interpreter.InterpreterBuilder.unary_op = _unary_op
