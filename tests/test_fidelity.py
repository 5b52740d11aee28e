"""The study of fidelity: its text, its variants, training that goes on, recall, conversion, report."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import record
from examples.fidelity import presets, qk, recall, report, run, speed, text, train
from examples.fidelity.model import build, parameters
from examples.fidelity.presets import H200, TINY, Shape
from examples.fidelity.train import Run, batch, by_position, losses, on
from examples.fidelity.variants import ABOUT, variant
from splagen.nn import generated
from splagen.qk_file import read_qk

CPU = torch.device("cpu")
SMALL = replace(TINY.shape, context=192)


@pytest.fixture(autouse=True)
def _by_equations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops evaluate their equations on the CPU, as they do without TRITON_INTERPRET."""
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(folder))
    found: Callable[..., Any] = generated._op

    def op(*given: Any) -> Any:
        made = found(*given)
        monkeypatch.setitem(made.__globals__, "INTERPRETED", False)
        return made

    monkeypatch.setattr(generated, "_op", op)


def sources(count: int = 60) -> list[bytes]:
    return [f"line {i}\n".encode() * 40 + b"and the same in all of them\n" * 20 for i in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for i, source in enumerate(sources()):
        (root / f"{i:02}.py").write_bytes(source)
    return root


@pytest.fixture(scope="module")
def corpus(root: Path) -> text.Corpus:
    return text.load(root / "mapped", {"one": root})


# -- text ------------------------------------------------------------------------------------------------------


def test_each_file_is_on_the_side_that_its_content_says(corpus: text.Corpus) -> None:
    train, validation = (set(x.tobytes().split(b"\0")) - {b""} for x in (corpus.train, corpus.validation))
    assert not train & validation
    assert train | validation == set(sources())
    assert validation == {s for s in sources() if text.held_out(s)}
    assert (len(train), len(validation)) == corpus.files


def test_about_one_file_in_twenty_is_held_out() -> None:
    share = sum(text.held_out(b"%d" % i) for i in range(4000)) / 4000
    assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


def test_the_digest_follows_from_the_text_alone(root: Path, corpus: text.Corpus, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    for copy in (again, other):
        copy.mkdir()
        for i, source in enumerate(sources()):
            (copy / f"{i:02}.py").write_bytes(source)
    (again / "copy.py").write_bytes(sources()[3])
    (again / "spaced.rst").write_bytes(sources()[3].replace(b"\n", b"\r\n"))  # differs in white space
    (again / "picture.txt").write_bytes(b"\0" * 100)
    (again / "short.md").write_bytes(b"x")
    (again / "code.c").write_bytes(b"int x;" * 100)
    assert text.load(tmp_path, {"elsewhere": again}).digest == corpus.digest
    (other / "59.py").write_bytes(sources()[59] + b"!")
    assert text.load(tmp_path, {"one": other}).digest != corpus.digest


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(sources()[0])
    with pytest.raises(ValueError, match="files to train on"):
        text.load(tmp_path / "mapped", {"one": tmp_path})
    assert not list((tmp_path / "mapped").iterdir())
    with pytest.raises(ValueError, match="windows of 20"):
        text.spread(np.zeros(10, np.uint8), 20, 1)


# -- recall ----------------------------------------------------------------------------------------------------


def lines(row: text.Bytes) -> dict[bytes, list[int]]:
    """Where the lines with a pair stand in a window, by what they say."""
    whole = row.tobytes()
    found: dict[bytes, list[int]] = {}
    for i in range(len(whole)):
        if whole.startswith(b"\n~", i):
            found.setdefault(whole[i + 2 : i + recall.LINE - 1], []).append(i)
    return found


def test_every_pair_stands_at_several_places_and_keys_differ() -> None:
    row = np.full(500, 46, np.uint8)
    recall.insert(row, np.random.default_rng(0), 15)
    pairs = lines(row)
    assert len(pairs) == len({pair[:1] for pair in pairs}) == 15
    assert all(len(pair) == 2 and pair.isalpha() for pair in pairs)
    assert {len(places) for places in pairs.values()} == {recall.PLACES}
    with pytest.raises(ValueError, match="16 pairs of 52 keys, 64 lines for a window of 62 places"):
        recall.insert(row, np.random.default_rng(0), 16)
    with pytest.raises(ValueError, match="53 pairs of 52 keys"):
        recall.insert(np.full(5000, 46, np.uint8), np.random.default_rng(0), 53)
    with pytest.raises(ValueError, match="53 pairs of 52 keys"):
        recall.questions(np.full(5000, 46, np.uint8), 512, 0, 3, 52)


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_pair_stands_at_its_depth(depth: float) -> None:
    for row in recall.questions(np.full(5000, 46, np.uint8), 512, depth, 3, 5):
        pairs = lines(row)
        ((place, asked),) = [places for places in pairs.values() if len(places) == 2]
        assert len(pairs) == 6
        assert asked + recall.LINE == 512
        assert place / (asked - recall.SLOT) == pytest.approx(depth, abs=0.05)


def test_an_answer_counts_if_it_is_the_likeliest_byte() -> None:
    rows = on(recall.questions(np.full(5000, 46, np.uint8), 128, 0.5, 2, 0), CPU)
    logits = torch.nn.functional.one_hot(torch.roll(rows, -1, 1), 256).float()
    logits[:, :-3] = 0  # before the value, and at its end, nothing counts
    logits[:, -2:] = 0
    found, loss = recall.answers(30 * logits, rows)
    assert found.tolist() == [True, True]
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(recall.answers(0 * logits, rows)[1], torch.full((2,), math.log(256)))
    logits[1, -3] = 0
    assert recall.answers(logits, rows)[0].tolist() == [True, False]


# -- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABOUT)
def test_one_step_lowers_the_loss_with_finite_gradients(name: str, corpus: text.Corpus) -> None:
    model = build(variant(name, 2), SMALL, 0, CPU)
    rows = on(text.spread(corpus.train, 129, 2), CPU)
    before, balance = losses(model, rows)
    assert before.mean().item() == pytest.approx(math.log(256), abs=0.15)  # it starts by knowing nothing
    assert (balance > 0) == ("sse" in name)
    torch.autograd.backward(before.mean())
    moved = {n: p for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.isfinite().all() for p in moved.values() if p.grad is not None)
    assert {n for n, p in moved.items() if p.grad is not None and p.grad.any()} >= {
        n for n in dict(model.named_parameters()) if n.endswith(("q_proj.weight", "o_proj.weight", "down.weight"))
    }
    with torch.no_grad():
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in moved.values() if p.grad is not None))
        for p in moved.values():
            assert p.grad is not None
            p.sub_(0.02 / norm * p.grad)
        assert losses(model, rows)[0].mean() < before.mean() - 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ABOUT)
