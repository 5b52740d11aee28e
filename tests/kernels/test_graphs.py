"""Calls on a GPU in CUDA graphs and on several streams: what is repeated reads and writes its own call's memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splagen import pipeline
from splagen.kinds import oracle
from splagen.library import taylor
from splagen.spec import Select, SPLASpec, to_toml
from splagen.verification import random_inputs

SPECS = {
    "residual": SPLASpec(
        head_dim=64, group_size=4, select=Select(block_size=64, budget=3, metric=taylor(covariance="diag"))
    ),
    "no selection": SPLASpec(head_dim=64, group_size=2, select=None, linear=None),
}
STRATEGIES = [(name, i) for name, spec in SPECS.items() for i in range(3 if spec.select else 1)]
Call = Callable[[dict[str, Tensor]], list[Tensor]]


@pytest.fixture(params=STRATEGIES, ids=lambda p: f"{p[0]}, strategy {p[1]}")
def call(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Call, SPLASpec]:
    """The op and its gradients, by one of its strategies."""
    name, strategy = request.param
    spec = SPECS[name]
    module, part = pipeline.generate(spec, tmp_path).module, oracle(to_toml(spec)).partition
    if part.strategies and strategy >= max(len(c.options) for c in part.strategies):
        pytest.skip("there is no such strategy")
    chosen = {c.name: {"strategy": min(strategy, len(c.options) - 1)} for c in part.strategies}
    schedules_for = module.schedules_for
    monkeypatch.setattr(module, "schedules_for", lambda q: schedules_for(q) | chosen)
    names = [a.name for a in part.inputs]

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        inputs = [given[n].detach().requires_grad_() for n in names]
        o = getattr(module, spec.name)(*inputs[:3], **dict(zip(names[3:], inputs[3:], strict=True)))
        return [o.detach(), *torch.autograd.grad(o, inputs, given["do"])]

    return run, spec


def given(spec: SPLASpec, seed: int) -> dict[str, Tensor]:
    truth = oracle(to_toml(spec))
    found = random_inputs(truth, (2, 2 * spec.group_size, 1000), torch.bfloat16, "cuda", seed)
    return found | {"do": next(found[a.name] for a in truth.partition.cotangents)}


@pytest.mark.gpu
def test_a_captured_graph_gives_what_a_call_gives_on_other_values(call: tuple[Call, SPLASpec]) -> None:
    run, spec = call
    static, other = given(spec, 0), given(spec, 1)
    want = [[x.clone() for x in run(g)] for g in (static, other)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(static)
    for values, right in ((other, want[1]), (given(spec, 0), want[0])):
        for name, x in values.items():
            static[name].copy_(x)
        graph.replay()
        run(given(spec, 2))  # takes none of the graph's memory
        assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


@pytest.mark.gpu
def test_calls_on_two_streams_do_not_share_memory(call: tuple[Call, SPLASpec]) -> None:
    run, spec = call
    inputs = [given(spec, seed) for seed in (0, 1)]
    want = [run(g) for g in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[Tensor]] = []
    torch.cuda.synchronize()
    for _ in range(8):
        for stream, g in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(g))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert all(torch.equal(x, y) for x, y in zip(results, want[i % 2], strict=True))


@pytest.mark.gpu
def test_a_repeated_call_does_not_wait_for_the_device(call: tuple[Call, SPLASpec]) -> None:
    run, spec = call
    inputs = given(spec, 0)
    run(inputs), run(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
