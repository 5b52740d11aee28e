"""The whole pipeline: spec -> Program -> passes -> kernels -> source -> op."""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args, overload

import torch

from splagen import packed_verification, settings, step_verification
from splagen.codegen.compile import Module
from splagen.codegen.decode_module import decode_module_text, stem
from splagen.codegen.decoding import Decoding, decoding
from splagen.codegen.files import module_of, write_generated
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
from splagen.verification import Report, Shape


@dataclass(frozen=True)
class Library:
    """A generated module on disk."""

    spec: Spec
    path: Path

    @functools.cached_property
    def module(self) -> ModuleType:
        """The module, imported once per process and content; what becomes of the file later does not matter to it."""
        return module_of(self.path)

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
    """The kernels of a step of a few tokens per sequence, for pages in the type of q or in "e4m3".

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


Written = TypeVar("Written", bound=Library)


def _written(library: Written, text: str) -> Written:
    """The library, once its file has the text."""
    op = library.op_name
    if hasattr(builtins, op) or _bound(text).count(op) > 1:
        raise SpecError(f"name is {library.spec.name!r}: its module has another {op}", "give the spec another name")
    write_generated(library.path, text)
    return library


@functools.lru_cache(maxsize=32)
def _bound(text: str) -> tuple[str, ...]:
    """The names that a module binds, as often as it does; a model's layers share a module."""
    found: list[str] = []
    for node in ast.parse(text).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.append(name)
            case ast.Assign(targets=targets):
                found += [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found += [x.asname or x.name for x in names]
    return tuple(found)


def _path(spec: Spec, out: str | Path, stem: str) -> Path:
    return Path(out) / f"{stem}_{digest(spec)[:8]}.py"


def generate(spec: Spec, out: str | Path) -> Library:
    """Write `{name}_{digest8}.py` into `out`.

    Raises:
        SpecError: the spec's name is that of something else in the module.
        GeneratedFileError: a foreign file is in the way.
    """
    return _written(Library(spec, _path(spec, out, spec.name)), source(spec))


def generate_decoding(spec: Spec, out: str | Path, *, page_type: str = "input") -> DecodingLibrary:
    """Write `{name}_decode_{digest8}.py` into `out`: the step of a few tokens per sequence of an `SPLACache`.

    `page_type` is "input", and pages have the type of q, or "e4m3": keys, values and statistics in 8 bits
    (`{name}_decode_e4m3_{digest8}.py`).

    Raises:
        InputError: an unknown type of pages.
        SpecError: a query of the spec depends on later tokens, the spec is of SSE, or its name is that of something
            else in the module.
        GeneratedFileError: a foreign file is in the way.
    """
    text = decode_source(spec, page_type)
    assert isinstance(spec, SPLASpec)
    page = decode_kernels(spec, page_type).page_type
    return _written(DecodingLibrary(spec, _path(spec, out, stem(spec, page))), text)


def generate_packed(spec: Spec, out: str | Path) -> PackedLibrary:
    """Write `{name}_varlen_{digest8}.py` into `out`: the op on packed sequences, `cu_seqlens` and `max_seqlen`.

    Raises:
        InputError: the spec is not an SPLASpec, or has own_rows.
        GeneratedFileError: a foreign file is in the way.
    """
    spec = _packable(spec)
    text = packed_module_text(packed_kernels(spec), name=spec.name, digest=digest(spec)[:8], spec_text=to_toml(spec))
    return _written(PackedLibrary(spec, _path(spec, out, f"{spec.name}_varlen")), text)


def generate_prefill(spec: SPLASpec, out: str | Path) -> PrefillLibrary:
    """Write `{name}_prefill_{digest8}.py` into `out`: forward for the last queries of packed sequences.

    Raises:
        SpecError: a query of the spec depends on later tokens.
        GeneratedFileError: a foreign file is in the way.
    """
    text = prefill_module_text(prefill_kernels(spec), name=spec.name, digest=digest(spec)[:8], spec_text=to_toml(spec))
    return _written(PrefillLibrary(spec, _path(spec, out, f"{spec.name}_prefill")), text)


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
    that suit the spec and the device.  Of a library of decoding B sequences take L steps, of one token each, whose
    outputs and choices are compared.  On the CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 must
    ask for before triton is imported.

    Raises:
        InputError: a library of packed sequences or of prefill; no GPU is asked for, and nothing is interpreted.
    """
    if not isinstance(library, Library):
        library = generate(library, settings.cache_dir() / "kernels")
    need_op(library, "verify_packed(library, lengths=...) compares packed sequences")
    _need_kernels(device)
    spec = library.spec
    shapes = default_shapes(spec, device) if shapes is None else shapes
    truth = oracle(to_toml(spec))
    given: dict[str, Any] = {"shapes": shapes, "dtypes": dtypes, "device": device, "seed": seed}
    if isinstance(library, DecodingLibrary):
        given["dense_below"] = library.spec.dense_below
        return step_verification.verify(library.module, truth, library.part, **given)
    return kind_of(spec).verify(library.module, truth, **given)


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


def need_op(library: Library, hint: str) -> None:
    """Raise InputError with the hint for a library of packed sequences or of prefill."""
    if isinstance(library, (PackedLibrary, PrefillLibrary)):
        raise InputError(f"{library.op_name} is neither an op nor a step", hint)


def _need_kernels(device: str) -> None:
    if device == "cpu" and not settings.interpreted():
        raise InputError("the kernels run on a GPU or in Triton's interpreter", hint="set TRITON_INTERPRET=1")


def default_shapes(spec: Spec, device: str) -> list[Shape]:
    """The shapes (B, H, L) that `verify` takes on a device if it is told none."""
    return kind_of(spec).shapes(spec, device)


def _name(apply: Pass) -> str:
    """The name of a pass; of a pass with arguments that of the function which takes them."""
    return str(getattr(apply, "func", apply).__qualname__).split(".")[0]
