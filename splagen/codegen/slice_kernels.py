"""Kernels of rows that read the states around a chunk, in slices of its columns.

Where nothing is carried from chunk to chunk, columns e of v, of the states and of their cotangents meet in sums over e
alone.  A program walks over slices of them and keeps the sums, so that neither a whole state nor all rows of v have to
fit into registers; the equations behind the sums follow once per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splagen.codegen.chunk_code import tile_axes
from splagen.codegen.chunk_kernels import Loop
from splagen.codegen.kernel import Array, Kernel
from splagen.errors import PartitionError
from splagen.ir.passes import drop_unused, run, share
from splagen.ir.products import reuse, reuse_sums
from splagen.ir.program import Equation, Var, slice_back

COLUMN = "e"


class SliceLoop(Loop):
    """Builds one loop over chunks with a loop over slices of columns in each."""

    def rows_kernel(self, rows: Sequence[tuple[Var, Array, Array | None]], states: Array, cotangents: Array) -> Kernel:
        """The kernel that stores `rows` (variable, where to, what is added) for every chunk.

        `states`: those before each chunk; `cotangents`: those of the states after it.
        """
        self.plan = self.r.pieces
        code, wanted = self.code, [v for v, _, _ in rows]
        equations = self._simplified(wanted)
        inner = [eq for eq in equations if any(COLUMN in tile_axes(v) for v in (eq.out, *eq.args))]
        sums = frozenset(eq.out for eq in inner if COLUMN not in tile_axes(eq.out))
        needed = {v for eq in inner for v in eq.args if COLUMN not in tile_axes(v)}
        program = replace(self.r.program, equations=tuple(equations))
        ahead = slice_back(program, needed - sums, program.inputs)
        for eq in ahead:
            if eq in inner or eq.out in sums:
                raise PartitionError(f"{self.name}: a column needs {eq.out}, which sums all columns")
        behind = [eq for eq in equations if eq not in inner and eq not in ahead]
        targets = {v: (array, base) for v, array, base in rows}

        read = [v for eq in equations for v in eq.args if v in self.r.program.inputs]
        around = {v: n for every in (self.before, self.r.states) for n, v in enumerate(every)}
        loads = {}
        for v in dict.fromkeys(read):
            held = cotangents if v in self.before else states
            loads[v] = self._load_state(v, held, around[v]) if v in around else self._load(v, None)
        early = {v for eq in ahead for v in eq.args} | needed
        code.sums = sums
        sections = []
        end: list[str] = []
        for part, mine in (
            (ahead, [v for v in loads if v in early and COLUMN not in tile_axes(v)]),
            (inner, [v for v in loads if COLUMN in tile_axes(v)]),
            (behind, [v for v in loads if v not in early and COLUMN not in tile_axes(v)]),
        ):
            code.lines = []
            outside = {v for eq in equations if eq not in part for v in eq.args}
            stored = {v: targets[v] for v in targets if any(eq.out == v for eq in part)}
            end += self._emit(part, {v: loads[v] for v in mine}, stored, outside)
            sections.append(code.lines)
        self.equations = equations
        zeros = [f"{v.name} = {self._zeros(v)}" for v in sorted(sums, key=lambda v: v.name)]
        return self._built(self.once, [*sections[0], *zeros], sections[1], sections[2], end)

    def _simplified(self, wanted: Sequence[Var]) -> list[Equation]:
        """The equations of the wanted rows, without products that others of them make needless."""
        r = self.r
        part = slice_back(r.program, wanted, r.program.inputs)
        alone = replace(r.program, equations=tuple(part), outputs=tuple(wanted), gradients=(), cotangents=())
        return list(run(alone, (reuse, reuse_sums, share, drop_unused)).equations)

    def _zeros(self, v: Var) -> str:
        extents = [self.code.extent(a) for a in tile_axes(v)]
        return f"tl.zeros([{', '.join(extents)}], tl.float32)" if extents else "0.0"
