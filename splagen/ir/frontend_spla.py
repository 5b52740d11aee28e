"""SPLA as a Program: the definition (arXiv 2601.22379; semantics pinned in docs/semantics.md), with nothing optimised.

The residual branch is written as what it means, linear attention over the far blocks that were not chosen; that it can
be computed by subtraction is for the passes to find.

Axes: b batch, h KV head, g query head inside its group, T tile of queries, m query inside the tile, J key block,
C statistics cell inside the block, n key inside the cell, s sign of the feature map, r factor of a covariance, d
query/key feature, e value feature.  Token selection is tile selection with tiles of one query.
"""

from __future__ import annotations

import sympy as sp

from splagen.expression import maximum, symbol
from splagen.expression_text import parse
from splagen.ir.build import Builder
from splagen.ir.program import Program, Var
from splagen.library import metric_expression
from splagen.spec import FeatureMap, Select, SPLASpec

RMS_EPS = sp.Rational(1, 10**6)
NORMALISER_EPS = sp.Rational(1, 10**6)
POWER_STEPS = 3  # of the power method behind each factor of a covariance: docs/semantics.md
DENSE_TILE = 64  # queries per tile and keys per block where nothing is selected: any value means the same
LENGTH = symbol("L")

ROW = ("b", "h", "g", "T", "m")
KEY = ("J", "C", "n")
LOGIT = (*ROW, *KEY)


def spla_program(spec: SPLASpec) -> Program:
    """The forward Program of a spec: inputs q, k, v (and gains, gates, temperature as the spec asks), output o."""
    return _Frontend(spec).program()


def tile_size(spec: SPLASpec) -> int:
    """Queries that share one selection."""
    return spec.select.tile if spec.select else DENSE_TILE


def block_size(spec: SPLASpec) -> int:
    """Keys of one selectable block."""
    return spec.select.block_size if spec.select else DENSE_TILE


def cell_size(spec: SPLASpec) -> int:
    """Keys that share one mean and variance."""
    return (spec.select.statistics.cell or spec.select.block_size) if spec.select else DENSE_TILE


