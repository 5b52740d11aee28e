"""The example model learns, its text is split cleanly, and its q, k, v have the shapes that ops want."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import byte_lm
from examples.real_qkv import real_qkv

SMALL = byte_lm.Training(steps=20, batch=4, lr=3e-3, validate_every=10, validation_windows=2)


@pytest.fixture(scope="module")
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    return byte_lm.load_text()


def test_loss_falls_within_twenty_steps(texts: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = byte_lm.build(byte_lm.TINY, 0, torch.device("cpu"))
    curves = byte_lm.train(model, texts, SMALL, report=lambda line: None)
    assert curves["loss"][0] == pytest.approx(5.55, abs=0.1)  # log 256: it starts by knowing nothing
    assert curves["loss"][-1] < 4.0
    steps, held_out = zip(*curves["validation"], strict=True)
    assert steps == (0, 10, 20)
    assert held_out[0] > held_out[1] > held_out[2]


def test_two_runs_are_equal(texts: tuple[torch.Tensor, torch.Tensor]) -> None:
    short = byte_lm.Training(steps=2, batch=2, validation_windows=1)
    runs = [
        byte_lm.train(byte_lm.build(byte_lm.TINY, 3, torch.device("cpu")), texts, short, lambda line: None)
        for _ in range(2)
    ]
    assert runs[0]["loss"] == runs[1]["loss"]


def test_the_model_is_causal() -> None:
    model = byte_lm.build(byte_lm.TINY, 0, torch.device("cpu"))
    tokens = torch.randint(256, (1, 40))
    changed = tokens.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert (before[:, 30:] != after[:, 30:]).any()


def test_the_split_is_disjoint_and_about_95_to_5() -> None:
    sources = [file.read_bytes() for file in byte_lm.library_files()]
    train, held_out = (set(text.split(b"\0")) - {b""} for text in byte_lm.split(sources))
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == set(sources) - {b""}
    assert 0.02 < len(held_out) / len(train | held_out) < 0.10


def test_the_side_of_a_file_does_not_depend_on_the_others() -> None:
    sources = [bytes([65 + i]) * 3 for i in range(26)]
    train, held_out = byte_lm.split(sources)
    for source in sources:
        alone_train, alone_held_out = byte_lm.split([source])
        assert (alone_train in train, alone_held_out in held_out) == (True, True)
        assert bool(alone_train) != bool(alone_held_out)


def test_held_out_windows_lie_inside_the_text() -> None:
    text = torch.arange(1000).to(torch.uint8)
    starts = byte_lm.held_out_starts(text, 256, 7)
    tokens, targets = byte_lm.windows(text, starts, 256, torch.device("cpu"))
    assert tokens.shape == targets.shape == (7, 256)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert starts[-1] + 256 + 1 == len(text)


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    training = byte_lm.Training()
    rates = [training.lr_at(step) for step in range(training.steps)]
    assert max(rates) == training.lr == rates[training.warmup - 1]
    assert rates[0] < rates[1]
    assert rates[-1] == pytest.approx(0.1 * training.lr, rel=0.01)


def test_the_command_line_writes_a_record_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--attention", "dense", "--tiny", "--steps", "2", "--batch", "2", "--device", "cpu"]
    byte_lm.main([*arguments, "--plot", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "byte_lm_dense.json").read_text())
    assert len(record["figures"]["loss"]) == 2
    assert record["figures"]["config"]["attention"] == "dense"
    assert {"source_digest", "environment"} <= record.keys()
    assert (tmp_path / "byte_lm.png").stat().st_size > 10_000


def test_real_q_k_v_have_the_shapes_asked_for() -> None:
    q, k, v = real_qkv(100, q_heads=6, kv_heads=2, head_dim=32, layer=0)
    assert q.shape == (1, 100, 6, 32)
    assert k.shape == v.shape == (1, 100, 2, 32)
    assert all(x.is_contiguous() and x.isfinite().all() and not x.requires_grad for x in (q, k, v))
    with pytest.raises(ValueError, match="bytes"):
        real_qkv(10**9)
    with pytest.raises(ValueError, match="multiple"):
        real_qkv(10, q_heads=3, kv_heads=2)


def test_training_moves_real_q_k_v() -> None:
    untrained, trained = real_qkv(64), real_qkv(64, steps=2)
    assert not torch.equal(untrained[0], trained[0])


def test_the_generated_op_gets_the_models_q_k_v_and_undecayed_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    def op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, gamma_s: torch.Tensor, gamma_r: torch.Tensor
    ) -> torch.Tensor:
        assert q.shape == (1, 8, 4, 16)
        assert k.shape == v.shape == (1, 8, 1, 16)
        return v.expand_as(q) * (gamma_s + gamma_r)

    monkeypatch.setattr(byte_lm, "_generated", lambda config: op)
    spla = byte_lm.build(replace(byte_lm.TINY, attention="spla"), 0, torch.device("cpu"))
    dense = byte_lm.build(byte_lm.TINY, 0, torch.device("cpu"))
    byte_lm.loss_of(spla, *torch.randint(256, (2, 1, 8))).backward()
    gains = {name: p for name, p in spla.named_parameters() if "gamma" in name}
    assert len(gains) == 4
    assert all(p.shape == (4, 16) and p.eq(1).all() and p.grad is not None for p in gains.values())
    undecayed = byte_lm.optimizer(spla, SMALL).param_groups[1]["params"]
    assert {id(p) for p in gains.values()} <= {id(p) for p in undecayed}
    for name, weight in dense.named_parameters():
        assert torch.equal(weight, spla.get_parameter(name)), name
