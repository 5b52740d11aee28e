"""Plans of rows: a counting sort of slots, segments cut into groups, and Schedules that must agree."""

from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splagen.pipeline import generate
from splagen.sse_spec import Router, SSESpec
from tests.ir.sse_rows import packed

SPEC = SSESpec(head_dim=16, router=Router(5, 2, scope="head"))
LENGTHS = st.lists(st.integers(0, 30) | st.sampled_from([511, 512, 513, 1100]), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return generate(SPEC, tmp_path_factory.mktemp("plan")).module


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    spec = SSESpec(head_dim=16, router=Router(3, 1, 2, scope="head"), form="masked")
    return generate(spec, tmp_path_factory.mktemp("masked")).module


def sizes(module: ModuleType, lengths: list[int], routers: int, heads: int = 1):  # type: ignore[no-untyped-def]
    cpu = torch.device("cpu")
    return module.Sizes(sum(lengths), routers, heads, len(lengths), routers, torch.float32, cpu)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check_groups(plan, lengths: list[list[int]]) -> None:  # type: ignore[no-untyped-def]
    """Each segment's rows are in its place, and its groups end before those of the next, the last ones before `groups`.

    Programs rely on that when they look for the last segment that does not begin behind their group.
    """
    for router, rows in enumerate(lengths):
        offsets = plan.offsets.view(-1, plan.segments + 1)[router].tolist()
        assert len(rows) == plan.segments
        assert [b - a for a, b in pairwise(offsets)] == rows
        firsts = [begin // plan.length + segment for segment, begin in enumerate(offsets)]
        assert firsts[0] == 0
        assert plan.groups == firsts[-1]
        assert all(b - a >= -(-n // plan.length) for (a, b), n in zip(pairwise(firsts), rows, strict=True))


@given(LENGTHS, st.booleans())
def test_a_sample_is_a_segment_of_tokens(module: ModuleType, lengths: list[int], whole: bool) -> None:
    offsets = ends(lengths)
    plan = module.cut(sizes(module, lengths, 1), offsets, sum(lengths), whole)
    assert plan.offsets is offsets  # nothing is made on the device
    check_groups(plan, [lengths])
    if whole:
        assert plan.length >= max(lengths, default=0)


@given(LENGTHS, st.integers(1, 2), st.booleans(), st.integers(0, 99))
def test_slots_are_in_the_order_of_partition_sample_and_position(
    module: ModuleType, lengths: list[int], routers: int, whole: bool, seed: int
) -> None:
    """The counting sort is the sort by (partition, sample, position); a token finds its slots, a slot its gate."""
    tokens, count, picks = sum(lengths), 5, 2
    generator = torch.Generator().manual_seed(seed)
    eta = torch.rand(routers, tokens, count, generator=generator)
    chosen = eta.topk(picks).indices.sort().values.to(torch.int32)
    writes = torch.zeros(routers, tokens, count, dtype=torch.int32).scatter_(2, chosen.long(), 1).mT.contiguous()
    n = sizes(module, lengths, routers)
    plan = module.routed_plan(n, whole, ends(lengths), eta, writes, writes, chosen)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = []
    for r in range(routers):
        pairs = sorted((int(p), int(sample[t]), t) for t in range(tokens) for p in chosen[r, t])
        assert plan.tokens[r].tolist() == [t for _, _, t in pairs]
        assert torch.equal(plan.gates[r], eta[r][[t for _, _, t in pairs], [p for p, _, _ in pairs]])
        places = plan.places[r].view(tokens, picks)
        for c in range(picks):
            assert torch.equal(plan.tokens[r][places[:, c].long()], torch.arange(tokens, dtype=torch.int32))
            assert torch.equal(plan.gates[r][places[:, c].long()], eta[r].gather(1, chosen[r].long())[:, c])
        samples = len(lengths)
        rows.append([sum(q[:2] == (p, s) for q in pairs) for p in range(count) for s in range(samples)])
    check_groups(plan, rows)


@given(LENGTHS, st.integers(1, 2))
def test_every_token_is_a_slot_of_every_partition_in_masked_form(
    masked: ModuleType, lengths: list[int], routers: int
) -> None:
    tokens, count = sum(lengths), 3
    eta = torch.rand(routers, tokens, count)
    writes = (eta.mT > 0.4).to(torch.int32).contiguous()
    chosen = torch.full((routers, tokens, count), -1, dtype=torch.int32)
    plan = masked.masked_plan(sizes(masked, lengths, routers), False, ends(lengths), eta, writes, writes, chosen)
    check_groups(plan, [lengths * count] * routers)
    for r in range(routers):
        assert plan.tokens[r].tolist() == list(range(tokens)) * count
        assert torch.equal(plan.gates[r].view(count, tokens), eta[r].T)
        places = plan.places[r].view(tokens, count).long()
        assert torch.equal(plan.tokens[r][places], torch.arange(tokens, dtype=torch.int32)[:, None].expand(-1, count))
        assert chosen[r].tolist() == [list(range(count))] * tokens


def test_groups_are_long_where_there_are_enough_of_them(module: ModuleType) -> None:
    """At most 2048 groups, and at least 1024 of those that are longer than 512 rows."""
    for rows in (1, 600, 16 * 1024 - 1, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 64 * 1024, 10**6):
        length = module.group_length(rows, 32)
        assert length % 512 == 0
        assert rows * 32 / length <= 2048
        assert length == 512 or rows * 32 / length >= 1024
    assert [module.group_length(n * 1024, 32) for n in (8, 31, 32, 64, 128)] == [512, 512, 1024, 1024, 2048]


def test_loops_that_share_states_of_chunks_must_agree(module: ModuleType) -> None:
    x = packed(SPEC, [20], dtype=torch.float32)
    schedules = module.schedules_for(x["v"])
    names = [n for n, s in schedules.items() if "BLOCK_E" in s]
    order = [*module.ROWS, "state", "cu_seqlens", "do", "dfinal", "dbalance"]
    changed = {n: {**s, "CHUNK": 64} if n == "gradient2" else s for n, s in schedules.items()}
    assert "gradient2" in names
    with pytest.raises(ValueError, match="these kernels need one CHUNK in their Schedules"):
        module.backward(changed, *(x[n] for n in order))


def test_the_module_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = (generate(SPEC, tmp_path / name).path.read_bytes() for name in "ab")
    assert first == second
