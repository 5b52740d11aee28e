"""A repair of bfloat16 in Triton's interpreter, for tests.

The interpreter keeps a bfloat16 tensor as its raw 16 bits in a uint16 array.  Several operations then compute
on those integers (dot, +, comparisons, negation, sum, cumsum), and float32 to bfloat16 does not round to
nearest even.  `patch()` decodes to float32, computes, and rounds to nearest even, as a GPU does.  Seen
on triton 3.6.0, 3.7.1 and 3.9.0; float32 and float16 are right there and stay untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
NumpyOp = Callable[..., npt.NDArray[Any]]

_patched = False


def decode(handle: Any) -> npt.NDArray[np.float32]:
    """Return the float32 values of a bfloat16 handle, exactly."""
    bits: npt.NDArray[np.uint32] = handle.data.astype(np.uint32)
    return (bits << 16).view(np.float32)


def encode(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bfloat16 bits of float32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
    rounded = ((bits + to_even) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def patch() -> None:
    """Repair bfloat16 in this process's interpreter; a second call does nothing."""
    global _patched
    if _patched:
        return
    _patched = True
    _patch_builder(interpreter.InterpreterBuilder)
    _patch_sums(interpreter.ReduceOps, interpreter.ScanOps)


def _is_bf16(typed: Any) -> bool:
    return bool(typed.dtype.scalar == tl.bfloat16)


def _rounded(values: npt.NDArray[Any]) -> Any:
    return Handle(encode(values), tl.bfloat16)


def _widened(handle: Any) -> Any:
    return Handle(decode(handle), tl.float32) if _is_bf16(handle) else handle


def _patch_builder(builder: Any) -> None:
    plain_dot = builder.create_dot
    plain_cast = builder.cast_impl
    plain_fp_to_fp = builder.create_fp_to_fp
    plain_binary = builder.binary_op
    plain_unary = builder.unary_op

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, _widened(a), _widened(b), d, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        widened = _widened(source)
        if target.scalar == tl.bfloat16:
            return _rounded(widened.data.astype(np.float32))
        # a handle may be labelled int32 and hold bools: only the plain cast gives it the bytes of its type
        return widened if _is_bf16(source) and target.scalar == tl.float32 else plain_cast(self, widened, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return plain_fp_to_fp(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: NumpyOp) -> Any:
        if not (_is_bf16(left) and _is_bf16(right)):
            return plain_binary(self, left, right, op)
        result = op(decode(left), decode(right))
        return Handle(result, tl.bfloat16) if result.dtype == np.bool_ else _rounded(result)

    def unary_op(self: Any, argument: Any, op: NumpyOp) -> Any:
        return _rounded(op(decode(argument))) if _is_bf16(argument) else plain_unary(self, argument, op)

    def get_bf16(self: Any, value: float) -> Any:
        return _rounded(np.array([value], dtype=np.float32))

    def create_fneg(self: Any, argument: Any) -> Any:
        return unary_op(self, argument, np.negative)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.binary_op = binary_op
    builder.unary_op = unary_op
    builder.get_bf16 = get_bf16
    builder.create_fneg = create_fneg


def _patch_sums(reduce: Any, scan: Any) -> None:
    plain_sum = reduce.sum
    plain_cumsum = scan.cumsum

    def wrap(values: npt.NDArray[Any]) -> Any:
        values = np.asarray(values, dtype=np.float32)
        if values.ndim == 0:
            return tl.core.tensor(_rounded(values.reshape(1)), tl.bfloat16)
        return tl.core.tensor(_rounded(values), tl.block_type(tl.bfloat16, list(values.shape)))

    def sum_(self: Any, argument: Any) -> Any:
        if not _is_bf16(argument):
            return plain_sum(self, argument)
        return wrap(np.sum(decode(argument.handle), axis=self.axis, keepdims=self.keep_dims))

    def cumsum(self: Any, argument: Any) -> Any:
        if not _is_bf16(argument):
            return plain_cumsum(self, argument)
        return [wrap(np.cumsum(decode(argument.handle), axis=self.axis))]

    reduce.sum = sum_
    scan.cumsum = cumsum
