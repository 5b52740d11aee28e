"""The benchmarks where no GPU is needed: given blocks, the gate, floors, what follows from rows, and the pictures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import findings, given, measurement, peers, plots, run
from benchmarks.breakdown import KernelRun, bytes_of
from benchmarks.floors import PEAK_BYTES, PEAK_FLOPS, block_counts, floors, kernel_flops
from benchmarks.op import op_of
from benchmarks.timing import Timing
from benchmarks.works import WORKS, Size, Work, linear_spec, sparse_spec, whole_spec
from splagen import pipeline
from splagen.codegen.partition import Partition
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.spec import Residual, Select, SPLASpec, to_toml, windows
from splagen.verification import random_inputs
from tests.codegen.torch_attention import TorchAttention

K = 1024
TOKEN = SPLASpec(
    head_dim=16,
    group_size=2,
    select=Select(block_size=16, budget=3, sinks=2, local=2, metric=taylor(covariance="diag")),
    linear=None,
)
TILE = SPLASpec(
    head_dim=16,
    causal=False,
    select=Select(
        block_size=16, budget=3, sinks=1, local=0, granularity="tile", tile=16, metric=taylor(covariance="diag")
    ),
    linear=Residual(),
)
NARROW = replace(
    TILE,
    select=Select(
        block_size=32, budget=2, sinks=2, local=1, granularity="tile", tile=16, metric=taylor(covariance="diag")
    ),
)
SHAPE = (1, 2, 235)


# -- blocks that are given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [TOKEN, TILE, NARROW], ids=["token", "tile", "narrow tile"])
def test_random_blocks_are_a_choice(spec: SPLASpec) -> None:
    truth, length, heads = oracle(to_toml(spec)), SHAPE[2], 2
    inputs = random_inputs(truth, (1, heads * spec.group_size, length), torch.float32, "cpu", 0)
    _, far, _ = truth.selection(inputs)
    drawn = given.random_selection(spec, length, heads, "cpu")
    assert spec.select is not None
    assert torch.equal(given.far(spec, length, torch.arange(far.shape[2])), far[0, 0])
    indices, counts = drawn.indices, drawn.counts
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape == (*far.shape[:3], spec.select.budget)
    assert torch.equal(counts, far.sum(-1).clamp(max=spec.select.budget).int())
    assert torch.equal(counts, (indices >= 0).sum(-1).int())
    assert bool(((indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] < 0)).all())
    assert not bool((truth.mask(inputs, indices) & ~far).any())
    assert not torch.equal(indices[:, 0], indices[:, 1])


@pytest.mark.parametrize("spec", [TOKEN, TILE, NARROW], ids=["token", "tile", "narrow tile"])
def test_attended_blocks_are_the_chosen_and_all_that_are_not_far(spec: SPLASpec) -> None:
    truth, length = oracle(to_toml(spec)), SHAPE[2]
    inputs = random_inputs(truth, (1, spec.group_size, length), torch.float32, "cpu", 0)
    drawn = given.random_selection(spec, length, 1, "cpu")
    assert spec.select is not None
    tile = torch.arange(drawn.indices.shape[2])[:, None] * spec.select.tile
    seen = tile >= torch.arange(-(-length // spec.select.block_size)) * spec.select.block_size
    forced = ~given.far(spec, length, tile[:, 0] // spec.select.tile) & (seen | (not spec.causal))
    every = given.attended(spec, length, drawn)
    assert torch.equal(truth.mask(inputs, every.indices), truth.mask(inputs, drawn.indices) | forced)
    assert torch.equal(every.counts, truth.mask(inputs, every.indices).sum(-1).int())


def test_overlap_counts_the_union_of_neighbours() -> None:
    same = torch.tensor([3, 5]).expand(1, 1, 16, 2).int()
    apart = torch.arange(32).reshape(1, 1, 16, 2).int()
    counts = torch.full((1, 1, 16), 2, dtype=torch.int32)
    assert given.overlap(given.Selection(same, counts)) == {"4": 1.0, "8": 1.0, "16": 1.0}
    assert given.overlap(given.Selection(apart, counts)) == {"4": 4.0, "8": 8.0, "16": 16.0}
    alone = torch.where(apart < 2, -1, apart)  # the first has chosen none, 4 queries 1.5 each, together 6
    assert given.overlap(given.Selection(alone, counts))["16"] == 16.0


def test_random_choices_of_neighbours_are_as_alike_as_asked() -> None:
    spec = SPLASpec(
        head_dim=16, group_size=1, select=Select(block_size=16, budget=4, metric=taylor(covariance="diag")), linear=None
    )
    unions = [
        given.overlap(given.random_selection(spec, 2048, 1, "cpu", alike=alike))["16"] for alike in (0.0, 0.5, 1.0)
    ]
    assert unions[0] > unions[1] > unions[2]
    assert unions[2] < 1.2, "one choice for 16 neighbours, but for those before which a block ends"


def test_findings_leave_out_strategies_and_choices_that_are_related() -> None:
    row = {"system": findings.OURS, "kv_heads": 2, "length": 64, "forward_ms": 1.0}
    related = [row | {"strategy": "by key"}, row | {"selection": "text"}, row | {"selection": "alike 0.5"}]
    assert findings.plain([row, *related, row | {"selection": "random"}]) == [row, row | {"selection": "random"}]


def test_stages_of_a_module(tmp_path: Path) -> None:
    module, part = pipeline.generate(TOKEN, tmp_path).module, pipeline.kernels(TOKEN)
    assert isinstance(part, Partition)
    assert [k.name for k in given.selecting(part)] == ["score_topk", "statistics", "score_lse"]
    launched: list[str] = []

    def named(name: str) -> Callable[..., tuple[None, ...]]:
        kernel = next(k for k in part.kernels if k.name == name)
        return lambda *_: (launched.append(name), (None,) * len(kernel.outputs))[1]

    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 1, 16)
    chosen = given.random_selection(TOKEN, 64, 1, "cpu")
    rest = {"block_sparse_forward", "block_sparse_parts", "block_sparse_merge"}
    with given.replaced(module, {f"launch_{n.name}": named(n.name) for n in part.kernels}):
        with given.with_selection(module, part, chosen):
            found = module.forward(module.schedules_for(q), q, k, k)
        assert launched
        assert set(launched) <= rest
        assert any(x is chosen.indices for x in found)
        launched.clear()
        vars(module)["launch_score_lse"] = lambda *_: None
        with given.selecting_only(module, part):
            module.forward(module.schedules_for(q), q, k, k)
        assert not set(launched) & rest
        assert "score_topk" in launched


# -- floors --------------------------------------------------------------------------------------------------------


def test_floors_of_the_whole_op() -> None:
    length = 64 * K
    shape, spec = (1, 32, length), whole_spec(16)
    counts = block_counts(spec, shape)
    assert counts["forced"] == 3
    assert counts["far"] == pytest.approx(509.5)
    assert counts["chosen"] == pytest.approx(13 - 169 / (4 * 509.5))
    rows = 32 * length
    softmax, chosen = 2 * rows * 64 * (3 + counts["chosen"]), 2 * rows * 64 * counts["chosen"]
    states = 2 * (32 + 2) * length * 256 * 128
    score = 2 * rows * 2 * 128 * (509.5 + 511.515625)
    found = floors(spec, shape)
    assert found["forward"].flops == pytest.approx(score + softmax * 256 + chosen * 384 + states)
    assert found["backward"].flops == pytest.approx(softmax * 640 + chosen * 1024 + 2 * states)
    assert found["forward"].ms == pytest.approx(4.65, abs=0.02)
    assert found["forward"].ms == pytest.approx(1e3 * found["forward"].flops / PEAK_FLOPS)
    alone = {
        n: f.flops for s in ("selection", "attention") for n, f in floors(spec, shape, (s,)).items() if s == "selection"
    }
    assert alone == {"forward": pytest.approx(score)}
    assert found["forward"].flops - alone["forward"] == pytest.approx(
        floors(spec, shape, ("attention",))["forward"].flops
    )


def test_the_cost_model_agrees_where_a_kernel_does_no_more_than_it_must() -> None:
    shape = (1, 32, 64 * K)
    flops = kernel_flops(sparse_spec(4), shape)
    counts = block_counts(sparse_spec(4), shape)
    assert flops["block_sparse_forward"] == pytest.approx(2 * 32 * 64 * K * 64 * 16 * 256)
    assert flops["score_lse"] + flops["score_topk"] == pytest.approx(
        floors(sparse_spec(4), shape, ("selection",))["forward"].flops, rel=1e-3
    )
    assert counts["forced"] + counts["chosen"] < 16  # the first queries have fewer to choose from


def test_floors_of_linear_attention() -> None:
    shape = (1, 32, 32 * K)
    found = floors(linear_spec(1), shape)
    assert found["forward"].flops == 32 * 32 * K * (4 * 64 * 128 + 4 * 128 * 128)
    assert found["forward"].bytes == 4 * 32 * 32 * K * 128 * 2
    assert found["forward"].ms == pytest.approx(1e3 * found["forward"].bytes / PEAK_BYTES)


def test_floors_below_the_limit_are_those_of_dense_attention() -> None:
    """Half of the pairs, two products forward and five backward; at the limit the sparse ones."""
    spec, length = replace(whole_spec(16), dense_below=4 * K), 4 * K - 1
    found = floors(spec, (1, 32, length))
    pairs = 32 * length * (length + 1) / 2
    assert {n: f.flops for n, f in found.items()} == {"forward": 512 * pairs, "backward": 1280 * pairs}
    assert found["forward"].bytes == 2 * length * (2 * 32 + 2 * 2) * 128
    whole = replace(spec, dense_below=0)
    assert floors(replace(spec, causal=False), (1, 32, length))["forward"].flops == 512 * 32 * length**2
    assert floors(spec, (1, 32, 4 * K))["forward"].bytes == floors(whole, (1, 32, 4 * K))["forward"].bytes


def test_every_work_has_specs_sizes_and_reachable_targets() -> None:
    for work in WORKS.values():
        cases = work.cases()
        assert {(c.variant, c.length, c.size.kv_heads) for c in cases if c.target} == work.targets.keys()
        assert all(set(c.size.beside) <= peers.PEERS.keys() for c in cases)
        for case in cases:
            least = floors(case.spec, case.shape, measurement.STAGES[work.timed])
            for kind in (case.target.at_least, case.target.aim) if case.target else ():
                assert len(kind) == len(work.passes)
                assert all(ms > least[n].ms for n, ms in zip(work.passes, kind, strict=True)), case
    asked = WORKS["whole"].cases(lengths=[4096], kv_heads=[4])
    assert [(c.shape, c.size.group, c.target) for c in asked] == [((1, 32, 4096), 8, None)]
    infllm = WORKS["infllm"].cases()[0].spec
    assert isinstance(infllm, SPLASpec)
    assert infllm.select is not None
    assert infllm.select.statistics == windows()


# -- the run -------------------------------------------------------------------------------------------------------


def small(timed: Any, spec: SPLASpec = TILE, beside: tuple[str, ...] = ()) -> Work:
    return Work(
        "small", "a test", {"": lambda group: replace(spec, group_size=group)}, timed, (Size(1, 1, beside),), (96,)
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Times nothing, and keeps what it was asked to time."""
    timed: list[object] = []

    def time_ms(call: Callable[[], object], *_: object, **__: object) -> Timing:
        timed.append(call())
        return Timing(2.0, 0.5)

    def peak(call: Callable[[], object]) -> int:
        call()
        return 3 << 30

    for module in (measurement, peers):
        monkeypatch.setattr(module, "time_ms", time_ms)
        monkeypatch.setattr(module, "repeats_for", lambda call: 1)
        monkeypatch.setattr(module, "peak_bytes", peak)
    monkeypatch.setattr(measurement, "breakdown", lambda *_: {"block_sparse_forward": KernelRun(1.5, 86_000_000)})
    return timed


