"""What a key depends on: every change that can change a kernel is a change of its key."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from splagen import pipeline
from splagen.autotune import key
from splagen.autotune.device import DEVICES
from splagen.autotune.key import Bucket, Key, key_of, template_digest
from splagen.codegen.render import template_directory
from splagen.errors import InputError
from splagen.spec import SPLASpec, read_spec
from splagen.sse_spec import SSESpec
from tests.autotune.examples import KEY

H200 = DEVICES["NVIDIA H200"]
SPEC = read_spec(Path(__file__).parents[2] / "examples/specs/small.toml")


@pytest.mark.parametrize(
    ("spec", "shape", "bucket"),
    [
        (SPLASpec(group_size=4), (1, 32, 8192), Bucket(8192, 8)),
        (SPLASpec(group_size=4), (2, 16, 8191), Bucket(8192, 8)),
        (SPLASpec(group_size=4), (1, 4, 1), Bucket(1, 1)),
        (SPLASpec(group_size=4), (3, 12, 4097), Bucket(8192, 16)),
        (SSESpec(group_size=2), (2, 6, 4096), Bucket(8192, 8)),
    ],
)
def test_buckets_are_powers_of_two(spec: SPLASpec | SSESpec, shape: tuple[int, int, int], bucket: Bucket) -> None:
    assert Bucket.of(spec, shape) == bucket


@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 6, 8), (1, 4, -1)])
def test_what_is_no_shape_has_no_bucket(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="multiple of 4"):
        Bucket.of(SPLASpec(group_size=4), shape)


def test_the_key_of_a_kernel_is_the_same_each_time_and_differs_between_kernels() -> None:
    kernels = pipeline.kernels(SPEC).kernels
    made = [key_of(SPEC, k, "bf16", Bucket(1024, 2), H200) for k in kernels]
    assert made == [key_of(SPEC, k, "bf16", Bucket(1024, 2), H200) for k in pipeline.kernels(SPEC).kernels]
    assert len({k.digest for k in made}) == len(kernels)
    assert {k.gpu for k in made} == {"NVIDIA H200"}
    with pytest.raises(InputError, match="one of bf16, fp16, fp32"):
        key_of(SPEC, kernels[0], "fp8", Bucket(1024, 2), H200)


def test_a_kernel_whose_text_changes_has_another_source() -> None:
    kernel = next(k for k in pipeline.kernels(SPEC).kernels if k.template == "rows")
    changed = replace(kernel, holes={**kernel.holes, "body": f"{kernel.holes['body']}\ntl.debug_barrier()"})
    moved = replace(kernel, grid=kernel.grid + " ")
    keys = [key_of(SPEC, k, "bf16", Bucket(1, 1), H200) for k in (kernel, changed, moved)]
    assert keys[0].differs(keys[1]) == ("source",)
    assert keys[0].differs(keys[2]) == ("source",)


@pytest.mark.parametrize(
    ("template", "kernel", "changes"),
    [
        ("score_topk", "score_topk", True),
        ("merge_topk", "score_topk", True),  # a device function that the kernel calls
        ("merge_topk", "score_lse", False),
        ("dot_split", "read_dv_all", True),
        ("score_lse", "score_topk", False),
    ],
)
def test_a_changed_template_changes_the_kernels_that_use_it(
    template: str, kernel: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next(k for k in pipeline.kernels(SPEC).kernels if k.name == kernel)
    before = template_digest(found)
    read = key._template
    monkeypatch.setattr(key, "_template", lambda name: read(name) + "# new" * (name == template))
    assert (template_digest(found) != before) is changes


def test_functions_of_functions_count() -> None:
    """decayed_scores calls decay_reach."""
    assert "decay_reach(" in (template_directory() / "decayed_scores.jinja").read_text()
    found = next(k for k in pipeline.kernels(SSESpec(head_dim=16)).kernels if k.name == "output1")
    seen: list[str] = []
    read = key._template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key, "_template", lambda name: seen.append(name) or read(name))  # type: ignore[func-returns-value]
        template_digest(found)
    assert {"chunk_loop", "decayed_scores", "decay_reach"} <= set(seen)


@pytest.mark.parametrize("name", list(asdict(KEY)))
@pytest.mark.parametrize("value", [None, "", 0, -1, 1.5, True, "a\x1b[2J", "\ud800", "a\nb", [], {}, "x" * 301, 2**62])
def test_a_key_refuses_what_is_no_value_of_its_field(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} of a tuned"):
        Key(**{**asdict(KEY), name: value})