def test_a_step_on_a_gpu_is_that_of_the_equations(name: str, device: torch.device) -> None:
    shape = Shape(layers=2, heads=4, kv_heads=1, head_dim=64, context=1024, block_size=64, budget=2)
    rows, found = torch.randint(256, (2, 700)), []
    for place in (CPU, device):
        model = build(variant(name, 2), shape, 0, place)
        loss = losses(model, rows.to(place))[0].mean()
        torch.autograd.backward(loss)
        found.append(
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.cpu()}
        )
    exact, fast = found
    torch.testing.assert_close(fast["loss"], exact["loss"], atol=5e-3, rtol=0)
    for n in ("embedding.weight", "blocks.0.attention.o_proj.weight", "blocks.1.down.weight"):
        assert (fast[n] - exact[n]).norm() < 0.05 * exact[n].norm(), n


@pytest.mark.parametrize("name", ABOUT)
def test_no_variant_sees_what_comes_later(name: str) -> None:
    model = build(variant(name, 2), SMALL, 0, CPU)
    tokens = torch.randint(256, (1, 150))
    changed = tokens.clone()
    changed[0, 140:] = (changed[0, 140:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :140], after[:, :140], atol=1e-5, rtol=1e-5)
    assert (before[:, 140:] != after[:, 140:]).any()


