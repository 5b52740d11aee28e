"""Kernels of the router: gates and choices per token, totals over tokens, and the gradient of the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from splagen.codegen.chunk_code import ChunkCode, tile_axes
from splagen.codegen.kernel import Array, Kernel
from splagen.codegen.region import padded_extent
from splagen.ir.program import Equation, Program, Reduce, slice_back

SCALARS = {"B": "1", "L": "T", "H": "HEADS"}
SLOT_OF_PLAN = (
    "at = (router * T + token).to(tl.int64) * CHOICES + choice",
    "slot = tl.load(places_ptr + at, mask=row_ok, other=0)",
    "partition = tl.load(chosen_ptr + at, mask=row_ok, other=0)",
)
SLOT_OF_PARTITION = ("slot = choice * T + token", "partition = row * 0 + choice")


def routing(name: str, *features: str) -> Array:
    """A contiguous tensor of the router."""
    return Array(name, "routing", features, (), "float32")


class Router:
    """Builds the kernels from the router's program with its derived gradient."""

    def __init__(self, program: Program, choices: int, by_head: bool, group_size: int) -> None:
        """`choices` is the number of slots of a token: the partitions chosen, or all of them."""
        self.program, self.choices, self.by_head, self.group_size = program, choices, by_head, group_size
        self.partitions = int(str(program.extents["p"]))
        self.eta, self.balance = program.outputs
        (self.logits,) = program.inputs[:1]
        self.totals = [eq for eq in slice_back(program, [self.balance], program.inputs) if self._is_total(eq)]

    def _is_total(self, eq: Equation) -> bool:
        return isinstance(eq.op, Reduce) and tile_axes(eq.out) == ("p",) and "i" in eq.op.axes

    @property
    def router(self) -> str:
        """Source of the number of routers: one for all heads, or one per key head."""
        return "H" if self.by_head else "1"

    def _code(self) -> ChunkCode:
        return ChunkCode(self.program, scalars=SCALARS)

    def _columns(self) -> list[str]:
        n = self.partitions
        return [f"p = tl.arange(0, {padded_extent(n)})", *([f"p_ok = p < {n}"] if padded_extent(n) != n else [])]

    @property
    def _mask(self) -> str:
        padded = padded_extent(self.partitions) != self.partitions
        return "row_ok[:, None] & p_ok[None, :]" if padded else "row_ok[:, None]"

    @property
    def array(self) -> Array:
        """The logits [T, N] or [T, H, N]."""
        return Array("logits", "token_rows", ("p",), (self.partitions,))

    def _load(self) -> str:
        head = " + router * logits_h" if self.by_head else ""
        place = f"logits_ptr + (token.to(tl.int64) * logits_t{head})[:, None] + p[None, :]"
        return f"logits = tl.load({place}, mask={self._mask}, other=0.0).to(tl.float32)"

    def forward(self) -> Kernel:
        """Logits -> gates [R, T, N], masks [R, N, T], the partitions chosen [R, T, k], and partial totals."""
        program, code = self.program, self._code()
        code.bind(self.logits, "logits")
        masks = [program.var(n) for n in ("write", "read") if n in program.names()]
        summed = [eq.args[0] for eq in self.totals]
        equations = slice_back(program, [self.eta, *masks, *summed], program.inputs)
        code.emit(equations)
        lines = [f"tl.store(eta_ptr + at, {code.names[self.eta]}, mask={self._mask})"]
        for v in masks:
            mask = f"{code.names[v]} & {self._mask}"
            lines.append(f"tl.store({v.name}s_ptr + across, ({mask}).to(tl.int32), mask={self._mask})")
        for n, eq in enumerate(self.totals):
            source = code._summed(code._zeroed(eq.args[0], ("i", "p")), ("i", "p"), ("i",))
            lines.append(
                f"tl.store(sums_ptr + (tl.num_programs(0) * router + tl.program_id(0)) * SUMS + {n} * P + p, {source})"
            )
        outputs = [routing("eta"), *(routing(f"{v.name}s") for v in masks), routing("chosen"), routing("sums")]
        holes = {
            "columns": "\n".join(self._columns()),
            "load": self._load(),
            "body": "\n".join(code.lines),
            "stores": "\n".join(lines),
            "choices": self.choices,
            "write": code.names[masks[0]],
            "mask": self._mask,
            "partitions": self.partitions,
            "padded": padded_extent(self.partitions),
            "sums": len(self.totals) * padded_extent(self.partitions),
        }
        return Kernel(
            "route",
            "route",
            tuple(equations),
            (self.array,),
            tuple(outputs),
            holes,
            f"(cdiv(T, CHUNK), {self.router})",
            scalars=("T",),
            tunable=("CHUNK",),
        )

    def totals_kernel(self) -> Kernel:
        """Partial totals -> totals [kinds, N], and the equations behind them: the balance loss."""
        program, code = self.program, self._code()
        wide = padded_extent(self.partitions)
        lines = []
        for n, eq in enumerate(self.totals):
            assert isinstance(eq.op, Reduce)
            divide = " / tl.maximum(T * HEADS, 1)" if eq.op.how == "mean" else ""
            lines.append(f"{eq.out.name} = total_{n}{divide}")
            lines.append(f"tl.store(totals_ptr + {n} * {wide} + p, {eq.out.name})")
            code.bind(eq.out, eq.out.name)
        equations = slice_back(program, [self.balance], [eq.out for eq in self.totals])
        code.emit(equations)
        holes = {
            "kinds": list(range(len(self.totals))),
            "padded": wide,
            "body": "\n".join([*lines, *code.lines]),
            "balance": code.names[self.balance],
        }
        return Kernel(
            "route_totals",
            "route_totals",
            (*self.totals, *equations),
            (routing("sums"),),
            (routing("totals"), routing("balance")),
            holes,
            "(1,)",
            scalars=("T", "HEADS", "ROWS"),
            tunable=(),
        )

    def gradient(self, plan: Array | None, parts: Array | None) -> Kernel:
        """Gradients of gates per slot and head, and of the balance loss -> gradient of the logits.

        Without a plan the slots of a token are those of all partitions: slot p T + t.  `parts` are the gradients of
        gates, None where nothing reads the gates.
        """
        program, code = self.program, self._code()
        (_, deta), (_, dbalance) = program.cotangents
        code.bind(self.logits, "logits")
        code.bind(deta, "deta")
        code.bind(dbalance, "dbalance")
        wide = padded_extent(self.partitions)
        lines = []
        for n, eq in enumerate(self.totals):
            lines.append(f"{eq.out.name} = tl.load(totals_ptr + {n} * {wide} + p)")
            code.bind(eq.out, eq.out.name)
        ((_, g),) = program.gradients
        stop = [*program.inputs, *(eq.out for eq in self.totals)]
        equations = slice_back(program, [g], stop)
        code.emit(equations)
        source = code.names[g]
        head = " + router * dlogits_h" if self.by_head else ""
        holes: Mapping[str, object] = {
            "columns": "\n".join(self._columns()),
            "load": self._load(),
            "totals": "\n".join(lines),
            "body": "\n".join(code.lines),
            "parts": parts.name if parts else "",
            "choices": self.choices,
            "padded": wide,
            "slot": "\n".join(SLOT_OF_PLAN if plan else SLOT_OF_PARTITION),
            "first_head": f"router * {self.group_size}" if self.by_head else "0",
            "last_head": f"(router + 1) * {self.group_size}" if self.by_head else "HV",
            "store": f"tl.store(dlogits_ptr + (token.to(tl.int64) * dlogits_t{head})[:, None] + p[None, :], {source}, "
            f"mask={self._mask})",
        }
        return Kernel(
            "route_gradient",
            "route_gradient",
            tuple(equations),
            (
                *([replace(plan, features=("places",))] if plan else []),
                self.array,
                *([routing("chosen")] if plan else []),
                *([parts] if parts else []),
                routing("totals"),
                routing("dbalance"),
            ),
            (Array("dlogits", "token_rows", ("p",), (self.partitions,), "float32"),),
            holes,
            f"(cdiv(T, CHUNK), {self.router})",
            scalars=("T", "HV", "HEADS"),
            tunable=("CHUNK",),
        )
