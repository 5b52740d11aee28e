"""What a tuned Schedule depends on, by name."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata

from splagen.autotune.device import Device
from splagen.codegen import decode_module, module, sequence_module
from splagen.codegen.kernel import Choice, Kernel, Splitting
from splagen.codegen.module_holes import GENERATOR
from splagen.codegen.render import kernel_text, template_directory
from splagen.codegen.schedule import DTYPES
from splagen.errors import InputError
from splagen.spec import Spec, digest

SIZES = frozenset({"length", "batch"})  # the fields of a Bucket
FUNCTIONS = tuple(dict.fromkeys((*module.FUNCTIONS, *sequence_module.FUNCTIONS, *decode_module.FUNCTIONS)))
LONGEST = 300  # characters of a text in a key


@dataclass(frozen=True)
class Bucket:
    """Sizes that share their Schedules, each rounded up to a power of two.

    Attributes:
        length: positions of a sample; of SSE, tokens of all samples, which are packed; of decoding, the tokens that a
            sequence may get.
        batch: what runs side by side: samples × KV heads; of SSE, value heads.
    """

    length: int
    batch: int

    @classmethod
    def of(cls, spec: Spec, shape: tuple[int, int, int]) -> Bucket:
        """The bucket of a shape (B, H, L); H counts heads of queries, those of values for SSE.

        Raises:
            InputError: a size is not positive, or the heads are not whole groups.
        """
        sizes = sizes_of(spec, shape)
        if spec.kind == "sse":
            return cls(_power(sizes["T"]), _power(sizes["HV"]))
        return cls(_power(sizes["L"]), _power(sizes["B"] * sizes["Hkv"]))


def sizes_of(spec: Spec, shape: tuple[int, int, int]) -> dict[str, int]:
    """The sizes by which launchers and formulas of cost go, for a shape (B, H, L).

    H counts heads of queries, those of values for SSE.

    Raises:
        InputError: a size is not positive, or the heads are not whole groups.
    """
    batch, heads, length = shape
    if min(shape) < 1 or heads % spec.group_size:
        raise InputError(f"shape {shape}", f"positive sizes, and heads a multiple of {spec.group_size}")
    if spec.kind == "sse":
        return {"T": batch * length, "S": batch, "HV": heads}
    return {"L": length, "B": batch, "Hkv": heads // spec.group_size}


@dataclass(frozen=True)
class Key:
    """Everything that may change which Schedule of a kernel is the fastest.

    Attributes:
        generator: version of the generator.
        spec: digest of the spec.
        kernel: name of the kernel.
        source: digest of the kernel's generated source and launch grid.
        templates: digest of its template and of those of the device functions it calls.
        dtype: bf16, fp16 or fp32.
        length: of the bucket.
        batch: of the bucket.
        gpu: name of the GPU.
        arch: its architecture.
        triton: version of triton.
        cuda: version of CUDA or ROCm that torch was built with; "none" for neither.
    """

    generator: int
    spec: str
    kernel: str
    source: str
    templates: str
    dtype: str
    length: int
    batch: int
    gpu: str
    arch: str
    triton: str
    cuda: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (_is_count(value) if field.type == "int" else is_text(value)):
                raise InputError(f"{field.name} of a tuned Schedule's key is {value!r:.100}")

    @property
    def digest(self) -> str:
        """The name of the key's entry."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def differs(self, other: Key, free: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Names of the fields in which two keys differ, those in `free` left out."""
        mine, theirs = asdict(self), asdict(other)
        return tuple(name for name in mine if name not in free and mine[name] != theirs[name])


def is_text(value: object) -> bool:
    """True for a short printable text: neither control characters nor lone surrogates reach a terminal or a file."""
    return type(value) is str and 0 < len(value) <= LONGEST and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**62


def key_of(spec: Spec, kernel: Kernel | Choice | Splitting, dtype: str, bucket: Bucket, device: Device) -> Key:
    """The key of one kernel of a spec, or of what goes by several, for the triton and torch of this process.

    Raises:
        InputError: `dtype` is not bf16, fp16 or fp32.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    versions = software()
    kernels = (kernel,) if isinstance(kernel, Kernel) else kernel.kernels
    return Key(
        GENERATOR,
        digest(spec)[:32],
        kernel.name,
        _digest(*(x for k in kernels for x in (kernel_text(k), k.grid))),
        template_digest(*kernels),
        dtype,
        bucket.length,
        bucket.batch,
        device.name,
        device.arch,
        versions["triton"],
        versions["cuda"],
    )


def template_digest(*kernels: Kernel) -> str:
    """The digest of every template that makes kernels: their own and, at any depth, those of functions they call."""
    texts = {k.template: _template(k.template) for k in kernels}
    pending = [kernel_text(k) for k in kernels]
    while pending:
        caller = pending.pop()
        for name in FUNCTIONS:
            if name not in texts and re.search(rf"\b{name}\(", caller):
                texts[name] = _template(name)
                pending.append(texts[name])
    return _digest(*(x for name in sorted(texts) for x in (name, texts[name])))


def _template(name: str) -> str:
    return (template_directory() / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def software() -> Mapping[str, str]:
    """Versions that a compiled kernel depends on: triton, and the CUDA or ROCm of torch."""
    import torch

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    hip = f"rocm {torch.version.hip}" if torch.version.hip else None
    return {"triton": triton, "cuda": hip or torch.version.cuda or "none"}


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
