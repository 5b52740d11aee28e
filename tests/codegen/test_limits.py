"""Numbers that do not fit 32 bits: what modules refuse, and what kernels count in 64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen.codegen.render import kernel_text
from splagen.pipeline import generate, generate_packed, generate_prefill, kernels
from splagen.spec import Residual, Select, SPLASpec
from splagen.sse_spec import Router, SSESpec

SPEC = SPLASpec(head_dim=16, group_size=2, select=Select(block_size=16, budget=4), linear=None)
ENDS = torch.tensor([0, 2], dtype=torch.int32)


def rows(length: int) -> list[Tensor]:
    """q, k and v of one sample; every row is the same one in memory."""
    return [torch.zeros(1, 1, 1, 16).expand(1, length, heads, 16) for heads in (2, 1, 1)]


def far_apart() -> list[Tensor]:
    """Packed rows; two positions of k in memory that nobody touches."""
    q, k, v = (x[0] for x in rows(2))
    return [q, torch.empty_strided(k.shape, (2**24, 16, 1)), v]


def test_chosen_blocks_are_numbered_below_2_to_the_31(tmp_path: Path) -> None:
    """Fewer rows than that, and more blocks: 2²⁹ tokens choose 4 each."""
    op = generate(SPEC, tmp_path).op
    with pytest.raises(ValueError, match=r"536870912 lists of 4 blocks.*split the sequence"):
        op(*rows(2**29))


def test_positions_of_packed_rows_that_lie_far_apart_are_refused(tmp_path: Path) -> None:
    packed, prefill = generate_packed(SPEC, tmp_path).op, generate_prefill(SPEC, tmp_path).op
    message = r"positions of k lie 16777216 elements apart.*\.contiguous\(\)"
    with pytest.raises(ValueError, match=message):
        packed(*far_apart(), ENDS, 2)
    with pytest.raises(ValueError, match=message):
        prefill(*far_apart(), ENDS, ENDS, 2, 2)


@pytest.mark.parametrize("template", ["state_scan", "state_total"])
def test_states_lie_at_64_bits(template: str) -> None:
    """A head of 65,536 chunks with states of 128 x 256 numbers has 2³¹ of them."""
    spec = SPLASpec(head_dim=16, group_size=1, causal=False, select=Select(budget=4, sinks=0, local=0))
    spec = spec if template == "state_total" else SPLASpec(head_dim=16, group_size=1, linear=Residual())
    texts = [kernel_text(k) for k in kernels(spec).all_kernels if k.template == template]
    assert texts
    assert all("chunk[:, None].to(tl.int64) * SIZE" in text for text in texts)


def test_slots_lie_at_64_bits() -> None:
    """Routers x tokens x choices."""
    part = kernels(SSESpec(head_dim=16, router=Router(partitions=3, writers=2)))
    texts = [text for k in part.all_kernels if "places_ptr + " in (text := kernel_text(k))]
    assert texts
    assert not any("places_ptr + (router * T + token) *" in text for text in texts)