@pytest.mark.parametrize("name", ABOUT)
def test_variants_have_equally_many_parameters(name: str) -> None:
    def size(name: str, shape: Shape) -> int:
        with torch.device("meta"):
            return parameters(build(variant(name, shape.layers), shape, 0, torch.device("meta")))

    assert size(name, H200.shape) == pytest.approx(size("dense", H200.shape), rel=0.005)
    assert name != "dense" or 10e6 < size(name, H200.shape) < 15e6


def test_equal_names_start_equal_and_unknown_ones_are_refused() -> None:
    dense, spla = (build(variant(n, 2), SMALL, 0, CPU).state_dict() for n in ("dense", "spla2"))
    assert all(torch.equal(x, spla[n]) for n, x in dense.items())
    assert all(".branches." in n for n in spla.keys() - dense.keys())
    assert variant("sse_dense", 8).kinds == ("sse", "sse", "sse", "dense") * 2
    with pytest.raises(ValueError, match="no variant"):
        variant("dense_dense", 8)


# -- training --------------------------------------------------------------------------------------------------


def trained(corpus: text.Corpus, stops: list[int], path: Path, name: str = "spla2") -> Run:
    """Trained by as many processes as there are stops, and one that ends."""
    for stop in [*stops, TINY.training.steps]:
        state = Run(build(variant(name, 2), SMALL, 5, CPU), TINY.training, "key")
        if path.exists():
            state.load(path)
        state.train(corpus, SMALL, 5, stop.__le__, checkpoint=path, report=lambda line: None)
    return state


@pytest.mark.parametrize("name", ["spla2", "gla_spla2"])
def test_a_run_that_stopped_ends_bit_for_bit_like_one_that_did_not(
    name: str, corpus: text.Corpus, tmp_path: Path
) -> None:
    whole = trained(corpus, [], tmp_path / "whole.pt", name)
    pieces = trained(corpus, [0, 1, 3], tmp_path / "pieces.pt", name)
    assert whole.done
    assert whole.loss == pieces.loss
    assert whole.validation == pieces.validation
    assert [s for s, _ in whole.validation] == [0, 2, 4]
    one, two = whole.model.state_dict(), pieces.model.state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)
    kept = torch.load(tmp_path / "pieces.pt", weights_only=True)
    assert all(isinstance(x, Tensor) for x in kept.values())
    with pytest.raises(ValueError, match="other sizes, text or seed"):
        Run(build(variant(name, 2), SMALL, 5, CPU), TINY.training, "another").load(tmp_path / "pieces.pt")


def test_windows_of_a_step_follow_from_seed_and_step(corpus: text.Corpus) -> None:
    def rows(seed: int, step: int) -> bytes:
        return batch(corpus.train, SMALL, TINY.training, seed, step)[0].tobytes()

    assert rows(0, 3) == rows(0, 3)
    assert len({rows(0, 3), rows(0, 4), rows(1, 3), rows(1, 4)}) == 4
    many = replace(TINY.training, batch=400, recall_share=0.25)
    made, asked = batch(corpus.train, SMALL, many, 0, 3)
    share = np.mean([b"\n~" in row.tobytes() for row in made])
    assert share == pytest.approx(0.25, abs=0.1)
    assert share == asked.any(1).mean()
    for row, values in zip(made, asked, strict=True):
        for place in np.flatnonzero(values):
            line = row[place - 3 : place + 2].tobytes()
            assert line in row[: place - 3].tobytes()
            assert re.fullmatch(rb"\n~[a-zA-Z]{2}\n", line)