def options(tmp_path: Path) -> measurement.Options:
    return measurement.Options(device="cpu", dtype=torch.float32, build=tmp_path)


def rows_of(work: Work, tmp_path: Path) -> tuple[list[dict[str, Any]], measurement.Run]:
    made = measurement.Run(options(tmp_path))
    return [row for case in work.cases() for row in made.rows(work, case)], made


def test_a_right_op_is_timed(tmp_path: Path, clock: list[object]) -> None:
    (row,), made = rows_of(small("given"), tmp_path)
    assert (row["forward_ms"], row["backward_ms"], row["peak_gib_beyond_inputs"]) == (2.0, 2.0, 3.0)
    assert row["selection"] == "random"
    assert row["floor_ms"].keys() == {"forward", "backward"}
    assert row["kernels_floor_ms"]["block_sparse_forward"] == pytest.approx(0.02)
    assert set(row["strategies"].values()) <= {"by row", "by key"}
    assert row["union_of_neighbours"]["4"] >= 1
    assert len(clock) == 2
    assert not made.wrong
    json.dumps(row, allow_nan=False)
    assert "forward     2.00 ms (floor" in run.line_of("small", row)


@pytest.mark.parametrize("wrong", [False, True])
def test_below_the_limit_torch_is_timed_and_compared(
    wrong: bool, tmp_path: Path, clock: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of longer sequences stay out of it: of the gate, too."""
    work = small("op", replace(TILE, dense_below=K))
    module = pipeline.generate(work.cases()[0].spec, tmp_path).module
    monkeypatch.setattr(module, "takes_dense", lambda q: q.shape[1] < K)
    monkeypatch.setattr(module, "takes_cudnn", lambda *_: True)
    for name in ("forward", "backward"):
        monkeypatch.setattr(module, name, None)
    if wrong:
        right = module.attend_backward
        monkeypatch.setattr(module, "attend_backward", lambda *given: [1.1 * x for x in right(*given)])
    with TorchAttention() as seen:
        (row,), _ = rows_of(work, tmp_path)
    assert set(seen.calls) == {"cudnn", "cudnn backward"}
    if wrong:
        assert [text.partition(":")[0] for text in row["refused"]] == ["dense dq", "dense dk", "dense dv"]
        return
    assert (row["forward_ms"], row["backward_ms"]) == (2.0, 2.0)
    assert "strategies" not in row


@pytest.mark.parametrize("wrong", ["o", "dk"])
def test_a_wrong_op_is_refused_and_nothing_is_timed(
    wrong: str, tmp_path: Path, clock: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = small("given", beside=("dense flash",))
    module = pipeline.generate(work.cases()[0].spec, tmp_path).module
    part = pipeline.kernels(work.cases()[0].spec)
    assert isinstance(part, Partition)
    name, place = ("forward", 0) if wrong == "o" else ("backward", [n for n, _ in part.gradients].index("k"))
    right = getattr(module, name)

    def scaled(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(1.01 * x if i == place else x for i, x in enumerate(right(*arguments)))

    monkeypatch.setattr(module, name, scaled)
    (row,), made = rows_of(work, tmp_path)
    assert any(text.startswith(f"{wrong}:") for text in row["refused"])
    assert "forward_ms" not in row
    assert not clock
    assert made.wrong
    assert "REFUSED" in run.line_of("small", row)


def test_a_wrong_selection_is_refused(tmp_path: Path, clock: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(small("selection"), passes=("forward",))
    (row,), _ = rows_of(work, tmp_path)
    assert "forward_ms" in row
    assert "backward_ms" not in row
    clock.clear()
    module = pipeline.generate(work.cases()[0].spec, tmp_path).module
    choose = module.launch_score_topk

    def at_random(*arguments: Any) -> tuple[Tensor, Tensor]:
        right, counts = choose(*arguments)
        drawn = given.random_selection(TILE, arguments[2].shape[1], 1, "cpu", seed=1)
        assert right.shape == drawn.indices.shape
        return drawn.indices, counts

    monkeypatch.setattr(module, "launch_score_topk", at_random)
    (row,), _ = rows_of(work, tmp_path)
    assert row["refused"]
    assert not clock


@pytest.mark.parametrize("spec", [TOKEN, TILE, NARROW], ids=["token", "tile", "narrow tile"])
def test_the_gate_leaves_blocks_over(spec: SPLASpec, tmp_path: Path) -> None:
    shape = op_of(spec, "op", tmp_path).gate_shape(spec.group_size)
    assert spec.select is not None
    tiles = torch.arange(shape[2] // spec.select.tile)
    most = int(given.far(spec, shape[2], tiles).sum(1).max())
    assert most > spec.select.budget
    assert shape[2] % spec.select.block_size
    assert shape[2] % 4 == 0


def test_a_system_that_is_not_there_is_a_row_with_the_reason(
    tmp_path: Path, clock: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", absent)
    rows, made = rows_of(small("given", beside=("fla parallel_nsa", "dense flash")), tmp_path)
    assert [r["system"] for r in rows] == ["splagen", "fla parallel_nsa", "dense flash"]
    assert rows[1]["reason"] == "ModuleNotFoundError: No module named 'fla.ops.nsa'"
    assert "forward_ms" not in rows[1]
    assert rows[2]["forward_ms"] == 2.0
    assert not made.wrong


def test_no_case_starts_when_the_time_is_over(tmp_path: Path) -> None:
    made = measurement.Run(options(tmp_path), seconds=-1.0)
    work = small("given")
    (figures,) = made.figures(work, work.cases())
    assert figures["rows"] == []
    assert figures["left_out"][0]["reason"] == "no time left"


def test_works_are_listed_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}:" in shown for name in WORKS)
    with pytest.raises(SystemExit):
        run.main(["nonsense"])
    with pytest.raises(SystemExit):
        run.main(["sparse", "tile", "--record", "both"])
    assert "name one work, not 2" in capsys.readouterr().err


# -- the systems beside it -----------------------------------------------------------------------------------------


def test_a_causal_mask_has_full_blocks_below_the_diagonal() -> None:
    size = peers.FLEX_BLOCK
    q, k, v = torch.randn(3, 1, 1, 2 * size, 16)
    mask = peers.causal_mask(2 * size, "cpu")
    got = peers.flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, is_causal=True))
    assert mask.to_dense()[0, 0].tolist() == [[1, 0], [1, 1]]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1]
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1]


def test_a_mask_of_chosen_blocks_holds_what_tiles_attend_to() -> None:
    drawn = given.random_selection(TILE, 256, 2, "cpu")
    task = peers.Task((1, 2, 256), 2, 16, causal=False, device="cpu", spec=TILE, selection=drawn)
    every = given.attended(TILE, 256, drawn)
    mask = peers.chosen_mask(task)
    seen = torch.zeros(1, 2, 16, 17, dtype=torch.bool)
    seen = seen.scatter(3, torch.where(every.indices < 0, 16, every.indices).long(), True)[..., :16]
    assert torch.equal(mask.to_dense().bool(), seen)
    assert not mask.kv_num_blocks.any()
    with pytest.raises(ValueError, match="whole blocks"):
        peers.chosen_mask(replace(task, shape=(1, 2, 250)))


def test_bytes_of_tensors_count_once() -> None:
    x, y = torch.zeros(8, dtype=torch.float32), torch.zeros(4, dtype=torch.int32)
    assert bytes_of((x, {"again": x}), (y, None, 3)) == 48


# -- what follows from rows ----------------------------------------------------------------------------------------


def timed_row(system: str, length: int, ms: float, **more: Any) -> dict[str, Any]:
    sizes = {"kv_heads": 2, "group_size": 16}
    return {"system": system, "length": length, "forward_ms": ms, "backward_ms": 2 * ms, **sizes, **more}


def test_the_crossover_lies_between_the_lengths_that_hold_it() -> None:
    dense = [timed_row("dense cuDNN", n * K, n * n / 64) for n in (8, 16, 32)]
    ours = [timed_row("splagen", n * K, n / 4) for n in (8, 16, 32)]  # equal at 16k
    for found in findings.crossovers([*dense, *ours]):
        assert found["length"] == pytest.approx(16 * K, abs=1)
        assert found["times_faster_at_the_longest"] == pytest.approx(2.0)
    faster = [timed_row("splagen", n * K, n / 100) for n in (8, 16, 32)]
    assert {f["length"] for f in findings.crossovers([*dense, *faster])} == {"at most 8192"}
    slower = [timed_row("splagen", n * K, 100.0) for n in (8, 16, 32)]
    assert {f["length"] for f in findings.crossovers([*dense, *slower])} == {"beyond 32768"}
    assert findings.crossovers(dense) == []


def test_the_ratio_to_dense_attention_of_every_variant() -> None:
    dense = [timed_row("dense cuDNN", n * K, n, variant="a") for n in (1, 2)]
    ours = [timed_row("splagen", n * K, n * x, variant=v) for n in (1, 2, 4) for v, x in (("a", 1.25), ("b", 0.5))]
    for found in findings.times_dense([*dense, *ours]):
        ratio = 1.25 if found["variant"] == "a" else 0.5
        assert found["ratio"] == {"forward": ratio, "backward": ratio}
        assert found["length"] in (K, 2 * K)
    assert len(findings.times_dense([*dense, *ours])) == 4
    assert findings.crossovers([*dense, *ours]) == []


def test_odd_groups_are_compared_with_the_next_power_of_two() -> None:
    rows = [timed_row("splagen", K, ms) | {"kv_heads": 4, "group_size": g} for g, ms in ((5, 3.0), (7, 2.0), (8, 2.0))]
    found = {f["group_size"]: f for f in findings.odd_groups(rows)}
    assert found.keys() == {5, 7}
    assert found[5]["ratio"] == {"forward": 1.5, "backward": 1.5}
    assert not found[5]["within_limit"]
    assert found[7]["within_limit"]


def test_pictures_are_drawn_from_a_record(tmp_path: Path) -> None:
    kernels = {
        "kernels_ms": {"a": 1.0, "b": 2.0},
        "kernels_flops": {"a": 1e12, "b": 0},
        "kernels_bytes": {"a": 1e9, "b": 9},
    }
    rows = [
        *(
            timed_row("splagen", n * K, n / 4, floor_ms={"forward": n / 9, "backward": n / 9}, **kernels)
            for n in (32, 64)
        ),
        timed_row("dense cuDNN", 64 * K, 56.0),
        {"system": "fla parallel_nsa", "length": 64 * K, "kv_heads": 2, "reason": "absent"},
    ]
    assert plots.points_of(rows[0]) == {"a": (1000.0, 1000.0)}
    assert plots.lines_of(rows[:3], "forward").keys() == {"splagen, Hkv = 2", "floor", "dense cuDNN"}
    (tmp_path / "whole.json").write_text(json.dumps({"figures": {"rows": rows}}))
    plots.main(["--results", str(tmp_path), "--out", str(tmp_path / "docs")])
    for name in ("time_by_length", "roofline"):
        assert (tmp_path / "docs" / f"{name}.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.run"):
        plots.read_rows(tmp_path / "docs")
