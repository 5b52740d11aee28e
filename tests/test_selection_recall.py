"""The recall of metrics: what the best choice, the exact metric and keys of small rank must give."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.selection_recall import METRICS, main, masses, measure, recall
from splagen.library import taylor


def rows(rank: int = 16, length: int = 300) -> tuple[Tensor, Tensor]:
    """q [1, L, 4, 16] and k [1, L, 2, 16] whose blocks of 16 lie around means of their own, in `rank` directions."""
    g = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    drift = normal(1, -(-length // 16), 2, 16).repeat_interleave(16, 1)[:, :length]
    return 2 * normal(1, length, 4, 16), drift + normal(1, length, 2, rank) @ normal(rank, 16) / rank**0.5


def test_the_best_choice_holds_the_most() -> None:
    q, k = rows()
    found = recall(masses(q, k, 16, [150, 280], METRICS), 4)
    assert found["best"]["of_best"] == 1
    assert all(0 < x["of_best"] <= 1 and x["covered"] <= found["best"]["covered"] <= 1 for x in found.values())
    assert found["full"]["of_best"] > found["order 1"]["of_best"]


def test_keys_of_small_rank_leave_nothing_to_the_full_covariance() -> None:
    """Then factors of that rank and the variance of scores are the same metric, written twice."""
    q, k = rows(rank=2)
    scores = masses(q, k, 16, [120, 284], METRICS).scores
    torch.testing.assert_close(scores["rank 2"], scores["full"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores["rank 8 cumulant"], scores["full cumulant"], rtol=1e-9, atol=1e-12)
    assert (scores["diagonal"] - scores["full"]).abs().max() > 0.01


def test_equal_keys_in_a_block_are_ranked_exactly_by_any_metric() -> None:
    q, k = rows()
    k = k[:, ::16].repeat_interleave(16, 1)[:, :300]
    q = q[:, :, ::2]  # a head per group: the heads of one are weighed by normalisers over complete blocks
    for name, figures in recall(masses(q, k, 16, [200], METRICS), 3).items():
        assert figures["of_best"] == pytest.approx(1), name


def test_equal_neighbours_choose_as_many_blocks_together_as_one() -> None:
    q, k = rows()
    q = q[:, :, ::2]
    starts = [208, 256]  # of a block: its queries have the same far blocks
    alone = recall(masses(q, k, 16, starts, METRICS), 3)
    for start in starts:
        q[:, start : start + 16] = q[:, start : start + 1].clone()
    for name, figures in recall(masses(q, k, 16, starts, METRICS), 3).items():
        assert figures["union"] == 1
        assert 1 < alone[name]["union"] <= 16


def test_a_query_before_the_first_block_ends_has_no_score() -> None:
    q, k = rows(length=40)
    found = masses(q, k, 16, [0], {"full": "taylor", "order 1": taylor(order=1)})
    assert not any(x[:, :15].any() for x in found.scores.values())
    assert all(x[:, 15, 0].eq(2).all() for x in found.scores.values())  # a share of 1 of each head of a group
    assert not found.far.any()


def test_a_budget_that_holds_all_far_blocks_has_no_row() -> None:
    q, k = rows()
    found = measure(q, k, blocks=[16, 32], budgets=[2, 8], stretches=2)
    assert {(r["block"], r["budget"]) for r in found} == {(16, 2), (16, 8), (32, 2)}
    with pytest.raises(ValueError, match="longer sequence"):
        measure(q, k, blocks=[64], budgets=[8], stretches=2)


def test_a_file_becomes_a_record_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    q, k = rows()
    torch.save({"q": q, "k": k}, tmp_path / "one.pt")
    torch.save({"q": k[:, :, [0, 0, 1, 1]], "k": q[:, :, :2]}, tmp_path / "other.pt")
    folders = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    layers = [str(tmp_path / f"{name}.pt") for name in ("one", "other")]
    main(["--qk", *layers, "--length", "290", "--stretches", "2", "--device", "cpu", *folders])
    figures = json.loads((tmp_path / "selection_recall.json").read_text())["figures"]
    assert (figures["length"], figures["queries"]) == (290, 32)
    for name in ("one", "other"):
        assert {r["metric"] for r in figures["rows"] if r["source"] == name} == {"best", *METRICS}
    assert (tmp_path / "docs/selection_recall.png").read_bytes()[:4] == b"\x89PNG"
    torch.save({"q": q[:, :200], "k": k[:, :200]}, tmp_path / "short.pt")
    with pytest.raises(SystemExit):
        main(["--qk", layers[0], str(tmp_path / "short.pt"), *folders])
