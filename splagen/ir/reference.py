"""The oracle: PyTorch evaluates a Program directly, in float64.  It shares no code with the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import sympy as sp
import torch
from torch import Tensor

from splagen.errors import ProgramError
from splagen.expression import log1p
from splagen.ir.program import (
    Contract,
    CumSum,
    Equation,
    Iota,
    LowRank,
    Lse,
    Map,
    Op,
    Program,
    Reduce,
    Rename,
    Softmax,
    TopK,
    UnitInverse,
    Var,
    ordered,
    union_axes,
)


class World:
    """What evaluation needs beside the arrays: axis order and sizes, Iota offsets, run-time scalars, float type."""

    def __init__(
        self,
        order: Mapping[str, int],
        sizes: Mapping[str, int],
        offsets: Mapping[str, int],
        scalars: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Sizes and offsets are per axis; scalars are looked up by name."""
        self.order, self.sizes, self.offsets = order, sizes, offsets
        self.scalars, self.dtype, self.device = scalars, dtype, device

    def align(self, x: Tensor, axes: Sequence[str], target: Sequence[str]) -> Tensor:
        """View `x` over `target` axes, with size 1 where it has no such axis."""
        shape = iter(x.shape)
        present = set(axes)
        return x.reshape([next(shape) if a in present else 1 for a in target])

    def real(self, x: Tensor) -> Tensor:
        """`x` in the evaluation's float type."""
        return x.to(self.dtype)


Rule: TypeAlias = Callable[[World, Equation, Sequence[Tensor]], Tensor]


def _iota(world: World, eq: Equation, _: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Iota)
    place = torch.zeros([1] * len(eq.out.axes), dtype=torch.int64, device=world.device)
    stride = 1
    for axis in reversed(eq.op.axes):
        at = torch.arange(world.sizes[axis], device=world.device) + world.offsets.get(axis, 0)
        place = place + stride * world.align(at, (axis,), eq.out.axes)
        stride *= world.sizes[axis]
    return place


def _map(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Map)
    env: dict[str, Tensor | float] = dict(world.scalars)
    for i, (v, x) in enumerate(zip(eq.args, args, strict=True)):
        if v.kind == "int" and eq.out.kind != "int":
            x = x.to(torch.float64)  # an integer tensor times a Python float would be float32
        env[f"x{i}"] = world.align(x, v.axes, eq.out.axes)
    with world.device:  # where numbers of the expression become tensors
        value = _walk(eq.op.expr, env)
        value = _tensor(value) if isinstance(value, float) else torch.as_tensor(value)
    if eq.out.kind == "real":
        value = world.real(value)
    return value.expand([world.sizes[a] for a in eq.out.axes])


def _walk(e: sp.Basic, env: Mapping[str, Tensor | float]) -> Tensor | float:
    """Evaluate an expression tree by calling torch, node by node."""
    match e:
        case sp.Symbol():
            return env[e.name]
        case sp.Integer():
            return int(e) if abs(e) < 2**53 else float(e)
        case sp.Rational() | sp.Float() | sp.core.numbers.NumberSymbol():
            return float(e)
        case sp.core.numbers.Infinity() | sp.core.numbers.NegativeInfinity():
            return math.inf if e == sp.oo else -math.inf
        case sp.logic.boolalg.BooleanTrue() | sp.logic.boolalg.BooleanFalse():
            return bool(e)
        case sp.Piecewise():
            return _piecewise(e, env)
    args = [_walk(a, env) for a in e.args]
    match e:
        case sp.Add():
            return _fold(args, lambda a, b: a + b)
        case sp.Mul():
            return _fold(args, lambda a, b: a * b)
        case sp.Pow():
            return _power(args[0], e.exp)
        case sp.exp():
            return torch.exp(_tensor(args[0]))
        case sp.log():
            return torch.log(_tensor(args[0]))
        case log1p():
            return torch.log1p(_tensor(args[0]))
        case sp.tanh():
            return torch.tanh(_tensor(args[0]))
        case sp.StrictLessThan():
            return args[0] < args[1]
        case sp.LessThan():
            return args[0] <= args[1]
        case sp.StrictGreaterThan():
            return args[0] > args[1]
        case sp.GreaterThan():
            return args[0] >= args[1]
        case sp.Equality():
            return _tensor(args[0]) == args[1]
        case sp.Unequality():
            return _tensor(args[0]) != args[1]
        case sp.And():
            return _fold([_truth(a) for a in args], torch.logical_and)
        case sp.Or():
            return _fold([_truth(a) for a in args], torch.logical_or)
        case sp.Not():
            return torch.logical_not(_truth(args[0]))
    raise ProgramError(f"the oracle has no meaning for {type(e).__name__}, in `{e}`")


