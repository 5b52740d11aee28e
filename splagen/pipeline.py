"""The whole pipeline on one screen: spec -> Program -> passes -> kernels -> source -> op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, overload

import torch

from splagen import packed_verification, settings
from splagen.autotune import tuner
from splagen.autotune.device import this_device
from splagen.autotune.search import EFFORTS, Progress
from splagen.autotune.tuned import TunedSchedules
from splagen.autotune.tuner import Target, Tuned
from splagen.codegen.compile import Module
from splagen.codegen.decode_module import decode_module_text, stem
from splagen.codegen.decoding import Decoding, decoding
from splagen.codegen.files import import_file, write_generated
from splagen.codegen.packed_module import packed_module_text
from splagen.codegen.packed_partition import PackedPartition, packed_partition
from splagen.codegen.partition import Partition
from splagen.codegen.prefill_module import prefill_module_text
from splagen.codegen.prefill_partition import PrefillPartition, prefill_partition
from splagen.codegen.sequence_partition import SequencePartition
from splagen.codegen.step_rows import PageType
from splagen.errors import InputError, SpecError
from splagen.ir.check import check
from splagen.ir.passes import Pass, run
from splagen.ir.program import Program
from splagen.kinds import kind_of, oracle
from splagen.spec import Spec, SPLASpec, digest, to_toml
from splagen.sse_spec import SSESpec
from splagen.verification import DTYPES, Report, Shape


@dataclass(frozen=True)
class Library:
    """A generated module on disk."""

    spec: Spec
    path: Path

    @property
    def module(self) -> ModuleType:
        """The module, imported once per process and content."""
        return _imported(self.path)

    @property
    def op_name(self) -> str:
        """What the op is called in the module."""
        return self.spec.name

    @property
    def op(self) -> Callable[..., Any]:
        """The differentiable torch op of the spec."""
        return getattr(self.module, self.op_name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class DecodingLibrary(Library):
    """A generated module of decoding steps on disk."""

    spec: SPLASpec

    @property
    def part(self) -> Decoding:
        """The kernels and arrays of the module."""
        return decoding(self.spec, self.module.PAGE_TYPE)

    @functools.cached_property
    def prefill(self) -> PrefillLibrary:
        """The module of prefill on a cache, written beside this one when it is first asked for."""
        return generate_prefill(self.spec, self.path.parent)

    @property
    def op_name(self) -> str:
        """Its op is the step: a few tokens per sequence of a cache."""
        return f"{self.spec.name}_step"


@dataclass(frozen=True)
class PackedLibrary(Library):
    """A generated module for packed sequences on disk."""

    spec: SPLASpec

    @property
    def op_name(self) -> str:
        """Its op takes rows of all sequences one behind the other, and where each begins."""
        return f"{self.spec.name}_varlen"


@dataclass(frozen=True)
class PrefillLibrary(Library):
    """A generated module for the last queries of packed sequences on disk."""

    spec: SPLASpec

    @property
    def part(self) -> PrefillPartition:
        """The kernels and arrays of the module."""
        return prefill_kernels(self.spec)

    @property
    def op_name(self) -> str:
        """Its op takes rows of queries and of keys, and where those of each sequence begin."""
        return f"{self.spec.name}_prefill"


def program(spec: Spec) -> Program:
    """The definition: what is computed."""
    return check(kind_of(spec).definition(spec))


def stages(spec: Spec) -> dict[str, Program]:
    """The Program after every pass, in order; a pass that runs again has a number.

    Where the definition becomes kernels part by part, as the router and the recurrences of SSE do, a part stands under
    its name and what a pass makes of it under `part.pass`.
    """
    found = {"definition": program(spec)}
    for part, (now, passes) in kind_of(spec).lowerings(spec).items():
        if part:
            found[part] = check(now)
        for apply in passes:
            now = check(apply(now))
            first = f"{part}.{_name(apply)}".removeprefix(".")
            name, i = first, 2
            while name in found:
                name, i = f"{first}_{i}", i + 1
            found[name] = now
    return found


@overload
def lowered(spec: SPLASpec) -> Program: ...
@overload
def lowered(spec: SSESpec) -> dict[str, Program]: ...
def lowered(spec: Spec) -> Program | dict[str, Program]:
    """The definition with its gradient, after every pass; of SSE the router and the recurrences, by name."""
    found = {part: run(now, passes) for part, (now, passes) in kind_of(spec).lowerings(spec).items()}
    whole = found.get("")
    return found if whole is None else whole


def kernels(spec: Spec) -> Partition | SequencePartition:
    """The kernels that compute it."""
    return kind_of(spec).partition(spec)


def source(spec: Spec) -> str:
    """The generated module's text: the same bytes on every machine."""
    return kind_of(spec).source(spec)


