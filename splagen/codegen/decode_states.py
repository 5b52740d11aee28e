"""The sums over far blocks that a decoding step carries, found from the equations."""

from __future__ import annotations

from dataclasses import dataclass

from splagen.codegen.geometry import Geometry, features_of, is_key_row
from splagen.codegen.kernel import Array
from splagen.errors import PartitionError
from splagen.ir.passes import signed_terms
from splagen.ir.program import Contract, Equation, Program, Var
from splagen.ir.text import equation_text


@dataclass(frozen=True)
class State:
    """A sum over far blocks that is carried: after = before + sum of `blocks` that became far; `read` by the queries.

    `late` is the sum over what became far since the first token of a step, `total` what the two add up to.  `left` are
    rows of features of keys; `right` the rows of values, None where the features alone are summed.
    """

    before: Var
    after: Var
    fresh: Var
    blocks: Equation
    new: Equation
    read: Equation
    late: Equation
    total: Equation
    row: Var
    left: Var
    right: Var | None

    @classmethod
    def of(cls, program: Program, before: Var, after: Var) -> State:
        """Find how a state is made and read; PartitionError quotes what no kernel does."""
        definitions = program.definitions
        new = next(definitions[v] for v in definitions[after].args if v != before)
        (fresh,) = [v for v in new.args if v.kind == "bool"]
        (summed,) = [v for v in new.args if v.kind == "real"]
        blocks = definitions[summed]
        reads = [eq for eq in program.equations if after in eq.args]
        rows = [v for v in blocks.args if v.kind == "real"]
        left = [v for v in rows if "d" in features_of(v)]
        right = [v for v in rows if v not in left]
        if len(reads) != 1 or not isinstance(reads[0].op, Contract) or len(reads[0].args) != 2:
            raise PartitionError(f"{after} is not read by one product: {'; '.join(map(equation_text, reads))}")
        totals = [eq for eq in program.equations if reads[0].out in eq.args]
        if len(totals) != 1 or (signed_terms(totals[0]) or {}).get(reads[0].out) != 1 or len(totals[0].args) != 2:
            what = "; ".join(map(equation_text, totals))
            raise PartitionError(f"{reads[0].out} is not added to what became far since: {what}")
        (late,) = [v for v in totals[0].args if v != reads[0].out]
        if len(left) != 1 or len(right) > 1 or not all(is_key_row(v) for v in rows):
            raise PartitionError(f"`{equation_text(blocks)}` is not one outer product of rows of keys")
        (row,) = [v for v in reads[0].args if v != after]
        return cls(
            before, after, fresh, blocks, new, reads[0], definitions[late], totals[0], row, left[0],
            right[0] if right else None,
        )  # fmt: skip

    def array(self, geometry: Geometry) -> Array:
        """[B, Hkv, left(, right)] float32."""
        features = features_of(self.before)
        left = geometry.width([a for a in features if a != "e"], pad=True)
        width = (left, geometry.width(["e"], pad=True)) if self.right else (left,)
        return Array(self.before.name, "sequences", features, width, "float32", True)


def fold_code(s: State, array: Array) -> dict[str, str]:
    """How blocks enter a state: the holes of the append template.

    They are summed apart: a product that starts from the state would cut off bits of it at every 16 keys, always
    towards zero, where adding the sum rounds once.
    """
    name, new, left = array.name, s.new.out.name, s.left.name
    base = f"{name}_ptr + (b * Hkv + h) * {array.width[0] * (array.width[1] if s.right else 1)}"
    if s.right is None:
        # every slice of columns adds it up, the first stores it
        return {
            "new": new,
            "shape": "(LEFT,)",
            "address": f"{base} + left",
            "add": f"{new} += tl.sum({left}.to(tl.float32), axis=0)",
            "mask": ", mask=left + first * LEFT < LEFT",
        }
    return {
        "new": new,
        "shape": "(BLOCK_E, LEFT)",
        "address": f"{base} + right[:, None] + left[None, :] * {array.width[1]}",
        "add": f'{new} = tl.dot(tl.trans({s.right.name}), {left}, {new}, input_precision="ieee")',
        "mask": "",
    }


def read_code(s: State, array: Array, row: Array, into: Var) -> dict[str, str]:
    """What a piece of a state's rows gives to the queries."""
    left = array.width[0]
    place = f"r * {row.name}_t + head * {row.name}_h"
    load = f"tl.load({row.name}_ptr + ({place})[:, None] + left[None, :], mask=row_ok[:, None], other=0.0)"
    base = f"{array.name}_ptr + (b * Hkv + h) * {left * (array.width[1] if s.right else 1)}"
    if s.right is None:
        add = f"{into.name} += tl.sum(piece_of_row.to(tl.float32) * tl.load({base} + left)[None, :], axis=1)"
    else:
        state = f"tl.load({base} + left[:, None] * {array.width[1]} + e[None, :])"
        add = f"{into.name} += tl.trans(dot_split(piece_of_row, {state}))"
    return {"row": "piece_of_row", "load_row": load, "add": add}
