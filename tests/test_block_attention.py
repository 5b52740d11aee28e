"""Coverage of a choice, against a loop over queries, blocks and heads."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen.block_attention import coverage
from splagen.errors import InputError
from splagen.library import alibi, sliding_window
from splagen.qk_file import read_qk
from splagen.spec import Select, SPLASpec

LENGTH, BLOCK = 151, 16


def rows(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, length, h, 16, generator=g, dtype=torch.float64) for h in (4, 2))
    return 2 * q, k + torch.randn(1, -(-length // 16), 2, 16, generator=g).repeat_interleave(16, 1)[:, :length]


def spec(**more: object) -> SPLASpec:
    of_select = {n: more.pop(n) for n in ("granularity", "tile", "budget", "own_rows") if n in more}
    select = Select(block_size=BLOCK, **{"budget": 2, **of_select})  # type: ignore[arg-type]
    return SPLASpec(**{"head_dim": 16, "group_size": 2, "select": select, "name": "s", **more})  # type: ignore[arg-type]


def masses_by_hand(q: Tensor, k: Tensor, t: int, head: int, causal: bool, slopes: bool) -> list[float]:
    """The attention that query t gives to each block, the mean over the two heads of the group."""
    blocks = [0.0] * -(-LENGTH // BLOCK)
    for h in (2 * head, 2 * head + 1):
        keys = range(t + 1 if causal else LENGTH)
        slope = 2 ** (-8 * (h + 1) / 4) if slopes else 0.0
        weights = [math.exp(float(q[0, t, h] @ k[0, n, head]) / 4 - slope * abs(t - n)) for n in keys]
        for n, w in zip(keys, weights, strict=True):
            blocks[n // BLOCK] += w / sum(weights) / 2
    return blocks


@pytest.mark.parametrize(
    ("made", "causal", "tile", "slopes"),
    [
        (spec(), True, 1, False),
        (spec(score=alibi(), linear=None), True, 1, True),
        (spec(causal=False, granularity="tile", tile=32), False, 32, False),
    ],
)
def test_shares_are_those_of_a_loop(made: SPLASpec, causal: bool, tile: int, slopes: bool) -> None:
    q, k = rows()
    found = coverage(made, q, k, tiles=4)
    assert found.positions.tolist() == ([0, 50, 100, 150] if tile == 1 else [0, 32, 96, 128])
    for i, position in enumerate(found.positions.tolist()):
        own, last = position // BLOCK, (min(position + tile, LENGTH) - 1) // BLOCK
        near = range(own - 1, own + 1) if causal else range(own - 1, (position + tile - 1) // BLOCK + 2)
        seen = range(last + 1 if causal else -(-LENGTH // BLOCK))
        forced = {j for j in seen if j == 0 or j in near}
        assert set(found.forced[i].nonzero().flatten().tolist()) == forced
        assert set(found.far[i].nonzero().flatten().tolist()) == set(seen) - forced
        for head in (0, 1):
            queries = range(position, min(position + tile, LENGTH))
            by_query = [masses_by_hand(q, k, t, head, causal, slopes) for t in queries]
            held = [sum(x) / len(queries) for x in zip(*by_query, strict=True)]
            free = found.free[head, i].nonzero().flatten().tolist()
            assert len(free) == min(2, len(seen) - len(forced))
            share = sum(held[j] for j in forced)
            far = sorted((held[j] for j in set(seen) - forced), reverse=True)
            assert float(found.forced_share[head, i]) == pytest.approx(share, rel=1e-9)
            assert float(found.covered[head, i]) == pytest.approx(share + sum(held[j] for j in free), rel=1e-9)
            assert float(found.best[head, i]) == pytest.approx(share + sum(far[:2]), rel=1e-9)
            assert found.covered[head, i] <= found.best[head, i] + 1e-12


def test_a_head_alone_is_that_head_of_all() -> None:
    """With a score function that asks which head it is."""
    q, k = rows()
    made = spec(score=alibi(), linear=None)
    every, one = coverage(made, q, k, tiles=9), coverage(made, q, k, head=1, tiles=9)
    assert torch.equal(every.free[1:], one.free)
    torch.testing.assert_close(every.covered[1:], one.covered, rtol=1e-12, atol=0)
    assert (every.covered[0] - one.covered[0]).abs().max() > 1e-3


def test_a_budget_for_all_far_blocks_covers_everything_and_a_window_nothing_behind_it() -> None:
    q, k = rows()
    assert (coverage(spec(budget=16), q, k, tiles=20).covered - 1).abs().max() < 1e-12
    windowed = coverage(spec(score=sliding_window(BLOCK), linear=None), q, k, tiles=20)
    assert (windowed.forced_share - 1).abs().max() < 1e-12  # the window lies in the query's block and that before it


def test_below_dense_below_everything_is_forced() -> None:
    q, k = rows()
    found = coverage(spec(dense_below=LENGTH + 1), q, k, tiles=5)
    assert not found.far.any()
    assert (found.forced_share - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("made", "head", "message"),
    [
        (SPLASpec(head_dim=16, group_size=2, select=None, linear=None), None, "no select"),
        (spec(head_dim=32), None, "head_dim 32"),
        (spec(group_size=4), None, "4 query heads per KV head"),
        (spec(own_rows=True), None, "own_rows"),
        (spec(), 2, "KV head 2 of 2"),
    ],
)
def test_what_does_not_fit_is_refused(made: SPLASpec, head: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        coverage(made, *rows(), head=head)


def test_files_are_checked(tmp_path: Path) -> None:
    q, k = rows(20)
    path = tmp_path / "layer.pt"
    torch.save({"q": q, "k": k}, path)
    assert torch.equal(read_qk(path)[0], q)
    bad = [
        ([q, k], "does not hold"),
        ({"q": q}, "does not hold"),
        ({"q": q[0], "k": k[0]}, r"q is \[20, 4, 16\]"),
        ({"q": q[:, :, :3], "k": k}, r"q is \[1, 20, 3, 16\]"),
        ({"q": q[:, :9], "k": k}, r"q is \[1, 9, 4, 16\]"),
        ({"q": q[:, :, :0], "k": k}, r"q is \[1, 20, 0, 16\]"),
        ({"q": q.int(), "k": k.int()}, "int32"),
        ({"q": q / 0, "k": k}, "NaN or infinite"),
        ({"q": q, "k": k, "more": InputError("a class")}, "cannot read"),
    ]
    for content, message in bad:
        torch.save(content, path)
        with pytest.raises(InputError, match=message) as error:
            read_qk(path)
        assert "layer.pt" in str(error.value)
    path.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(InputError, match="cannot read"):
        read_qk(path)
    with pytest.raises(InputError, match="cannot read"):
        read_qk(tmp_path / "none.pt")
