"""Dense attention, which torch has: the equations it takes, and the kernels of the rows behind it.

Where a Program is dense softmax attention followed by equations of single rows, torch computes the attention and its
gradient, and rows kernels the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy as sp

from splagen.codegen.geometry import Geometry, array_of, is_parameter
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.predicates import Predicates
from splagen.codegen.row_kernels import partial_array, rows_kernel
from splagen.errors import PartitionError
from splagen.expression import symbol
from splagen.ir.check import check
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, drop_unused, run
from splagen.ir.program import Contract, Equation, Iota, Map, Program, Softmax, Var, placeholder, slice_back
from splagen.ir.text import equation_text

LSE = "dense_lse"  # [B, Hq, L], as torch lays it out
QUERY, KEY = ("T", "m"), ("J", "C", "n")


@dataclass(frozen=True)
class DenseAttention:
    """o = softmax over all keys, or those at or before the query, of scale q·k, times v; q, k, v are read here alone.

    `covers` are its equations.
    """

    q: Var
    k: Var
    v: Var
    o: Var
    scale: float
    causal: bool
    covers: tuple[Equation, ...]

    @classmethod
    def of(cls, program: Program) -> DenseAttention | None:
        """The dense attention of a forward Program, or None if it is another kind of attention."""
        definitions = program.definitions
        softmaxes = [eq for eq in program.equations if isinstance(eq.op, Softmax) and eq.op.axes == KEY]
        if len(program.inputs) < 3 or len(softmaxes) != 1 or len(softmaxes[0].args) != 2:
            return None
        (weights,) = softmaxes
        scores, mask = (definitions.get(x) for x in weights.args)
        product = definitions.get(scores.args[0]) if scores and len(scores.args) == 1 else None
        sums = [eq for eq in program.equations if weights.out in eq.args]
        if not scores or not mask or not product or len(sums) != 1 or not isinstance(sums[0].op, Contract):
            return None
        q, k, v = program.inputs[:3]
        scale = scores.op.expr / placeholder(0) if isinstance(scores.op, Map) else None
        causal = _is_causal(program, mask.out)
        attends = (
            isinstance(product.op, Contract)
            and set(product.args) == {q, k}
            and set(sums[0].args) == {weights.out, v}
            and sums[0].out.axes == (*(a for a in q.axes if a != "d"), "e")
            and isinstance(scale, sp.Expr)
            and scale.is_number
            and causal is not None
        )
        read = {x: [eq for eq in program.equations if x in eq.args] for x in (q, k, v, product.out, scores.out)}
        if not attends or any(len(readers) != 1 for readers in read.values()):
            return None
        positions = slice_back(program, [mask.out], program.inputs)
        covers = (*positions, product, scores, weights, sums[0])
        return cls(q, k, v, sums[0].out, float(scale), bool(causal), covers)  # type: ignore[arg-type]


def _is_causal(program: Program, mask: Var) -> bool | None:
    """True where a mask holds for the keys at or before the query, False where for all of the sequence; else None."""
    geometry = Geometry.of(program)
    query, key = (geometry.position(Iota(axes)) for axes in (QUERY, KEY))
    assert query is not None
    assert key is not None
    try:
        seen = Predicates(program, geometry).expand(mask, {})
    except PartitionError:
        return None
    inside = sp.Lt(key, symbol("L"))
    return {inside: False, sp.And(inside, sp.Le(key, query)): True}.get(seen)


@dataclass(frozen=True)
class Dense:
    """What runs in sequences shorter than `below`.

    Attributes:
        below: the length from which on it does not hold.
        attention: what torch computes.
        rows: the Program behind it, from its output, with the gradient; no equations where that is the op's output.
        forward: the kernel of these rows, if there are any.
        backward: the kernel of the cotangent of the attention and of the gradients of other inputs, likewise.
        gradients: of inputs other than q, k and v, by name; an input without one has the gradient 0.
    """

    below: int
    attention: DenseAttention
    rows: Program
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    gradients: dict[str, Var] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Kernel]:
        """All of them."""
        return [*self.forward, *self.backward]

    @property
    def made(self) -> list[str]:
        """What forward returns: the op's output, then what is saved, which begins with the output if no rows follow."""
        return [*(v.name for v in self.rows.outputs if self.forward), *self.saved]

    @property
    def saved(self) -> list[str]:
        """What backward is given beside inputs and cotangents: what torch computed, and its log-sum-exp."""
        return [self.attention.o.name, LSE]


def dense_attention(program: Program, below: int) -> Dense | None:
    """Kernels beside torch's attention of a forward Program that holds in sequences shorter than `below`.

    None where it is no dense softmax attention.  Raises PartitionError where what follows it are not equations of rows.
    """
    attention = DenseAttention.of(program)
    if attention is None:
        return None
    o = attention.o
    (output,) = program.outputs
    if _is_copy(program, output, o):
        return Dense(below, attention, replace(program, inputs=(o,), equations=(), outputs=(o,)))
    behind = [eq for eq in program.equations if eq not in attention.covers]
    rows = drop_unused(replace(program, inputs=(o, *program.inputs), equations=tuple(behind)))
    read = {v for eq in rows.equations for v in eq.args}
    rows = check(replace(rows, inputs=tuple(v for v in rows.inputs if v in read)))
    if across := [eq for eq in rows.equations if not _is_of_rows(eq)]:
        raise _not_rows(across)
    rows = run(derive_gradient(rows), LOWERING)
    return _with_kernels(Dense(below, attention, rows))


def _is_copy(program: Program, output: Var, o: Var) -> bool:
    definition = program.definitions[output]
    return output == o or (definition.args == (o,) and definition.op == Map(placeholder(0)))


def _is_of_rows(eq: Equation) -> bool:
    """True if no value of another position or head is read."""
    places = {"b", "h", "g", *QUERY, *KEY}
    read = {a for v in eq.args for a in v.axes} & places
    return read == places & set(eq.out.axes) and not read & set(KEY)


def _with_kernels(dense: Dense) -> Dense:
    program, geometry = dense.rows, Geometry.of(dense.rows)
    cotangents = {dy for _, dy in program.cotangents}
    available = {v: array_of(v, geometry, internal=False) for v in program.inputs}
    before = {v: a for v, a in available.items() if v not in cotangents}
    outputs = [(v, array_of(v, geometry, internal=False)) for v in program.outputs]
    gradients: list[tuple[Var, Array]] = []
    for x, g in program.gradients:
        parameter = is_parameter(x)
        array = partial_array(g, geometry, True) if parameter else array_of(g, geometry, internal=False)
        gradients.append((g, array))
    forward = rows_kernel("dense_rows", program, "query", before, outputs)
    backward = rows_kernel("dense_cotangents", program, "query", available, gradients)
    covered = {*forward.covers, *backward.covers}
    loose = [eq for eq in program.equations if eq not in covered]
    if loose:
        raise _not_rows(loose)
    others = {x.name: g for x, g in program.gradients if x != dense.attention.o}
    return replace(dense, forward=[forward], backward=[backward], gradients=others)


def _not_rows(equations: Sequence[Equation]) -> PartitionError:
    lines = "\n  ".join(equation_text(eq) for eq in equations)
    return PartitionError(f"behind dense attention these are not equations of single rows:\n  {lines}")