def decode_kernels(spec: Spec, page_type: str = "input") -> Decoding:
    """The kernels of a step of one token per sequence, for pages in the type of q or in "e4m3".

    Raises:
        InputError: an unknown type of pages.
        SpecError: a query of the spec depends on later tokens, or the spec is of SSE.
    """
    if not isinstance(spec, SPLASpec):
        raise SpecError(f"{spec.name} is a spec of SSE", f"its module has a step of its own: {spec.name}_step")
    known: dict[str, PageType] = {name: name for name in get_args(PageType)}
    if page_type not in known:
        raise InputError(f"unknown type of pages {page_type!r}", f"one of {', '.join(known)}")
    return decoding(spec, known[page_type])


def module_kernels(spec: Spec, page_type: str | None = None, *, packed: bool = False) -> Module:
    """The kernels of the op, on packed sequences or not, or of decoding with pages of a type."""
    if page_type is not None:
        return decode_kernels(spec, page_type)
    return packed_kernels(spec) if packed else kernels(spec)


def decode_source(spec: Spec, page_type: str = "input") -> str:
    """The text of the generated module of decoding.  Raises as `decode_kernels`."""
    part = decode_kernels(spec, page_type)
    assert isinstance(spec, SPLASpec)
    return decode_module_text(part, spec, digest=digest(spec)[:8], spec_text=to_toml(spec))


def generate(spec: Spec, out: str | Path) -> Library:
    """Write `{name}_{digest8}.py` into `out`.  Raises GeneratedFileError where a foreign file is in the way."""
    path = Path(out) / f"{spec.name}_{digest(spec)[:8]}.py"
    write_generated(path, source(spec))
    return Library(spec, path)


def generate_decoding(spec: Spec, out: str | Path, *, page_type: str = "input") -> DecodingLibrary:
    """Write `{name}_decode_{digest8}.py` into `out`: the step of a few tokens per sequence of an `SPLACache`.

    `page_type` is "input", and pages have the type of q, or "e4m3": keys, values and statistics in 8 bits
    (`{name}_decode_e4m3_{digest8}.py`).

    Raises:
        InputError: an unknown type of pages.
        SpecError: a query of the spec depends on later tokens, or the spec is of SSE.
        GeneratedFileError: a foreign file is in the way.
    """
    text = decode_source(spec, page_type)
    assert isinstance(spec, SPLASpec)
    path = Path(out) / f"{stem(spec, decode_kernels(spec, page_type).page_type)}_{digest(spec)[:8]}.py"
    write_generated(path, text)
    return DecodingLibrary(spec, path)


def generate_packed(spec: Spec, out: str | Path) -> PackedLibrary:
    """Write `{name}_varlen_{digest8}.py` into `out`: the op on packed sequences, `cu_seqlens` and `max_seqlen`.

    Raises:
        InputError: the spec is not an SPLASpec.
        GeneratedFileError: a foreign file is in the way.
    """
    spec = _packable(spec)
    short, part = digest(spec)[:8], packed_kernels(spec)
    path = Path(out) / f"{spec.name}_varlen_{short}.py"
    write_generated(path, packed_module_text(part, name=spec.name, digest=short, spec_text=to_toml(spec)))
    return PackedLibrary(spec, path)


