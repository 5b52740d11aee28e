"""The serving example: what comes out is what prefill of each whole sequence gives."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from examples.byte_lm import TINY, ByteLM, Config, attention_spec, build
from examples.serving import Request, Server, requests_of
from splagen import settings
from splagen.errors import InputError
from splagen.pipeline import generate, generate_decoding
from tests.kernels.decoding import change_schedules

SPARSE = replace(TINY, layers=1, q_heads=1, attention="spla", block_size=16, budget=1)


@pytest.fixture(autouse=True)
def _kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))


def prefilled(model: ByteLM, request: Request, answer: bytes) -> bytes:
    """The byte that prefill chooses at every step, given the bytes of the answer before it."""
    text = torch.tensor([[*request.prompt, *answer]], device=model.head.weight.device)
    with torch.no_grad():
        best = model(text)[0].argmax(-1).tolist()
    return bytes(best[len(request.prompt) - 1 : -1])


def test_served_bytes_are_those_of_prefill(fast_sort: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of several lengths in fewer slots and pages than they need together, float32."""
    model = build(SPARSE, 0, torch.device("cpu"))
    requests = [Request(bytes(range(60, 60 + n)), count) for n, count in ((66, 3), (1, 3), (17, 2))]
    decode = generate_decoding(attention_spec(SPARSE), settings.cache_dir() / "kernels")
    few = {"score": 2, "attend": 2, "chunk": 512}  # programs are slow in the interpreter
    change_schedules(decode, monkeypatch, splitting=few)
    server = Server(model, slots=2, longest=69, pages=7)
    answers = server.serve(requests)
    assert server.most_at_once == 2
    assert all(len(cache._free) == 7 and cache.seqlens.tolist() == [-1, -1] for cache in server.caches)
    module: ModuleType = generate(attention_spec(SPARSE), settings.cache_dir() / "kernels").module
    monkeypatch.setattr(module, "runs_kernels", lambda q: False)  # prefill by the equations
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer) == request.count
        assert prefilled(model, request, answer) == answer


def test_requests_that_never_fit_are_refused() -> None:
    server = Server(build(SPARSE, 0, torch.device("cpu")), slots=1, longest=64, pages=3)
    for request, message in (
        (Request(b"", 3), "0 \\+ 3 bytes"),
        (Request(b"abc", 62), "3 \\+ 62 bytes"),
        (Request(b"abc", 50), "3 are free"),
    ):
        with pytest.raises(InputError, match=message):
            server.serve([request])


def test_requests_have_many_lengths() -> None:
    requests = requests_of(64, 100)
    assert len({len(r.prompt) for r in requests}) > 30
    assert all(r.prompt and r.count and len(r.prompt) + r.count <= 100 for r in requests)
    assert requests == requests_of(64, 100)


@pytest.mark.gpu
def test_64_requests_on_a_gpu(device: torch.device) -> None:
    config = Config(layers=2, q_heads=4, kv_heads=2, attention="spla", block_size=16, budget=2)
    model = build(config, 0, device)
    requests = requests_of(64, 400)
    server = Server(model, slots=16, longest=400, pages=160)
    answers = server.serve(requests)
    assert server.most_at_once > 4
    for request, answer in zip(requests, answers, strict=True):
        assert prefilled(model, request, answer) == answer
