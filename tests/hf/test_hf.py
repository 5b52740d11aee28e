"""Llama and Qwen3 of transformers with SPLA: conversion, generation, saving, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splagen
from splagen.errors import InputError, SpecError
from tests.hf.models import llama, qwen3

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("splagen.hf")

VOCABULARY, LENGTH = 64, 70
SELECT = splagen.Select(block_size=16, budget=1, sinks=1, local=0)
SPEC = splagen.SPLASpec(head_dim=16, group_size=2, select=SELECT, combine="rms_residual")
ALL = replace(SPEC, select=replace(SELECT, budget=3))  # 5 blocks of 16 hold every key of LENGTH
UNROTATED = replace(
    SPEC,
    select=replace(SELECT, own_rows=True),
    linear=splagen.Residual(own_rows=True, temperature=True),
    combine="gate",
)
MODELS = {"llama": llama, "qwen3": qwen3}


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def stir(model: nn.Module) -> None:
    """Learned inputs of the branches as after training."""
    for name, p in model.named_parameters():
        if ".splagen." in name:
            nn.init.normal_(p, std=0.5)


# -- conversion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("combine", ["add", "rms_residual", "gate"])
def test_conversion_keeps_the_function_while_every_block_is_exact(
    model: Callable[[], Any], combine: str, folder: Path
) -> None:
    dense, ids = model(), tokens()
    want = logits(dense, ids)
    converted = hf.convert(dense, replace(ALL, combine=combine), folder=folder)
    assert converted is dense
    torch.testing.assert_close(logits(converted, ids), want, atol=1e-10, rtol=1e-8)
    stir(converted)
    if combine != "gate":  # of which g_s is no longer 1
        torch.testing.assert_close(logits(converted, ids), want, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("combine", ["rms_residual", "gate"])
def test_beyond_the_budget_conversion_starts_as_block_sparse_attention(combine: str, folder: Path) -> None:
    ids = tokens()
    dense = logits(llama(), ids)
    sparse = logits(hf.convert(llama(), replace(SPEC, linear=None, combine="none"), folder=folder), ids)
    model = hf.convert(llama(), replace(SPEC, combine=combine), folder=folder)
    torch.testing.assert_close(logits(model, ids), sparse, atol=1e-10, rtol=1e-8)
    assert (sparse - dense)[:, -1].abs().max() > 1e-4
    assert torch.allclose(sparse[:, :32], dense[:, :32])
    stir(model)
    assert (logits(model, ids) - sparse)[:, -1].abs().max() > 1e-4


def test_a_spec_has_the_sizes_of_its_model() -> None:
    assert hf.spec_for(llama(), select=SELECT) == SPEC
    assert hf.spec_for(qwen3(), select=SELECT, linear=None) == replace(SPEC, linear=None, combine="none")
    assert hf.spec_for(llama(), combine="gate").combine == "gate"


def test_learned_inputs_get_gradients(folder: Path) -> None:
    model, ids = hf.convert(qwen3(), UNROTATED, folder=folder), tokens(1)
    stir(model)
    model(ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if ".splagen." in n}
    assert {n.rsplit(".", 1)[1] for n in found} == {"temperature", "gate_bias"}
    assert all(g is not None and g.abs().max() > 1e-12 for g in found.values())


def test_rows_of_their_own_are_those_before_rope(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hf.convert(llama(), UNROTATED, folder=folder), tokens(1)
    module = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}
    op = module.splagen_generated.op

    def spy(**inputs: Tensor) -> Tensor:
        if not seen:  # the first layer
            seen.update(inputs)
        return op(**inputs)  # type: ignore[no-any-return]

    monkeypatch.setattr(module.splagen_generated, "op", spy)
    hidden: list[Tensor] = []
    module.register_forward_pre_hook(lambda m, a, k: hidden.append(k.get("hidden_states", *a[:1])), with_kwargs=True)
    logits(model, ids)
    for name, projection in (("q", module.q_proj), ("k", module.k_proj)):
        plain = projection(hidden[0]).unflatten(-1, (-1, 16))
        for branch in ("m", "r"):
            torch.testing.assert_close(seen[f"{name}_{branch}"], plain, atol=1e-5, rtol=1e-4)
        assert (seen[name] - plain).abs().max() > 1e-2


# -- the attention implementation alone --------------------------------------------------------------------------


def test_a_config_with_a_spec_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(folder))
    ids = tokens()
    want = logits(hf.convert(llama(), replace(SPEC, combine="add"), folder=folder), ids)
    config = llama().config
    config.splagen = splagen.to_toml(replace(SPEC, combine="add"))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="splagen").double().eval()
    model.load_state_dict(llama().state_dict())
    torch.testing.assert_close(logits(model, ids), want, atol=1e-10, rtol=1e-8)


def test_a_new_model_takes_any_combination(folder: Path) -> None:
    config = llama().config
    config.splagen = splagen.to_toml(replace(SPEC, combine="rms"))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="splagen").double()
    with pytest.raises(InputError, match=r"learned inputs(.|\n)*attach"):
        model(tokens())
    hf.attach(model, folder=folder)
    names = [n for n, _ in model.named_parameters() if ".splagen." in n]
    assert len(names) == 2 * config.num_hidden_layers
    assert logits(model, tokens()).isfinite().all()


# -- generation ------------------------------------------------------------------------------------------------


def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Each token from the whole sequence before it."""
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("spec", [pytest.param(SPEC, marks=pytest.mark.slow), UNROTATED], ids=["rms_residual", "gate"])
def test_generate_is_greedy_recomputation(spec: splagen.SPLASpec, folder: Path) -> None:
    model, ids = hf.convert(qwen3(), spec, folder=folder), tokens(2, 62)
    stir(model)
    got = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("fast_sort")