def _fold(args: Sequence[Tensor | float], fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    out = args[0]
    for a in args[1:]:
        out = fn(out, a)  # type: ignore[arg-type]
    return out  # type: ignore[return-value]


def _tensor(x: Tensor | float) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _truth(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.bool)


def _power(base: Tensor | float, exponent: sp.Expr) -> Tensor | float:
    if exponent == sp.Rational(1, 2):
        return torch.sqrt(_tensor(base))
    if exponent == -sp.Rational(1, 2):
        return torch.rsqrt(_tensor(base))
    if exponent == -1:
        return 1 / base
    x = _tensor(base)
    return x ** (int(exponent) if exponent.is_Integer else float(exponent))


def _piecewise(e: sp.Piecewise, env: Mapping[str, Tensor | float]) -> Tensor:
    out = torch.tensor(math.nan, dtype=torch.float64)
    for value, condition in reversed(e.args):
        v = _tensor(_walk(value, env))
        c = _truth(_walk(condition, env))
        out = v if condition == sp.true else torch.where(c, v, out)
    return out


def _contract(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    """Pairwise, smallest intermediate first: a left-to-right einsum over many operands needs far more memory."""
    assert isinstance(eq.op, Contract)
    keep = set(eq.op.keep)
    todo = [(v.axes, world.real(x)) for v, x in zip(eq.args, args, strict=True)]

    def survivors(i: int, j: int) -> tuple[str, ...]:
        others = keep.union(*(axes for n, (axes, _) in enumerate(todo) if n not in (i, j)))
        return ordered((set(todo[i][0]) | set(todo[j][0])) & others, world.order)

    while len(todo) > 1:
        sizes = {
            (i, j): math.prod(world.sizes[a] for a in survivors(i, j)) for i, j in combinations(range(len(todo)), 2)
        }
        i, j = min(sizes, key=lambda pair: (sizes[pair], pair))
        axes = survivors(i, j)
        product = _einsum([todo[i], todo[j]], axes)
        todo = [t for n, t in enumerate(todo) if n not in (i, j)] + [(axes, product)]
    return _einsum(todo, eq.op.keep)


def _einsum(operands: Sequence[tuple[Sequence[str], Tensor]], keep: Sequence[str]) -> Tensor:
    letter: dict[str, str] = {}
    for axes, _ in operands:
        for a in axes:
            letter.setdefault(a, chr(ord("a") + len(letter)))
    spec = ",".join("".join(letter[a] for a in axes) for axes, _ in operands)
    return torch.einsum(f"{spec}->{''.join(letter[a] for a in keep)}", *(x for _, x in operands))


def _operand_and_mask(world: World, eq: Equation, args: Sequence[Tensor]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    axes = union_axes(eq.args, world.order)
    shape = [world.sizes[a] for a in axes]
    x = world.align(args[0], eq.args[0].axes, axes).expand(shape)
    if len(args) == 1:
        return x, torch.ones((), dtype=torch.bool, device=x.device).expand(shape), axes
    return x, world.align(args[1], eq.args[1].axes, axes).expand(shape), axes


def _reduce(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Reduce)
    x, mask, axes = _operand_and_mask(world, eq, args)
    dims = [axes.index(a) for a in eq.op.axes]
    if eq.op.how == "max":
        held = world.real(x).masked_fill(~mask, -math.inf).amax(dims)
        return held.masked_fill(held == -math.inf, 0)
    x = x.to(torch.int64) if eq.args[0].kind != "real" and eq.op.how == "sum" else world.real(x)
    total = x.masked_fill(~mask, 0).sum(dims)
    return total if eq.op.how == "sum" else total / mask.sum(dims).clamp(min=1)


def _softmax(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Softmax)
    x, mask, axes = _operand_and_mask(world, eq, args)
    dims = [axes.index(a) for a in eq.op.axes]
    x = world.real(x).masked_fill(~mask, -math.inf)
    top = x.amax(dims, keepdim=True)
    e = torch.exp(x - top.masked_fill(top == -math.inf, 0))
    total = e.sum(dims, keepdim=True)
    return e / total.masked_fill(total == 0, 1)


def _lse(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Lse)
    x, mask, axes = _operand_and_mask(world, eq, args)
    return torch.logsumexp(world.real(x).masked_fill(~mask, -math.inf), [axes.index(a) for a in eq.op.axes])


def _topk(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, TopK)
    x, mask, axes = _operand_and_mask(world, eq, args)
    dim = axes.index(eq.op.axis)
    ranked = torch.sort(world.real(x).masked_fill(~mask, -math.inf), dim=dim, descending=True, stable=True).indices
    chosen = torch.zeros_like(mask).scatter(dim, ranked.narrow(dim, 0, min(eq.op.k, x.shape[dim])), True)
    return chosen & mask


def _cumsum(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, CumSum)
    (x,) = args
    dims = [eq.out.axes.index(a) for a in eq.op.axes]
    rest = [d for d in range(x.ndim) if d not in dims]
    moved = x.permute(*rest, *dims)
    summed = moved.flatten(len(rest)).cumsum(-1).reshape(moved.shape)
    back = torch.argsort(torch.tensor([*rest, *dims])).tolist()
    return summed.permute(*back)


def _rename(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, Rename)
    new = dict(eq.op.pairs)
    renamed = [new.get(a, a) for a in eq.args[0].axes]
    return args[0].permute(*(renamed.index(a) for a in eq.out.axes))


def _unit_inverse(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    assert isinstance(eq.op, UnitInverse)
    pair = [eq.out.axes.index(a) for a in (eq.op.row, eq.op.column)]
    x = world.real(args[0]).movedim(pair, (-2, -1))
    one = torch.eye(x.shape[-1], dtype=world.dtype, device=world.device)
    lower = x.tril(-1) + one
    inverse: Tensor = torch.linalg.solve_triangular(lower, one.expand(x.shape), upper=False, unitriangular=True)
    return inverse.movedim((-2, -1), pair)


def _low_rank(world: World, eq: Equation, args: Sequence[Tensor]) -> Tensor:
    """One direction after the other, on [..., rows, features]."""
    assert isinstance(eq.op, LowRank)
    x, mask, axes = _operand_and_mask(world, eq, args)
    pair = [axes.index(a) for a in (eq.op.rows, eq.op.features)]
    x = world.real(x).detach().masked_fill(~mask, 0).movedim(pair, (-2, -1))
    held = mask.select(pair[1], 0).sum(pair[0] - (pair[0] > pair[1]))[..., None]
    count = world.real(held).clamp(min=1)
    place = torch.arange(x.shape[-1], device=world.device)
    factors = []
    for i in range(world.sizes[eq.op.rank]):
        start = 2 * ((i + 1) * (place + 1) ** 2 % 521) - 521
        y = x @ world.real(start)
        for _ in range(eq.op.steps):
            along = _unit(y)[..., None, :] @ x
            y = (x @ along.mT)[..., 0]
        y = _unit(y)[..., None, :]
        along = y @ x
        factors.append(along[..., 0, :] / count.sqrt())
        x = x - y.mT * along
    rest = [a for a in axes if a not in (eq.op.rows, eq.op.features)]
    found = torch.stack(factors, dim=-2)  # [..., rank, features]
    where = [*rest, eq.op.rank, eq.op.features]
    return found.permute([where.index(a) for a in eq.out.axes])


def _unit(y: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return y / length.masked_fill(length == 0, 1)


EVALUATE: dict[type[Op], Rule] = {
    Iota: _iota,
    Map: _map,
    Contract: _contract,
    Reduce: _reduce,
    Softmax: _softmax,
    Lse: _lse,
    TopK: _topk,
    CumSum: _cumsum,
    Rename: _rename,
    UnitInverse: _unit_inverse,
    LowRank: _low_rank,
}


def evaluate(
    program: Program,
    inputs: Mapping[str, Tensor],
    *,
    scalars: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
    offsets: Mapping[str, int] | None = None,
    given: Mapping[str, Tensor] | None = None,
    wanted: Sequence[Var] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Evaluate a Program; returns the wanted variables (its outputs and gradients, unless told) by name.

    `inputs` maps names to tensors over the variable's axes in declared order.  Axis sizes come from the inputs' shapes,
    the program's integer extents and `sizes`; `offsets` shifts Iota along an axis, so that a chunk of queries can be
    evaluated alone; `given` overrides equations by name (a selection that a kernel made, say).  Only what the wanted
    variables need is evaluated, and a value is freed after its last use.  Raises ProgramError for a missing input or
    axes that disagree.
    """
    given = dict(given or {})
    if wanted is None:
        wanted = [*program.outputs, *(g for _, g in program.gradients)]
    live = needed(program, wanted, stop=given.keys())
    values: dict[Var, Tensor] = {}
    known = _sizes(program, inputs, sizes or {}, live)
    device = next(iter(inputs.values())).device if inputs else torch.device("cpu")
    extents = {e.name: known[a] for a, e in program.axes if isinstance(e, sp.Symbol) and a in known}
    world = World(program.order, known, offsets or {}, extents | dict(scalars or {}), dtype, device)
    for v in program.inputs:
        if v in live:
            values[v] = inputs[v.name].to(dtype) if v.kind == "real" else inputs[v.name]
    equations = [eq for eq in program.equations if eq.out in live]
    last_use = {v: i for i, eq in enumerate(equations) for v in eq.args}
    last_use.update(dict.fromkeys(wanted, len(equations)))
    for i, eq in enumerate(equations):
        if eq.out.name in given:
            values[eq.out] = given[eq.out.name]
            continue
        values[eq.out] = EVALUATE[type(eq.op)](world, eq, [values[a] for a in eq.args])
        for v in {*eq.args, eq.out}:
            if last_use.get(v, -1) <= i:
                values.pop(v, None)
    return {v.name: values[v] for v in wanted}


def needed(program: Program, wanted: Sequence[Var], stop: Sequence[str] | object = ()) -> set[Var]:
    """Every variable that the wanted ones depend on, not looking behind the names in `stop`."""
    definitions, seen, todo = program.definitions, set[Var](), list(wanted)
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if v in definitions and v.name not in stop:  # type: ignore[operator]
            todo.extend(definitions[v].args)
    return seen


def _sizes(program: Program, inputs: Mapping[str, Tensor], told: Mapping[str, int], live: set[Var]) -> dict[str, int]:
    known = {a: e for a, e in program.axes if isinstance(e, int)} | dict(told)
    for v in program.inputs:
        if v not in live:
            continue
        if v.name not in inputs:
            raise ProgramError(f"{program.name} needs input {v}", hint=f"given: {', '.join(sorted(inputs))}")
        shape = inputs[v.name].shape
        if len(shape) != len(v.axes):
            raise ProgramError(f"{v} has {len(v.axes)} axes, the tensor given has shape {tuple(shape)}")
        for axis, size in zip(v.axes, shape, strict=True):
            if known.setdefault(axis, size) != size:
                raise ProgramError(f"axis {axis} of {v} is {size} in the tensor given, and {known[axis]} elsewhere")
    symbols = {e: known[a] for a, e in program.axes if a in known}
    return {a: symbols[e] for a, e in program.axes if e in symbols} | known