def test_windows_are_short_at_first_and_a_step_has_as_many_bytes(corpus: text.Corpus) -> None:
    early = replace(TINY.training, early_steps=2, early_context=32, recall_pairs=48, recall_share=1.0)
    found = [batch(corpus.train, SMALL, early, 0, step) for step in (1, 2)]
    assert [rows.shape for rows, _ in found] == [(2 * SMALL.context // 32, 33), (2, SMALL.context + 1)]
    assert {len(pairs) for pairs in map(lines, found[0][0])} == {1}


# -- rows of a trained model -----------------------------------------------------------------------------------


def test_attention_follows_from_the_rows_that_are_kept(corpus: text.Corpus) -> None:
    model = build(variant("dense", 2), SMALL, 0, CPU)
    window = on(text.spread(corpus.validation, 96, 1), CPU)
    made: list[tuple[Tensor, Tensor]] = []
    attention = model.blocks[1].attention
    hook = attention.register_forward_hook(lambda _, x, y: made.append((x[0], y)))  # type: ignore[operator, union-attr]
    q, k = qk.rows(model, window, [1])[1]
    hook.remove()
    ((x, y),) = made
    v = attention.v_proj(x).unflatten(-1, (SMALL.kv_heads, SMALL.head_dim))  # type: ignore[operator, union-attr]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention.o_proj(o.transpose(1, 2).flatten(2)), y)  # type: ignore[operator, union-attr]


def test_rows_are_asked_of_layers_with_a_softmax() -> None:
    window = torch.zeros(1, 64, dtype=torch.int64)
    with pytest.raises(ValueError, match="has 2, counted from 0"):
        qk.rows(build(variant("dense", 2), SMALL, 0, CPU), window, [2])
    with pytest.raises(ValueError, match="has no softmax"):
        qk.rows(build(variant("linear", 2), SMALL, 0, CPU), window, [0])


# -- the whole study -------------------------------------------------------------------------------------------


def test_train_convert_and_report(
    corpus: text.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    small = replace(TINY, shape=SMALL)
    monkeypatch.setitem(presets.PRESETS, "tiny", small)
    monkeypatch.setattr(text, "load", lambda folder: corpus)
    common = ["--preset", "tiny", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="--variants dense --seeds 0 first"):
        run.main([*common, "--convert", "spla2"])
    jobs = ["--variants", "dense", "--convert", "dense", "spla2", "--seeds", "0", "1"]
    assert run.main([*common, *jobs, "--seconds", "0"]) == 3
    assert not list(tmp_path.glob("*.json"))
    assert run.main([*common, *jobs]) == 0
    records = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    assert len(records) == 6
    assert run.main([*common, *jobs]) == 0  # nothing is left to do
    assert records == {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}

    figures = json.loads(records["tiny-dense-to-dense-seed0.json"])["figures"]
    before = json.loads(records["tiny-dense-seed0.json"])["figures"]
    assert figures["validation"][0][1] == before["validation"][-1][1]  # it goes on from those weights
    assert figures["text"]["digest"] == corpus.digest
    short = ["--steps", "3", "--conversion-steps", "1", "--shared"]
    assert run.main([*common[:-1], str(tmp_path / "short"), "--work", str(tmp_path / "other"), *jobs, *short]) == 0
    for name, steps in (("dense", 3), ("dense-to-spla2", 1)):
        figures_of = json.loads((tmp_path / "short" / f"tiny-{name}-seed0.json").read_text())["figures"]
        assert (figures_of["training"]["steps"], len(figures_of["loss"])) == (steps, steps)
        assert figures_of["step_ms"] is figures_of["tokens_per_s"] is None
    with pytest.raises(SystemExit):
        run.main([*common, *jobs, "--conversion-steps", "0"])
    qk.main([*common[:-1], str(tmp_path / "qk"), "--seed", "1", "--layers", "0", "1", "--pairs", "2"])
    q, _ = read_qk(tmp_path / "qk" / "dense-seed1-layer1.pt")
    assert q.shape[1] == SMALL.context
    capsys.readouterr()
    report.main(["--records", str(tmp_path), "--docs", str(tmp_path), "--preset", "tiny"])
    printed = capsys.readouterr().out
    assert "dense → spla2" in printed
    assert all((tmp_path / f"fidelity_{n}.png").stat().st_size > 10_000 for n in ("curves", "position", "recall"))


def test_what_a_residual_adds_is_against_the_same_weights_without_it(corpus: text.Corpus) -> None:
    models = {name: build(variant(name, SMALL.layers), SMALL, 3, CPU) for name in ("spla2", "sparse2")}
    gains = [p for n, p in models["spla2"].named_parameters() if n.endswith("gamma_r")]
    for p in gains:
        torch.nn.init.normal_(p)
    assert len(gains) == SMALL.layers
    kept = [p.clone() for p in gains]
    models["sparse2"].load_state_dict(models["spla2"].state_dict(), strict=False)
    alone = by_position(models["sparse2"], corpus.validation, SMALL.context, 2, CPU).mean().item()
    assert run.without_residual(models["spla2"], corpus, SMALL, 2) == pytest.approx(alone, abs=1e-6)
    assert by_position(models["spla2"], corpus.validation, SMALL.context, 2, CPU).mean().item() != pytest.approx(
        alone, abs=1e-4
    )
    assert all(torch.equal(p, x) for p, x in zip(gains, kept, strict=True))
    assert run.without_residual(models["sparse2"], corpus, SMALL, 2) is None


def test_an_empty_column_is_left_out() -> None:
    table = report.filled("title", [{"a": "1", "b": "", "c": ""}, {"a": "2", "b": "", "c": "3"}])
    assert [(c.header, list(c.cells)) for c in table.columns] == [("a", ["1", "2"]), ("c", ["", "3"])]


def test_the_share_of_a_gap_that_closes() -> None:
    def figures(*losses: float) -> report.Figures:
        return {"validation": list(enumerate(losses))}

    study = {
        "dense → dense": {0: figures(1.0, 0.9), 1: figures(2.0, 1.0)},
        "dense → spla2": {0: figures(1.4, 1.0), 1: figures(2.2, 1.05), 2: figures(9.0, 9.0)},
    }
    before, after, share = report.closed(study, "dense → spla2")
    assert before == pytest.approx([0.4, 0.2])
    assert after == pytest.approx([0.1, 0.05])
    assert share == pytest.approx([0.75, 0.75])
    assert report.over_seeds([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert report.over_seeds([1.0], 2) == "1.00"


def test_what_a_part_adds_is_told_at_seeds_that_both_models_have() -> None:
    def figures(loss: float, recalled: float) -> report.Figures:
        return {"validation": [[0, 5.0], [9, loss]], "recall": [[recalled, recalled]], "recall_lengths": [64]}

    study = {
        "sparse1": {0: figures(1.0, 0.1), 1: figures(2.0, 0.2), 2: figures(7.0, 0.0)},
        "sparse2": {0: figures(0.9, 0.5), 1: figures(1.7, 0.8)},
        "spla2": {1: figures(1.6, 0.9)},
    }
    table = report.contributions(study)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("residual, at order 2", "1", "-0.1000", "0.100"),
        ("order 2", "2", "-0.2000 ± 0.1414", "0.500 ± 0.141"),
    ]


def test_records_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    for seed, digest in ((0, "a"), (1, "b")):
        figures: report.Figures = {"job": {"variant": "dense", "seed": seed, "converted": False}}
        figures |= {"shape": {}, "training": {}, "text": {"digest": digest}, "sources": ""}
        record = {"figures": figures, "source_digest": "", "environment": {"gpu": None}}
        (tmp_path / f"tiny-dense-seed{seed}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="differ in text"):
        report.load(tmp_path, "tiny")
    with pytest.raises(FileNotFoundError, match="run first"):
        report.load(tmp_path, "h200")


# -- times of steps --------------------------------------------------------------------------------------------


def test_steps_that_are_timed_have_full_windows(corpus: text.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def seen(*given: Any) -> Any:
        made = batch(*given)
        shapes.append(made[0].shape)
        return made

    monkeypatch.setattr(train, "batch", seen)
    preset = replace(TINY, shape=SMALL, training=replace(TINY.training, chunk=2, early_steps=3))
    figures = speed.step_figures("dense", preset, corpus, CPU, 3)
    assert shapes == 8 * [(TINY.training.batch, SMALL.context + 1)]  # two chunks of two before, two for three steps
    assert figures["tokens_per_s"] * figures["step_ms"] == pytest.approx(1e3 * TINY.training.batch * SMALL.context)
    assert figures["gpu_ms"] is figures["peak_gib"] is None


def test_a_record_of_step_times_grows_until_something_else_changes(
    corpus: text.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(TINY, shape=SMALL))
    monkeypatch.setattr(text, "load", lambda folder: corpus)
    common = ["--preset", "tiny", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]

    def measured(steps: int, *names: str) -> dict[str, speed.Figures]:
        speed.main([*common, "--steps", str(steps), "--variants", *names])
        found = json.loads((tmp_path / "speed-tiny.json").read_text())["figures"]["variants"]
        assert isinstance(found, dict)
        return found

    first = measured(1, "sparse1")
    second = measured(1, "spla1", "sparse1")
    assert second.keys() == {"dense", "sparse1", "spla1"}
    assert {name: second[name] for name in first} == first
    assert measured(2).keys() == {"dense"}
    assert measured(2, "gla").keys() == {"dense", "gla"}
    monkeypatch.setattr(record, "source_digest", lambda: "other sources")
    assert measured(2, "linear").keys() == {"dense", "linear"}
    machine = record.environment()
    monkeypatch.setattr(record, "environment", lambda: machine | {"gpu": "another"})
    assert measured(2).keys() == {"dense"}
    with pytest.raises(FileNotFoundError, match="run first"):  # it is no record of a training
        report.load(tmp_path, "tiny")
    with pytest.raises(SystemExit):
        measured(0)


def test_step_times_are_told_over_the_dense_one() -> None:
    own = {"step_ms": 30.0, "tokens_per_s": 500_000.0, "gpu_ms": None, "peak_gib": None}
    table = report.steps({"variants": {"spla1": own, "dense": own | {"step_ms": 20.0, "gpu_ms": 12.5}}})
    assert {str(c.header): list(c.cells) for c in table.columns} == {
        "attention": ["dense", "spla1"],
        "step, ms": ["20.0", "30.0"],
        "over dense": ["1.00", "1.50"],
        "GPU busy, ms": ["12.5", ""],
        "tokens/s": ["500,000", "500,000"],
    }


@pytest.mark.gpu
def test_a_gpu_is_busy_for_no_longer_than_a_step(corpus: text.Corpus, device: torch.device) -> None:
    figures = speed.step_figures("dense", replace(TINY, shape=SMALL), corpus, device, 10)
    assert 0 < figures["gpu_ms"] < figures["step_ms"]
    assert figures["peak_gib"] > 0


def test_the_digest_of_a_training_covers_what_it_goes_through() -> None:
    folder = Path(run.__file__).parent
    reached, left = set[str](), {"run"}
    while left:
        reached.add(name := left.pop())
        for line in (folder / f"{name}.py").read_text(encoding="utf-8").splitlines():
            if found := re.match(r"\s*from examples\.fidelity(?:\.(\w+))? import (.+)", line):
                left |= ({found[1]} if found[1] else {*found[2].split(", ")}) - reached
    assert sorted(reached) == [*run.OF_A_TRAINING]