def test_generate_through_steps_is_greedy_recomputation(folder: Path) -> None:
    model, ids = hf.convert(llama(layers=1).float(), SPEC, folder=folder), tokens(1, 50)
    stir(model)
    got = model.generate(
        ids, past_key_values=hf.SplagenCache(model.config, 53, folder=folder), max_new_tokens=3, do_sample=False
    )
    assert torch.equal(got, greedy(model.double(), ids, 3))


@pytest.mark.usefixtures("fast_sort")
def test_steps_give_the_logits_of_the_whole(folder: Path) -> None:
    """Two calls on one cache, own rows and gates included: positions and queries go to their places."""
    model, ids = hf.convert(llama(layers=1).float(), UNROTATED, folder=folder), tokens(1, 3)
    stir(model)
    cache = hf.SplagenCache(model.config, 4, folder=folder)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([2, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1).double(), logits(model.double(), ids), atol=1e-4, rtol=1e-3)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(InputError, match="beam search"):
        cache.reorder_cache(torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_generate_on_a_gpu_is_greedy_recomputation(model: Callable[[], Any], folder: Path) -> None:
    """Through the kernels, with a plain cache and in steps; float32, so that no tie decides."""
    converted = hf.convert(model().float().cuda(), SPEC, folder=folder)
    stir(converted)
    ids = tokens(2, 90).cuda()
    want = greedy(converted, ids, 20)
    assert torch.equal(converted.generate(ids, max_new_tokens=20, do_sample=False), want)
    cache = hf.SplagenCache(converted.config, 110, folder=folder)
    assert torch.equal(converted.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False), want)


@pytest.mark.slow
def test_one_graph_serves_every_length(folder: Path) -> None:
    model = hf.convert(llama(), UNROTATED, folder=folder)
    stir(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (LENGTH, 51):
        ids = tokens(1, length)
        with torch.no_grad():
            got = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(got, logits(model, ids))


# -- saving ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path, folder: Path) -> None:
    model, ids = hf.convert(llama(), UNROTATED, folder=folder), tokens()
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"config\.splagen is missing"):
        hf.from_pretrained(tmp_path / "dense")


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, combine="rms"), "would change"),
        (replace(SPEC, head_dim=32, value_dim=32, scale=0.25), "head_dim is 32, the model's 16"),
        (replace(SPEC, group_size=4), "group_size is 4, the model's 2"),
        (replace(SPEC, scale=0.5), "scale is 0.5"),
        (replace(SPEC, value_dim=32), "value_dim is 32"),
        (replace(SPEC, causal=False), "causal"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec: splagen.SPLASpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        hf.convert(llama(), spec)


def test_a_model_that_does_not_fit_is_refused() -> None:
    plain = nn.Linear(2, 2)
    plain.config = llama().config
    with pytest.raises(InputError, match="attention interface"):
        hf.convert(plain, SPEC)
    windowed = qwen3(use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with pytest.raises(InputError, match="within a window of 32"):
        hf.convert(windowed, SPEC)
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(InputError, match="before RoPE"):
        hf.convert(scaled, UNROTATED)


def test_inputs_that_do_not_fit_are_refused(folder: Path) -> None:
    model, ids = hf.convert(llama(), SPEC, folder=folder), tokens()
    mask = torch.ones_like(ids)
    torch.testing.assert_close(logits(model, ids), model(ids, attention_mask=mask).logits)
    mask[0, 0] = 0
    with pytest.raises(InputError, match="hides tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(InputError, match="mask tensor"):
        model(ids, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64))
    positions = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)])[None]
    with pytest.raises(InputError, match="rise by one"):
        model(ids, position_ids=positions)
    static = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 5)
    with pytest.raises(InputError, match="StaticCache"):
        model(ids, past_key_values=static)
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(InputError, match="dropout"):
        model.train()(ids)
