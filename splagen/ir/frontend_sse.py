"""SSE as a Program: linear attention whose state is expanded into sparsely routed partitions (arXiv 2507.16577).

One sequence, or a batch of sequences of one length.  The router is a Program of token rows; a recurrence maps a
sequence and the state before it to outputs and the state after it.  It is written in parallel form, as what it means,
and equals itself under composition: running it over a sequence is running it over the first part and then, from the
state reached, over the second.  That law gives chunks, the decoding step (a chunk of one token), and the oracle's time.

A token that is not routed to a partition neither writes nor decays nor reads it.

Axes: b sequence, h key head, g value head inside its group, i position that reads, j position that writes, l a third
position, p partition, d key feature, e value feature.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import sympy as sp

from splagen.expression import symbol
from splagen.expression_text import parse
from splagen.ir.build import Builder
from splagen.ir.program import Program, Var
from splagen.library import FeatureMap
from splagen.sse_spec import Router, SSESpec

State: TypeAlias = Literal["shared", "sparse"]
NORM_EPS = sp.Rational(1, 10**6)
SUFFIX = {"shared": "1", "sparse": "2"}


def states(spec: SSESpec) -> tuple[State, ...]:
    """The kinds of state that a spec has."""
    shared: tuple[State, ...] = ("shared",) if spec.shared else ()
    sparse: tuple[State, ...] = ("sparse",) if spec.router else ()
    return shared + sparse


def held_masks(spec: SSESpec) -> tuple[str, ...]:
    """The masks that hold for every row of a partition: in sorted form its rows are those that it was routed."""
    return ("write",) if spec.form == "sorted" else ()


def sse_program(spec: SSESpec) -> Program:
    """The whole definition: outputs o, the final states, and the balance loss where there is a router."""
    b = _builder(spec)
    v = b.input("v", ("b", "h", "g", "j", "e"))
    outputs, finals = [], []
    routed = add_router(b, spec.router) if spec.router else None
    for kind in states(spec):
        o, final = _Recurrence(b, spec, kind, v).add(routed[:3] if routed and kind == "sparse" else None)
        outputs.append(o)
        finals.append(final)
    o = outputs[0] if len(outputs) == 1 else b.map("o", lambda x, y: x + y, *outputs)
    return b.program(o, *finals, *([routed[3]] if routed else []))


def router_program(spec: SSESpec) -> Program:
    """The router alone: logits -> eta and the balance loss; its masks are the variables write and read."""
    assert spec.router is not None
    b = _builder(spec)
    eta, _, _, loss = add_router(b, spec.router)
    return b.program(eta, loss)


def recurrence_program(spec: SSESpec, kind: State) -> Program:
    """One recurrence alone: inputs q, k, v, decay, (eta, write, read) and the state before; outputs o, state after."""
    b = _builder(spec)
    v = b.input("v", ("b", "h", "g", "j", "e"))
    routed: tuple[Var | None, Var, Var] | None = None
    if kind == "sparse":
        assert spec.router is not None
        head = ("h",) if spec.router.scope == "head" else ()
        axes = ("b", *head, "i", "p")
        eta = b.input("eta", axes) if spec.router.gate != "none" else None
        write = b.input("write", axes, "bool")
        one = spec.router.readers == spec.router.writers
        routed = (eta, write, write if one else b.input("read", axes, "bool"))
    return b.program(*_Recurrence(b, spec, kind, v).add(routed))


def _builder(spec: SSESpec) -> Builder:
    length = symbol("L")
    partitions = spec.router.partitions if spec.router else 1
    return Builder(
        spec.name,
        [
            ("b", symbol("B")), ("h", symbol("H")), ("g", spec.group_size),
            ("i", length), ("j", length), ("l", length),
            ("p", partitions), ("d", spec.head_dim), ("e", spec.value_dim),
        ],
    )  # fmt: skip


def add_router(b: Builder, router: Router) -> tuple[Var, Var, Var, Var]:
    """Gates eta, the masks of partitions written and read, and the balance loss N/k sum_n p_n f_n."""
    head = ("h",) if router.scope == "head" else ()
    logits = b.input("logits", ("b", *head, "i", "p"))
    write = b.topk("write", router.writers, "p", logits)
    read = write if router.readers == router.writers else b.topk("read", router.readers or 0, "p", logits)
    everything = b.softmax("share", ("p",), logits)
    eta = everything if router.normalise == "all" else b.softmax("eta", ("p",), logits, write)
    tokens = ("b", *head, "i")
    used = b.map("used", lambda m: sp.Piecewise((1, m), (0, True)), write)
    load = b.reduce("load", "mean", tokens, used)
    probability = b.reduce("probability", "mean", tokens, everything)
    factor = sp.Rational(router.partitions, router.writers)
    loss = b.map("balance", lambda x: factor * x, b.contract("balance_sum", (), load, probability))
    return eta, write, read, loss


class _Recurrence:
    """Adds the equations of one kind of state."""

    def __init__(self, b: Builder, spec: SSESpec, kind: State, v: Var) -> None:
        self.b, self.spec, self.v = b, spec, v
        n = self.n = SUFFIX[kind]
        self.p = ("p",) if kind == "sparse" else ()
        self.q = b.input(f"q{n}", ("b", "h", "i", "d"))
        self.k = b.input(f"k{n}", ("b", "h", "j", "d"))
        self.g = self.beta = None
        if spec.backbone != "none":
            axes = {"constant": ("h", "g"), "vector": ("b", "h", "i", "d")}.get(spec.backbone, ("b", "h", "g", "i"))
            self.g = b.input(f"g{n}", axes)
        if spec.backbone == "delta":
            self.beta = b.input(f"beta{n}", ("b", "h", "g", "j"))
        self.state = b.input(f"state{n}", ("b", "h", "g", *self.p, "d", "e"))

    def add(self, routed: tuple[Var | None, Var, Var] | None) -> tuple[Var, Var]:
        """Outputs o and the state after the sequence (sse.md sections 5 and 6)."""
        eta, write, read = routed or (None, None, None)
        gate = self.spec.router.gate if self.spec.router and routed else "none"
        q = self.features("q", self.q, self.spec.q_map, eta if gate in ("both", "read") else None, read, self.scale)
        k = self.features("k", self.k, self.spec.k_map, eta if gate in ("both", "write") else None, write, sp.S.One)
        decay = self.decay(write)
        if self.spec.backbone == "vector":
            return self.vector(q, k, decay)
        return self.scalar(q, k, decay)

    @property
    def scale(self) -> sp.Expr:
        usual = 1 / sp.sqrt(self.spec.head_dim)
        return usual if self.spec.scale == self.spec.head_dim**-0.5 else sp.Rational(repr(self.spec.scale))

    def name(self, stem: str) -> str:
        return f"{stem}{self.n}"

    # -- rows ------------------------------------------------------------------------------------------------------

    def features(
        self, side: Literal["q", "k"], x: Var, phi: FeatureMap, eta: Var | None, mask: Var | None, scale: sp.Expr
    ) -> Var:
        """Phi of the rows, times the gate, 0 where the partition is not selected (sse.md sections 4 and 14.1)."""
        b, n = self.b, self.n
        if eta is not None and side == "k":
            eta = b.rename(self.name("eta_k"), eta, i="j")
        if mask is not None and side == "k":
            mask = b.rename(self.name("write_k"), mask, i="j")
        raw = parse(phi.expression, {"x"}).xreplace({symbol("x"): symbol("x0")})
        y = x if raw == symbol("x0") else b.map(f"map_{side}{n}", raw, x)
        if phi.softmax:
            kept = b.topk(f"rows_{side}{n}", phi.topk, "d", y) if phi.topk else None
            y = b.softmax(f"soft_{side}{n}", ("d",), y, kept)
        if phi.l2norm:
            y = self.unit(side, y)
        if self.spec.backbone == "delta":
            if self.spec.gate_site == "pre_norm" and eta is not None:
                y, eta = b.map(f"gated_{side}{n}", lambda u, w: u * w, y, eta), None
            y = self.unit(side, y)

        args = [y, *(a for a in (eta, mask) if a is not None)]

        def gated(u: sp.Expr, *rest: sp.Expr) -> sp.Expr:
            value = scale * u * (rest[0] if eta is not None else 1)
            return sp.Piecewise((value, rest[-1]), (0, True)) if mask is not None else value

        return b.map(f"phi_{side}{n}", gated, *args) if len(args) > 1 or scale != 1 else y

    def unit(self, side: str, y: Var) -> Var:
        """Rows of unit length: y (sum y^2 + eps)^(-1/2)."""
        b, n = self.b, self.n
        size = b.contract(f"size_{side}{n}", [a for a in y.axes if a != "d"], y, y)
        return b.map(f"unit_{side}{n}", lambda u, s: u * (s + NORM_EPS) ** sp.Rational(-1, 2), y, size)

    def decay(self, write: Var | None) -> Var | None:
        """Cumulative log decay; a partition that is not written does not decay."""
        if self.g is None:
            return None
        b, g = self.b, self.g
        if "i" not in g.axes:
            along = b.iota(self.name("along"), "i")
            g = b.map(self.name("g_rows"), symbol("x0"), g, along)
        if write is not None:
            g = b.map(self.name("open_g"), lambda x, m: sp.Piecewise((x, m), (0, True)), g, write)
        self.steps = g
        return b.cumsum(self.name("decay"), ("i",), g)

    # -- the recurrence ----------------------------------------------------------------------------------------------

    def pair(self, name: str, rule: sp.Expr, *args: Var, strict: bool = False) -> Var:
        """An expression of pairs of positions where the writer comes before the reader (or is it)."""
        b = self.b
        i, j = b.iota(self.name("row"), "i"), b.iota(self.name("column"), "j")
        a, c = (symbol(f"x{len(args) + n}") for n in (0, 1))
        before = sp.Lt(c, a) if strict else sp.Le(c, a)
        return b.map(name, sp.Piecewise((rule, before), (0, True)), *args, i, j)

    def scalar(self, q: Var, k: Var, decay: Var | None) -> tuple[Var, Var]:
        """One decay per row (or none), additive or by the delta rule in WY form."""
        b, name = self.b, self.name
        rows = ("b", "h", "g", *self.p)
        s = b.contract(name("qk"), ("b", "h", *self.p, "i", "j"), q, k)
        if decay is None:
            a = self.pair(name("a"), symbol("x0"), s)
        else:
            late = b.rename(name("decay_k"), decay, i="j")
            between = self.pair(name("between"), sp.exp(symbol("x0") - symbol("x1")), decay, late)
            a = b.map(name("a"), lambda x, y: x * y, s, between)
        values = self.v if self.spec.backbone != "delta" else self.corrected(k, late, between)
        out = b.contract(name("o_inside"), ("b", "h", "g", "i", "e"), a, values)
        past = b.contract(name("past"), (*rows, "i", "e"), q, self.state)
        if decay is None:
            before = b.reduce(name("o_before"), "sum", self.p, past) if self.p else past
            added = b.contract(name("added"), (*rows, "d", "e"), k, values)
            final = b.map(name("final"), lambda h, u: h + u, self.state, added)
        else:
            since = b.map(name("since"), lambda x: sp.exp(x), decay)
            before = b.contract(name("o_before"), ("b", "h", "g", "i", "e"), since, past)
            total = b.reduce(name("total"), "sum", ("i",), self.steps)
            until = b.map(name("until"), lambda t, x: sp.exp(t - x), total, late)
            weighed = b.map(name("weighed"), lambda x, w: x * w, k, until)
            added = b.contract(name("added"), (*rows, "d", "e"), weighed, values)
            whole = b.map(name("whole"), lambda t: sp.exp(t), total)
            final = b.map(name("final"), lambda h, w, u: h * w + u, self.state, whole, added)
        return b.map(name("o"), lambda x, y: x + y, out, before), final

    def corrected(self, k: Var, late: Var, between: Var) -> Var:
        """What the delta rule writes in place of v: U = (I + tril(beta k k^T decay, -1))^-1 beta (v - decay k h)."""
        b, name = self.b, self.name
        assert self.beta is not None
        rows = ("b", "h", "g", *self.p)
        k_row = b.rename(name("k_row"), k, j="i")
        kk = b.contract(name("kk"), ("b", "h", *self.p, "i", "j"), k_row, k)
        beta_row = b.rename(name("beta_row"), self.beta, j="i")
        product = symbol("x0") * symbol("x1") * symbol("x2")
        mixing = self.pair(name("mixing"), product, kk, between, beta_row, strict=True)
        inverse = b.unit_inverse(name("inverse"), mixing)
        seen = b.contract(name("seen"), (*rows, "j", "e"), k, self.state)
        since = b.map(name("since_k"), lambda x: sp.exp(x), late)
        target = b.map(name("target"), lambda w, v, c, y: w * (v - c * y), self.beta, self.v, since, seen)
        new = b.contract(name("new"), (*rows, "i", "e"), inverse, target)
        return b.rename(name("new_k"), new, i="j")

    def vector(self, q: Var, k: Var, decay: Var | None) -> tuple[Var, Var]:
        """One decay per row and key feature (GLA): the decay stands inside the sum over features."""
        b, name = self.b, self.name
        assert decay is not None
        rows = ("b", "h", *self.p)
        late = b.rename(name("decay_k"), decay, i="j")
        between = self.pair(name("between"), sp.exp(symbol("x0") - symbol("x1")), decay, late)
        a = b.contract(name("a"), (*rows, "i", "j"), q, k, between)
        out = b.contract(name("o_inside"), ("b", "h", "g", "i", "e"), a, self.v)
        since = b.map(name("since"), lambda c: sp.exp(c), decay)
        reaching = b.map(name("reaching"), lambda x, w: x * w, q, since)
        before = b.contract(name("o_before"), ("b", "h", "g", "i", "e"), reaching, self.state)
        total = b.reduce(name("total"), "sum", ("i",), self.steps)
        until = b.map(name("until"), lambda t, c: sp.exp(t - c), total, late)
        weighed = b.map(name("weighed"), lambda x, w: x * w, k, until)
        added = b.contract(name("added"), ("b", "h", "g", *self.p, "d", "e"), weighed, self.v)
        whole = b.map(name("whole"), lambda t: sp.exp(t), total)
        final = b.map(name("final"), lambda h, w, u: h * w + u, self.state, whole, added)
        return b.map(name("o"), lambda x, y: x + y, out, before), final