def generate_prefill(spec: SPLASpec, out: str | Path) -> PrefillLibrary:
    """Write `{name}_prefill_{digest8}.py` into `out`: forward for the last queries of packed sequences.

    Raises:
        SpecError: a query of the spec depends on later tokens.
        GeneratedFileError: a foreign file is in the way.
    """
    short, part = digest(spec)[:8], prefill_kernels(spec)
    path = Path(out) / f"{spec.name}_prefill_{short}.py"
    write_generated(path, prefill_module_text(part, name=spec.name, digest=short, spec_text=to_toml(spec)))
    return PrefillLibrary(spec, path)


@functools.lru_cache(maxsize=32)
def prefill_kernels(spec: SPLASpec) -> PrefillPartition:
    """The kernels of the last queries of packed sequences.  Raises SpecError if one depends on later tokens."""
    step = decoding(spec)
    found = kernels(spec)
    assert isinstance(found, Partition)
    return prefill_partition(found, step)


def packed_kernels(spec: Spec) -> PackedPartition:
    """The kernels of packed sequences.  Raises InputError if the spec is not an SPLASpec, or has own_rows."""
    found = kernels(_packable(spec))
    assert isinstance(found, Partition)
    return packed_partition(found)


def _packable(spec: Spec) -> SPLASpec:
    if not isinstance(spec, SPLASpec):
        raise InputError(f"no packed module of kind {spec.kind}", hint="its op takes cu_seqlens as it is: generate it")
    for name, part in (("select", spec.select), ("linear", spec.linear)):
        if part and part.own_rows:
            hint = "packed modules take q, k and v alone: one sequence at a time, or without own_rows"
            raise InputError(f"no packed module with {name}.own_rows", hint)
    return spec


def load(spec: Spec) -> Callable[..., Any]:
    """The op of a spec, generated under the cache directory and imported; it takes the Schedules that were tuned."""
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
        InputError: there is no GPU, an unknown effort or dtype, or `alike` out of range or for SSE.
        TuningError: a measurement failed for no reason that a Schedule explains.
        WrongResult: the Schedules that were chosen do not agree with the oracle.
    """
    if not isinstance(library, Library):
        library = generate(library, settings.cache_dir() / "kernels")
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


def verify(
    library: Library | Spec,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Compare an op's kernels with the oracle at shapes (B, H, L): everything that it computes, and every gradient.

    H counts heads of queries, those of values for SSE, which is compared on packed sequences too.  None is the shapes
    that suit the spec and the device.  On the CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1
    must ask for before triton is imported.
    """
    if not isinstance(library, Library):
        library = generate(library, settings.cache_dir() / "kernels")
    _need_kernels(device)
    spec = library.spec
    shapes = default_shapes(spec, device) if shapes is None else shapes
    truth = oracle(to_toml(spec))
    return kind_of(spec).verify(library.module, truth, shapes=shapes, dtypes=dtypes, device=device, seed=seed)


def verify_packed(
    library: PackedLibrary,
    *,
    lengths: Sequence[int],
    heads: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Compare the kernels of packed sequences of these lengths with the oracle; `heads` of queries, None is one group.

    On the CPU the kernels run in Triton's interpreter, as in `verify`.

    Raises:
        InputError: no GPU is asked for, and the kernels are not interpreted.
    """
    _need_kernels(device)
    heads = library.spec.group_size if heads is None else heads
    return packed_verification.verify(
        library.module, lengths=lengths, heads=heads, dtypes=dtypes, device=device, seed=seed
    )


def _need_kernels(device: str) -> None:
    if device == "cpu" and not settings.interpreted():
        raise InputError("the kernels run on a GPU or in Triton's interpreter", hint="set TRITON_INTERPRET=1")


def default_shapes(spec: Spec, device: str) -> list[Shape]:
    """The shapes (B, H, L) that `verify` takes on a device if it is told none."""
    return kind_of(spec).shapes(spec, device)


def _name(apply: Pass) -> str:
    """The name of a pass; of a pass with arguments that of the function which takes them."""
    return str(getattr(apply, "func", apply).__qualname__).split(".")[0]


_modules: dict[str, ModuleType] = {}


def _imported(path: Path) -> ModuleType:
    key = path.read_text()
    if key not in _modules:
        _modules[key] = import_file(path)
    return _modules[key]
