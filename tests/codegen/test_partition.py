"""Partition takes every equation or says which it does not, and templates get exactly their holes."""

from dataclasses import replace

import pytest
import sympy as sp

from splagen.codegen.kernel import Kernel
from splagen.codegen.partition import partition
from splagen.codegen.render import kernel_text, render, template_directory
from splagen.errors import PartitionError
from splagen.ir.build import Builder
from splagen.ir.frontend_spla import spla_program
from splagen.ir.gradient import derive_gradient
from splagen.ir.passes import LOWERING, run
from splagen.ir.program import Iota, Map, Program, TopK, Var
from splagen.ir.text import equation_text
from splagen.pipeline import kernels
from splagen.spec import SPLASpec
from tests.kernels.cases import GPU, SMALL

CASES = {c.name: c.spec for c in (*SMALL, *GPU)}


def lowered(spec: SPLASpec) -> Program:
    return run(derive_gradient(spla_program(spec)), LOWERING)


@pytest.mark.parametrize("name", CASES)
def test_every_equation_is_covered_or_printed_where_it_is_read(name: str) -> None:
    part = kernels(CASES[name])
    covered = {eq for k in part.kernels for eq in k.covers}
    loose = [eq for eq in part.program.equations if eq not in covered]
    for eq in loose:  # positions and what follows from them alone, or sums of parameters
        of_position = isinstance(eq.op, Iota) or (eq.out.kind == "bool" and not isinstance(eq.op, TopK))
        assert of_position or _is_of_parameters(eq.out, part.program), equation_text(eq)
    assert covered <= set(part.program.equations)


def _is_of_parameters(v: Var, program: Program) -> bool:
    return not {"b", "T", "m", "J", "C", "n"} & set(v.axes) and isinstance(program.definitions[v].op, Map)


@pytest.mark.parametrize("name", ["default", "everything at once", "dense", "tile 32 non-causal"])
def test_what_a_kernel_reads_was_stored_before(name: str) -> None:
    part = kernels(CASES[name])
    for side, start in (
        (part.forward, part.inputs),
        (part.backward, [*part.inputs, *part.residuals, *part.cotangents]),
    ):
        known = {a.name for a in start} | {"work"}
        for kernel in side:
            missing = [a.name for a in kernel.inputs if a.name not in known]
            assert not missing, f"{kernel.name} reads {missing}"
            known |= {a.name for a in kernel.outputs}
    stored = {a.name for k in part.forward for a in k.outputs}
    assert {a.name for a in (*part.outputs, *part.saved)} <= stored
    assert {v.name for _, v in part.gradients} <= {v.name for v in (eq.out for eq in part.program.equations)}


def test_a_kernel_covers_what_its_docstring_lists() -> None:
    part = kernels(CASES["default"])
    for kernel in part.kernels:
        text = kernel_text(kernel)
        for eq in kernel.covers:
            assert equation_text(eq) in text


# -- what no family takes ----------------------------------------------------------------------------------


def continued(program: Program, b: Builder, extra: Var) -> Program:
    """The program with what the builder added, as another output."""
    return replace(b.program(*program.outputs, extra), cotangents=program.cotangents, gradients=program.gradients)


def test_an_equation_of_no_family_is_printed() -> None:
    """A running sum over queries: no kernel of attention makes one."""
    program = lowered(CASES["dense"])
    b = Builder.resume(program)
    total = b.cumsum("total", ["T", "m"], program.var("lse"))
    with pytest.raises(PartitionError) as caught:
        partition(continued(program, b, total))
    assert equation_text(b.equations[-1]) in str(caught.value)


def test_a_sum_over_queries_of_forward_is_refused() -> None:
    """The attention that a key receives: forward kernels own rows of queries."""
    program = lowered(CASES["dense"])
    b = Builder.resume(program)
    scores = program.var("p")
    received = b.contract("received", [a for a in scores.axes if a not in ("T", "m", "g")], scores)
    with pytest.raises(PartitionError):
        partition(continued(program, b, received))


def test_two_softmaxes_over_keys_are_refused() -> None:
    program = lowered(CASES["dense"])
    b = Builder.resume(program)
    s, mask = program.var("s"), program.definitions[program.var("lse")].args[1]
    again = b.lse("again", ["J", "C", "n"], b.map("twice", lambda x: 2 * x, s), mask)
    with pytest.raises(PartitionError, match="one masked softmax over keys"):
        partition(continued(program, b, again))


def test_a_mask_that_depends_on_data_is_refused() -> None:
    program = lowered(CASES["dense"])
    b = Builder.resume(program)
    lse = program.definitions[program.var("lse")]
    loud = b.map("loud", lambda s, seen: sp.And(s > 0, seen), *lse.args)
    changed = [replace(eq, args=(eq.args[0], loud)) if eq == lse else eq for eq in program.equations]
    where = changed.index(next(eq for eq in changed if eq.out == lse.out))
    changed.insert(where, b.equations[-1])
    with pytest.raises(PartitionError, match="depends on data"):
        partition(program.with_equations(changed))


# -- templates ---------------------------------------------------------------------------------------------


def any_kernel() -> Kernel:
    return next(k for k in kernels(CASES["dense"]).kernels if k.template == "block_sparse_forward")


def test_a_hole_without_a_value_is_an_error() -> None:
    kernel = any_kernel()
    fewer = {k: v for k, v in kernel.holes.items() if k != "epilogue"}
    with pytest.raises(PartitionError, match=r"block_sparse_forward: holes without a value \['epilogue'\]"):
        kernel_text(replace(kernel, holes=fewer))


def test_a_value_without_a_hole_is_an_error() -> None:
    kernel = any_kernel()
    with pytest.raises(PartitionError, match=r"values without a hole \['epilog'\]"):
        kernel_text(replace(kernel, holes={**kernel.holes, "epilog": ""}))


@pytest.mark.parametrize("template", sorted(p.stem for p in template_directory().glob("*.jinja")))
def test_every_template_checks_its_holes(template: str) -> None:
    with pytest.raises(PartitionError, match=f"template {template}: .*values without a hole \\['nonsense'\\]"):
        render(template, {"nonsense": 1})


@pytest.mark.parametrize("template", sorted(template_directory().glob("*.jinja")), ids=lambda p: p.stem)
def test_templates_hold_no_decisions(template) -> None:  # type: ignore[no-untyped-def]
    """At most three structural flags, and nothing of a spec."""
    text = template.read_text()
    assert text.count("{% if") <= 3
    for word in ("causal", "hedgehog", "softcap", "alibi", "normaliser", "temperature"):
        assert word not in text
