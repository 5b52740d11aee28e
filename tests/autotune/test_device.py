"""Known GPUs, and what an unknown one is taken for."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch

from splagen.autotune import device
from splagen.autotune.device import DEVICES, this_device
from splagen.codegen.schedule import TARGETS
from splagen.errors import InputError


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, major: int, *, hip: str | None = None, **known: int) -> None:
    found = SimpleNamespace(name=name, major=major, minor=0, **{"multi_processor_count": 100, **known})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    device._say_once.cache_clear()


def test_every_target_has_a_known_device() -> None:
    assert {d.arch for d in DEVICES.values()} == set(TARGETS)
    assert all(d.shared_bytes == TARGETS[d.arch].shared_bytes for d in DEVICES.values())


def test_a_known_gpu_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H200", 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert this_device() == DEVICES["NVIDIA H200"]


@pytest.mark.parametrize(
    ("name", "major", "hip", "like"),
    [
        ("NVIDIA H100 PCIe", 9, None, "NVIDIA H200"),
        ("NVIDIA A10", 8, None, "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA RTX PRO 6000", 12, None, "NVIDIA B200"),
        ("Tesla V100", 7, None, "NVIDIA B200"),
        ("AMD Instinct MI355X", 9, "6.4", "AMD Instinct MI300X"),
    ],
)
def test_an_unknown_gpu_takes_the_nearest_architecture_and_says_so_once(
    name: str, major: int, hip: str | None, like: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, name, major, hip=hip, shared_memory_per_block_optin=99 << 10, regs_per_multiprocessor=65536)
    with pytest.warns(UserWarning, match=f"does not know {name}.*{like}"):
        found = this_device()
    assert (found.name, found.arch, found.bandwidth) == (name, DEVICES[like].arch, DEVICES[like].bandwidth)
    assert (found.sms, found.shared_bytes, found.registers) == (100, 99 << 10, 65536)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert this_device() == found


def test_without_a_gpu_the_known_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="NVIDIA H200, "):
        this_device()


@pytest.mark.parametrize(("major", "hip"), [(7, None), (8, None), (9, None), (10, None), (12, None), (9, "6.4")])
def test_generated_modules_choose_the_same_architecture(
    major: int, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splagen.codegen.render import render

    text = render("device_choice", {"sizes_from": "q"}).partition("INTERPRETED")[0]
    schedules = {arch: {"bf16": arch} for arch in TARGETS}
    scope = {"functools": functools, "torch": torch, "SCHEDULES": schedules, "bucket": lambda _: (1, 1)}
    exec(text, scope)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    q = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)
    assert scope["schedules_for"](q) == device.nearest_arch(major, hip=hip is not None)
