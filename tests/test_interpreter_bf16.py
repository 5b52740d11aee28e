"""bfloat16 in the repaired interpreter gives torch's bits."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.usefixtures("bf16_interpreter")


@triton.jit
def _dot(a_ptr, b_ptr, o_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    tl.store(o_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _elementwise(a_ptr, b_ptr, sum_ptr, greater_ptr, negative_ptr, rounded_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(greater_ptr + at, tl.where(a > b, a, b))
    tl.store(negative_ptr + at, -a)
    tl.store(rounded_ptr + at, (a.to(tl.float32) * 1.0009765625).to(tl.bfloat16))


def test_dot_is_torchs() -> None:
    a = torch.randn(16, 16, dtype=torch.bfloat16)
    b = torch.randn(16, 16, dtype=torch.bfloat16)
    o = torch.full((16, 16), torch.nan)
    _dot[(1,)](a, b, o, SIZE=16)
    torch.testing.assert_close(o, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_elementwise_results_are_torchs_to_the_bit() -> None:
    a, b = torch.randn(2, 1024).to(torch.bfloat16)
    out = torch.full((4, 1024), torch.nan, dtype=torch.bfloat16)
    _elementwise[(1,)](a, b, *out, SIZE=1024)
    want = (a + b, torch.maximum(a, b), -a, (a.float() * 1.0009765625).to(torch.bfloat16))
    for name, got, expected in zip(("sum", "greater", "negative", "rounded"), out, want, strict=True):
        assert torch.equal(got, expected), name


@triton.jit
def _both(a_ptr, o_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(a_ptr + at)
    tl.store(o_ptr + at, ((a > 0) & (a < 2)).to(tl.int32))


def test_a_bool_that_is_cast_is_stored_with_all_bytes_of_its_type() -> None:
    a, o = torch.arange(4, dtype=torch.int32), torch.full((4,), 0x3FFFFFFF, dtype=torch.int32)
    _both[(1,)](a, o, SIZE=4)
    assert o.tolist() == [0, 1, 0, 0]
