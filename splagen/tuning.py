"""Libraries that run with tuned Schedules: loaded with those that were found, or tuned now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from splagen import settings
from splagen.autotune import tuner
from splagen.autotune.device import this_device
from splagen.autotune.search import EFFORTS, Progress
from splagen.autotune.tuned import TunedSchedules
from splagen.autotune.tuner import Target, Tuned
from splagen.codegen.compile import Module
from splagen.errors import InputError
from splagen.pipeline import (
    DecodingLibrary,
    Library,
    decode_kernels,
    generate,
    generate_decoding,
    generate_packed,
    kernels,
    need_op,
)
from splagen.spec import Spec, SPLASpec
from splagen.verification import DTYPES, Shape


def load(spec: Spec) -> Callable[..., Any]:
    """The op of a spec, generated under the cache directory and imported; it takes the Schedules that were tuned.

    Raises as `generate`.
    """
    library = generate(spec, settings.cache_dir() / "kernels")
    _take_tuned(library, TunedSchedules(spec))
    return library.op


def capacity(spec: Spec, shape: Shape) -> Shape:
    """Sequences, heads and the tokens for which a cache made for this shape has pages."""
    page = decode_kernels(spec).default_page_size
    return (*shape[:2], -(-shape[2] // page) * page)


def load_decoding(spec: Spec, *, page_type: str = "input") -> DecodingLibrary:
    """The step of a spec, generated under the cache directory; it takes the Schedules that were tuned.

    Raises:
        InputError: an unknown type of pages.
        SpecError: a query of the spec depends on later tokens, or the spec is of SSE.
    """
    library = generate_decoding(spec, settings.cache_dir() / "kernels", page_type=page_type)
    _take_tuned(library, TunedSchedules(spec, kernels=partial(decode_kernels, page_type=page_type)))
    return library


def load_packed(spec: SPLASpec) -> Callable[..., Any]:
    """The op on packed sequences, generated under the cache directory and imported.

    It takes the Schedules that were tuned for the op of a batch of as many sequences of max_seqlen tokens.
    """
    library = generate_packed(spec, settings.cache_dir() / "kernels")
    _take_tuned(library, TunedSchedules(spec))
    return library.op


def _take_tuned(library: Library, tuned: TunedSchedules) -> None:
    """Let a module look for tuned Schedules; the interpreter has none."""
    if not settings.interpreted():
        vars(library.module)["TUNED"] = tuned


def tune(
    library: Library | Spec,
    *,
    shapes: Sequence[Shape],
    dtype: torch.dtype = torch.bfloat16,
    effort: str = "quick",
    seconds: float | None = None,
    jobs: int | None = None,
    force: bool = False,
    alike: float = 0.0,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[Tuned]:
    """Find the fastest Schedules at shapes (B, H, L) on this GPU, or take them from the cache; the library uses them.

    Of a library of decoding, B are sequences, H heads of queries and L the tokens that a sequence of a cache may get;
    an `SPLACache` that is made afterwards has the splits that were found.

    Args:
        library: a generated library, or a spec.
        shapes: one tuning for each, which serves all sizes that round up to the same powers of two.
        dtype: of q, k and v.
        effort: "quick" or "full".
        seconds: no measurement of a shape starts later than this; None is the effort's, 70 or 540.
        jobs: compilers side by side, None is one per CPU.
        force: search again where the cache has an answer.
        alike: 0 to 1, how much neighbouring queries have in common in what is timed.  With 0, nothing relates them;
            with 0.9 two neighbours choose 6 in 10 blocks of 64 keys alike, with 0.98 8 in 10.  It decides which
            strategy of SPLA is the fastest.  Above 0 the search is always a new one; later calls take what it found.
        progress: told after each measurement.

    Raises:
        InputError: there is no GPU, an unknown effort or dtype, `alike` out of range or for SSE, or a library of
            packed sequences or of prefill.
        TuningError: a measurement failed for no reason that a Schedule explains.
        WrongResult: the Schedules that were chosen do not agree with the oracle.
    """
    if not isinstance(library, Library):
        library = generate(library, settings.cache_dir() / "kernels")
    need_op(library, "tune the op of its spec: packed calls take its Schedules")
    decodes = library.part if isinstance(library, DecodingLibrary) else None
    if effort not in EFFORTS:
        raise InputError(f"unknown effort {effort!r}", f"one of {', '.join(EFFORTS)}")
    names = {d: n for n, d in DTYPES.items()}
    if dtype not in names:
        raise InputError(f"unknown dtype {dtype}", f"one of {', '.join(map(str, names))}")
    if not 0 <= alike <= 1 or (alike and (decodes or library.spec.kind == "sse")):
        hint = "0 to 1, and 0 for sse, where no query chooses blocks, and for decoding, where each chooses alone"
        raise InputError(f"alike = {alike} of a spec of kind {library.spec.kind}", hint)
    device = this_device()
    part: Module = decodes or kernels(library.spec)
    found = []
    for shape in (capacity(library.spec, s) for s in shapes) if decodes else shapes:
        target = Target(library.spec, part, library.path, shape, names[dtype], device, alike)
        options: dict[str, Any] = {"effort": EFFORTS[effort], "seconds": seconds, "jobs": jobs, "force": force}
        found.append(tuner.tune(target, library.module, progress=progress, **options))
    vars(library.module)["TUNED"] = TunedSchedules(library.spec, kernels=lambda _: part)
    return found