class _Frontend:
    def __init__(self, spec: SPLASpec) -> None:
        self.spec = spec
        self.block, self.cell, self.tile = block_size(spec), cell_size(spec), tile_size(spec)
        cells = self.block // self.cell
        signs = spec.linear.feature_map.signs if spec.linear else 1
        rank = [("r", spec.select.metric.rank)] if spec.select and spec.select.metric.rank else []
        sizes: list[tuple[str, int | sp.Expr]] = [
            ("b", symbol("B")), ("h", symbol("Hkv")), ("g", spec.group_size), ("T", symbol("nT")), ("m", self.tile),
            ("J", symbol("nJ")), ("C", cells), ("n", self.cell), ("Jw", symbol("nJ")), ("Cw", cells),
            ("s", signs), *rank, ("d", spec.head_dim), ("e", spec.value_dim),
        ]  # fmt: skip
        b = self.b = Builder(spec.name, sizes, scalars=("L", "Hkv"))
        self.q = b.input("q", (*ROW, "d"))
        self.k = b.input("k", ("b", "h", *KEY, "d"))
        self.v = b.input("v", ("b", "h", *KEY, "e"))

    def program(self) -> Program:
        b, spec = self.b, self.spec
        self.qpos = b.iota("qpos", "T", "m")
        self.kpos = b.iota("kpos", *KEY)
        self.valid = b.map("valid", lambda j: sp.Lt(j, LENGTH), self.kpos)
        far = free = None
        if spec.select:
            far = self.far(spec.select)
            free = b.topk("free", spec.select.budget, "J", self.block_score(spec.select), far)
        o_s = self.softmax_branch(far, free)
        if not spec.linear or not far or not free:
            return b.program(o_s)
        return b.program(self.combine(o_s, self.residual_branch(far, free)))

    def rows(self, branch: str) -> tuple[Var, Var]:
        """Queries and keys of one branch alone, such as those before the rotation by position."""
        return self.b.input(f"q_{branch}", self.q.axes), self.b.input(f"k_{branch}", self.k.axes)

    @property
    def scale(self) -> sp.Expr:
        """The softmax scale: 1/sqrt(d) as such, any other as the decimal that the spec gives."""
        usual = 1 / sp.sqrt(self.spec.head_dim)
        return usual if self.spec.scale == self.spec.head_dim**-0.5 else sp.Rational(repr(self.spec.scale))

    def far(self, select: Select) -> Var:
        """Blocks that a tile may choose or leave: neither sinks nor near its own block (by its first query)."""
        tile, block, b = self.tile, self.block, self.b
        ti, ji = b.iota("tile", "T"), b.iota("block", "J")

        def rule(t: sp.Expr, j: sp.Expr) -> sp.Basic:
            before = sp.Ge(tile * t, block * (j + select.local + 1))
            after = sp.Lt(tile * t + tile - 1, block * (j - select.local))
            outside = before if self.spec.causal else sp.Or(before, after)
            long = [sp.Ge(LENGTH, self.spec.dense_below)] if self.spec.dense_below else []
            return sp.And(sp.Ge(j, select.sinks), outside, *long)

        return b.map("far", rule, ti, ji)

    # -- selection -----------------------------------------------------------------------------------------------

    def block_score(self, select: Select) -> Var:
        """score[b h T J]: attention mass that the metric expects in a block, per head normalised, summed over heads."""
        b, cell = self.b, self.cell
        q, k = self.rows("m") if select.own_rows else (self.q, self.k)
        width = select.statistics.width or cell
        diagonal = select.metric.order == 2 and not select.metric.rank
        mean = b.reduce("mean", "mean", ("n",), k, self.valid)
        variance = self.variance(k, mean) if diagonal else None
        if select.statistics.width:
            mean, variance = self.windows(mean, variance, width // cell)
        start = b.iota("cell", "J", "C")
        qpos, complete = self.qpos, self.spec.causal or bool(select.statistics.width)

        def usable(i: sp.Expr, c: sp.Expr) -> sp.Basic:
            last = cell * c + (width - 1 if complete else 0)
            return sp.And(sp.Lt(i, LENGTH), sp.Le(last, i) if self.spec.causal else sp.Lt(last, LENGTH))

        mask = b.map("usable", usable, qpos, start)
        scale = self.scale
        a = b.contract("a", (*ROW, "J", "C"), q, mean)
        metric = metric_expression(select.metric)
        args = [a]
        values = {symbol("a"): scale * symbol("x0")}
        if variance is not None:
            q2 = b.map("q2", lambda x: x * x, q)
            args.append(b.contract("kappa", (*ROW, "J", "C"), q2, variance))
        elif select.metric.rank:
            args.append(self.low_rank_kappa(q, k, mean))
        if len(args) > 1:
            values[symbol("kappa")] = scale**2 * symbol("x1")
        if not complete:
            # a partial last block holds fewer keys: log |B| enters its score
            args.append(
                b.map(
                    "size", lambda c: sp.Piecewise((LENGTH - cell * c, cell * c + cell > LENGTH), (cell, True)), start
                )
            )
            metric = metric + sp.log(symbol("size"))
            values[symbol("size")] = sp.Piecewise(
                (symbol(f"x{len(args) - 1}"), symbol(f"x{len(args) - 1}") > 0), (1, True)
            )
        score = b.map("metric", metric.xreplace(values), *args)
        share = b.softmax("share", ("J", "C"), score, mask)
        if select.statistics.pool == "logsum":
            return b.reduce("score", "sum", ("g", "m", "C"), share)
        return self.max_pool(share)

    def variance(self, k: Var, mean: Var) -> Var:
        square = self.b.map("centred2", lambda x, mu: (x - mu) ** 2, k, mean)
        return self.b.reduce("variance", "mean", ("n",), square, self.valid)

    def low_rank_kappa(self, q: Var, k: Var, mean: Var) -> Var:
        """q^T Cov q with the covariance of a cell's keys replaced by a sum of outer products w_r w_r^T."""
        b = self.b
        centred = b.map("centred", lambda x, mu: x - mu, k, mean)
        factor = b.low_rank("factor", centred, self.valid, rows="n", features="d", rank="r", steps=POWER_STEPS)
        along = b.contract("along", (*ROW, "J", "C", "r"), q, factor)
        return b.reduce("kappa", "sum", ("r",), b.map("along2", lambda x: x * x, along))

    def windows(self, mean: Var, variance: Var | None, cells: int) -> tuple[Var, Var | None]:
        """Statistics of windows of `cells` neighbouring cells, from those of the cells."""
        b = self.b
        here, there = b.iota("window", "J", "C"), b.iota("other", "Jw", "Cw")
        band = b.map("band", lambda i, j: sp.And(sp.Ge(j - i, 0), sp.Lt(j - i, cells)), here, there)
        keep = ("b", "h", "J", "C", "d")

        def over_window(name: str, x: Var) -> Var:
            total = b.contract(f"{name}_sum", keep, band, b.rename(f"{name}_w", x, J="Jw", C="Cw"))
            return b.map(name, lambda y: y / cells, total)

        wide = over_window("window_mean", mean)
        if variance is None:
            return wide, None
        second = b.map("second", lambda mu, var: var + mu**2, mean, variance)
        moment = over_window("window_second", second)
        return wide, b.map("window_variance", lambda x2, mu: x2 - mu**2, moment, wide)

    def max_pool(self, share: Var) -> Var:
        """InfLLM-v2's pooling: a block takes the largest of the windows that start in it or one stride before it."""
        b = self.b
        heads = b.reduce("share_sum", "sum", ("g", "m"), share)
        block, other = b.iota("first", "J"), b.iota("start", "Jw", "Cw")
        cells = self.block // self.cell
        touches = b.map(
            "touches", lambda j, w: sp.And(sp.Ge(w - cells * j, -1), sp.Lt(w - cells * j, cells)), block, other
        )
        return b.reduce("score", "max", ("Jw", "Cw"), b.rename("share_w", heads, J="Jw", C="Cw"), touches)

    # -- the two branches ----------------------------------------------------------------------------------------

    def softmax_branch(self, far: Var | None, free: Var | None) -> Var:
        """o_s: exact softmax over every key that is not far, or far and chosen (spla.md section 4)."""
        b, spec = self.b, self.spec
        scale = self.scale
        s = b.contract("qk", LOGIT, self.q, self.k)
        if spec.score:
            head = b.iota("head", "h", "g")
            expr = parse(spec.score.expression, {"s", "m", "n", "h", "H"})
            values = dict(zip("smnh", (scale * symbol("x0"), symbol("x1"), symbol("x2"), symbol("x3")), strict=True))
            values["H"] = symbol("Hkv") * spec.group_size
            s = b.map("s", expr.xreplace({symbol(n): v for n, v in values.items()}), s, self.qpos, self.kpos, head)
        else:
            s = b.map("s", lambda x: scale * x, s)
        seen = (
            b.map("seen", lambda i, j, ok: sp.And(ok, sp.Le(j, i)), self.qpos, self.kpos, self.valid)
            if spec.causal
            else self.valid
        )
        mask = seen
        if far and free:
            mask = b.map("exact", lambda f, chosen, ok: sp.And(ok, sp.Or(sp.Not(f), chosen)), far, free, seen)
        return b.contract("o_s", (*ROW, "e"), b.softmax("p", KEY, s, mask), self.v)

    def residual_branch(self, far: Var, free: Var) -> Var:
        """o_r: linear attention over the far blocks not chosen; exactly 0 where there are none (gate)."""
        b, linear = self.b, self.spec.linear
        assert linear is not None
        q, k = self.rows("r") if linear.own_rows else (self.q, self.k)
        tau = b.input("temperature", ("h",)) if linear.temperature else None
        phi_q = self.features("phi_q", q, linear.feature_map, tau)
        phi_k = self.features("phi_k", k, linear.feature_map, tau)
        rest = b.map("rest", lambda f, chosen: sp.And(f, sp.Not(chosen)), far, free)
        left = b.reduce("n_unsel", "sum", ("J",), rest)
        total = b.contract("rest_kv", (*ROW, "e"), rest, self.valid, phi_q, phi_k, self.v)
        if not linear.normaliser:
            return b.map("o_r", lambda x, count: sp.Piecewise((x, count > 0), (0, True)), total, left)
        weight = b.contract("rest_z", ROW, rest, self.valid, phi_q, phi_k)
        den = b.map("den", lambda z: maximum(z, NORMALISER_EPS), weight)
        return b.map("o_r", lambda x, z, count: sp.Piecewise((x / z, count > 0), (0, True)), total, den, left)

    def features(self, name: str, x: Var, phi: FeatureMap, temperature: Var | None) -> Var:
        """Phi of every row, in float32, from the raw (unscaled) query or key; both signs on the axis s."""
        b = self.b
        expr = parse(phi.expression, {"x"})
        value, args = symbol("x0"), [x]
        if temperature is not None:
            args.append(temperature)
            value = value * sp.exp(symbol("x1"))
        if phi.signs == 2:
            args.append(b.iota(f"sign_{name[-1]}", "s"))
            value = value * (1 - 2 * symbol(f"x{len(args) - 1}"))
        mapped = b.map(f"{name}_raw" if phi.softmax else name, expr.xreplace({symbol("x"): value}), *args)
        return b.softmax(name, ("d",), mapped) if phi.softmax else mapped

    def combine(self, o_s: Var, o_r: Var) -> Var:
        """O from the two branches (spla.md section 5.3)."""
        b = self.b
        match self.spec.combine:
            case "add":
                return b.map("o", lambda x, y: x + y, o_s, o_r)
            case "rms":
                return b.map("o", lambda x, y: x + y, self.rms("s", o_s), self.rms("r", o_r))
            case "rms_residual":
                return b.map("o", lambda x, y: x + y, o_s, self.rms("r", o_r))
            case "gate":
                gates = [b.input(f"gate_{w}", ROW) for w in "sr"]
                return b.map("o", lambda x, y, gx, gy: gx * x + gy * y, o_s, o_r, *gates)
        raise AssertionError(self.spec.combine)

    def rms(self, branch: str, x: Var) -> Var:
        b = self.b
        gamma = b.input(f"gamma_{branch}", ("h", "g", "e"))
        mean2 = b.reduce(f"mean2_{branch}", "mean", ("e",), b.map(f"square_{branch}", lambda y: y * y, x))
        return b.map(f"rms_{branch}", lambda y, g, mu: g * y * (mu + RMS_EPS) ** sp.Rational(-1, 2), x, gamma, mean2)
