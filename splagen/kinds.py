"""The kinds of spec: what each brings of its own.  Everything else is the same for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from splagen import sequence_verification, verification
from splagen.codegen.dense import dense_attention
from splagen.codegen.module import module_text
from splagen.codegen.partition import Partition, direct_partition, partition
from splagen.codegen.sequence_module import sequence_module_text
from splagen.codegen.sequence_partition import SequencePartition, lowerings, sequence_partition
from splagen.ir.assumptions import below
from splagen.ir.frontend_spla import LENGTH, spla_program
from splagen.ir.frontend_sse import sse_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import DIRECT, LOWERING, Pass, run
from splagen.ir.program import Program
from splagen.ir.remaining import forward_reads_states
from splagen.ops import Oracle
from splagen.sequence import SSEOracle
from splagen.spec import Spec, SPLASpec, digest, from_toml, to_toml
from splagen.sse_spec import SSESpec
from splagen.verification import Report, Shape

Lowerings: TypeAlias = Mapping[str, tuple[Program, tuple[Pass, ...]]]
S = TypeVar("S", SPLASpec, SSESpec)


@dataclass(frozen=True)
class Kind(Generic[S]):
    """What a kind of spec brings.

    Attributes:
        definition: what is computed.
        lowerings: the Programs that become kernels by name, each with its passes; one without a name is the definition.
        partition: the kernels.
        source: the text of the generated module.
        oracle: the reference, which is also the op on CPU tensors.
        verify: compares a module with the oracle.
        shapes: what is compared on a device, "cpu" or "cuda", if nothing is said.
    """

    definition: Callable[[S], Program]
    lowerings: Callable[[S], Lowerings]
    partition: Callable[[S], Partition | SequencePartition]
    source: Callable[[S], str]
    oracle: Callable[[S], Oracle | SSEOracle]
    verify: Callable[..., Report]
    shapes: Callable[[S, str], list[Shape]]


def kind_of(spec: Spec) -> Kind[Any]:
    """The kind of a spec."""
    return KINDS[spec.kind]


@functools.lru_cache(maxsize=32)
def oracle(spec_text: str) -> Any:
    """The oracle of a spec given as TOML: an `Oracle` or an `SSEOracle`."""
    spec = from_toml(spec_text)
    return kind_of(spec).oracle(spec)


def _lowerings(spec: SPLASpec) -> Lowerings:
    """The definition and, where the spec has another in short sequences, what becomes of it there."""
    whole = spla_program(spec)
    found: dict[str, tuple[Program, tuple[Pass, ...]]] = {"": (whole, (derive_gradient, *LOWERING))}
    if spec.select and spec.linear and not forward_reads_states(whole):
        found["direct"] = whole, (derive_gradient, *DIRECT)
    if spec.dense_below:
        found["short"] = whole, below(LENGTH, spec.dense_below)
    return found


@functools.lru_cache(maxsize=32)
def _partition(spec: SPLASpec) -> Partition:
    ready = {name: run(program, passes) for name, (program, passes) in _lowerings(spec).items()}
    found = partition(ready[""])
    if "direct" in ready:
        found.direct = direct_partition(ready["direct"], found)
    if "short" in ready:
        found.dense = dense_attention(ready["short"], spec.dense_below)
    return found


def _source(spec: SPLASpec) -> str:
    return module_text(_partition(spec), name=spec.name, digest=digest(spec)[:8], spec_text=to_toml(spec))


@functools.lru_cache(maxsize=32)
def _sequence_partition(spec: SSESpec) -> SequencePartition:
    return sequence_partition(spec)


def _sequence_source(spec: SSESpec) -> str:
    part = _sequence_partition(spec)
    return sequence_module_text(part, spec, digest=digest(spec)[:8], spec_text=to_toml(spec))


def _oracle(spec: SPLASpec) -> Oracle:
    return Oracle(derive_gradient(spla_program(spec)), _partition(spec))


def _shapes(spec: SPLASpec, device: str) -> list[Shape]:
    direct = _partition(spec).direct
    return verification.default_shapes(spec, device, direct.blocks if direct else 0)


KINDS: Mapping[str, Kind[Any]] = {
    "spla": Kind[SPLASpec](
        definition=spla_program,
        lowerings=_lowerings,
        partition=_partition,
        source=_source,
        oracle=_oracle,
        verify=verification.verify,
        shapes=_shapes,
    ),
    "sse": Kind[SSESpec](
        definition=sse_program,
        lowerings=lowerings,
        partition=_sequence_partition,
        source=_sequence_source,
        oracle=SSEOracle,
        verify=sequence_verification.verify,
        shapes=sequence_verification.default_shapes,
    ),
}
