"""Every causal spec that selects by token has the kernels of a step, and its module is Python."""

import ast

import pytest

from splagen.codegen.decode_module import decode_module_text
from splagen.codegen.decoding import decoding
from splagen.codegen.schedule import check_fields
from splagen.spec import SPLASpec, digest, to_toml
from tests.kernels.cases import GPU, SMALL

SPECS = [c.spec for c in (*SMALL, *GPU) if c.spec.causal and not (c.spec.select and c.spec.select.tile > 1)]


def text(spec: SPLASpec) -> str:
    return decode_module_text(decoding(spec), spec, digest=digest(spec)[:8], spec_text=to_toml(spec))


def test_every_such_spec_becomes_kernels() -> None:
    for spec in SPECS:
        ast.parse(text(spec))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_default_schedules_have_what_kernels_take(arch: str) -> None:
    for spec in SPECS[:12]:
        part = decoding(spec)
        module = ast.parse(text(spec))
        (table,) = [
            ast.literal_eval(s.value)
            for s in module.body
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) and s.targets[0].id == "SCHEDULES"
        ]
        for schedules in table[arch].values():
            for kernel in part.kernels:
                given = {n: v for n, v in schedules[kernel.name].items() if n != "maxnreg"}
                check_fields(kernel, given)


def test_the_same_spec_gives_the_same_text() -> None:
    assert text(SPECS[0]) == text(SPECS[0])
