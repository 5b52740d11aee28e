"""SSE, forward and backward, beside plain linear attention and dense cuDNN attention: python -m benchmarks.sse.

Every op is compared with the float64 oracle first, and what is wrong is not timed.  Shapes: B = 1, H = 32,
K = V = 128, bf16; decays logsigmoid(normal) / 16 in float32; normal logits, so that partitions are of about one size.
Plain linear attention is that of `fla`, where it is importable: one state, and no feature maps.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from triton.runtime.autotuner import Autotuner

from benchmarks.breakdown import breakdown
from benchmarks.floors import Floor, recurrence_flops
from benchmarks.peers import PEERS, Task, measure, text_of, unchecked
from benchmarks.record import write
from benchmarks.timing import peak_bytes, time_ms
from benchmarks.triton_autotuner import CONFIGURATIONS, compile_ahead, fewer_configurations, tune_briefly
from splagen import pipeline
from splagen.codegen.sequence_partition import parts_of
from splagen.sequence import SSEOracle, input_names
from splagen.spec import from_toml, to_toml
from splagen.sse_spec import Router, SSESpec
from splagen.verification import relative_error

DEVICE = "cuda"
H, D = 32, 128
CASES = [  # backbone, N, k, the longest sequence
    *((b, n, k, 1 << 30) for b in ("scalar", "vector") for n, k in ((4, 1), (4, 2), (16, 1))),
    ("delta", 4, 1, 32768),
]
CHECKED = (2200, 0, 37, 64, 1, 2)  # packed samples: several groups in a segment, an empty sample, ragged chunks
CHECKED_HEADS = 16  # a multiple of 16, as H is: the same binaries
OUTPUT_LIMIT, GRADIENT_LIMIT = 4e-3, 5e-3  # relative RMS
LARGEST_GIB = 100.0
TUNED = 8192  # tokens for which `fla` is tuned; its tuning does not depend on them afterwards
DENSE_LONGEST = 32768
FLA = {
    "scalar": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "vector": ("fla.ops.gla", "chunk_gla"),
    "delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
}
SHARDS = {"scalar": 2, "vector": 4, "delta": 2}  # processes that compile its kernels


def spec_of(backbone: str, partitions: int, choices: int) -> SSESpec:
    """The spec of a case: of queries and keys as they are, like the peers."""
    router = Router(partitions=partitions, writers=choices)
    return SSESpec(head_dim=D, backbone=backbone, router=router, q_map="identity", k_map="identity")  # type: ignore[arg-type]


def plain_spec(backbone: str) -> SSESpec:
    """What `fla` computes: the shared state alone, of queries and keys as they are."""
    return SSESpec(head_dim=D, backbone=backbone, router=None, q_map="identity", k_map="identity")  # type: ignore[arg-type]


def random_inputs(
    spec: SSESpec, lengths: Sequence[int], heads: int, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Rows, initial states and cotangents of packed samples by name, as a model has them."""
    draw = torch.Generator(device).manual_seed(seed)
    tokens, values, samples = sum(lengths), heads * spec.group_size, len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    found = {}
    for name in input_names(spec):
        match name[0]:
            case "q" | "k":
                found[name] = normal(tokens, heads, spec.head_dim).to(dtype)
            case "v":
                found[name] = normal(tokens, values, spec.value_dim).to(dtype)
            case "g":
                of_a_token = (heads, spec.head_dim) if spec.backbone == "vector" else (values,)
                of_rows = (values,) if spec.backbone == "constant" else (tokens, *of_a_token)
                found[name] = logsigmoid(normal(*of_rows)).div_(16)
            case "b":
                found[name] = normal(tokens, values).sigmoid_()
            case "l":
                assert spec.router is not None
                scope = (heads,) if spec.router.scope == "head" else ()
                found[name] = normal(tokens, *scope, spec.router.partitions)
    found["state"] = 0.3 * normal(samples, parts_of(spec), values, spec.head_dim, spec.value_dim)
    found["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    found["do"] = normal(tokens, values, spec.value_dim).to(dtype)
    found["dfinal"] = 0.3 * normal(*found["state"].shape)
    if spec.router:
        found["dbalance"] = torch.tensor(0.01, device=device)
    return found


def forward(spec: SSESpec, module: ModuleType, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """o, the final states and the balance loss, by the kernels."""
    names = (*input_names(spec), "state", "cu_seqlens")
    return module.forward(module.schedules_for(x["v"]), *(x[n] for n in names))  # type: ignore[no-any-return]


def backward(spec: SSESpec, module: ModuleType, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the rows and of the initial states, by the kernels."""
    names = [*input_names(spec), "state", "cu_seqlens", "do", "dfinal", *(["dbalance"] if spec.router else [])]
    return module.backward(module.schedules_for(x["v"]), *(x[n] for n in names))  # type: ignore[no-any-return]


PASSES = {"forward": forward, "backward": backward}


# -- correctness ---------------------------------------------------------------------------------------------------


Truth = dict[str, dict[str, Tensor]]


def truth_of(spec: SSESpec, x: dict[str, Tensor]) -> Truth:
    """What the oracle finds for either pass, by name."""
    oracle = SSEOracle(spec)
    return {"forward": oracle.values(x), "backward": {f"d{n}": g for n, g in oracle.gradients(x).items()}}


def check(
    spec: SSESpec, module: ModuleType, x: dict[str, Tensor], truth: Truth, failed: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The errors of either pass, or the text of the exception, and whether it may be timed.

    What `failed` before in another process is not run: an illegal access would end this one's use of the GPU.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in PASSES.items():
        if name in failed:
            found[name] = {"ok": False, "exception": failed[name]}
            continue
        limit = OUTPUT_LIMIT if name == "forward" else GRADIENT_LIMIT
        try:
            got = dict(zip(truth[name], run(spec, module, x), strict=True))
            errors = {n: relative_error(got[n], want) for n, want in truth[name].items()}
        except Exception as error:
            found[name] = {"ok": False, "exception": text_of(error)}
        else:
            ok = all(e <= limit for e in errors.values())
            # a record holds no infinity
            found[name] = {"ok": ok, "limit": limit, "errors": {n: min(e, 1e30) for n, e in errors.items()}}
    return found


# -- figures -------------------------------------------------------------------------------------------------------


def floor_ms(backbone: str, choices: int, length: int) -> dict[str, float]:
    """The floor of either pass: operations over the matrix rate, or bytes over the copy rate if larger.

    A slot is a token, a head and one of the 1 + k states that it touches.  Forward, with chunks of C: q kᵀ and A v
    take 4 C D operations per slot, q S and kᵀ v 4 D²; backward 2.5 times that.  Forward reads q, k of both kinds of
    state, v and the gates, and writes o; backward reads them and do, and writes a gradient of each but do.  The
    products that solve a chunk of the delta rule are not counted.
    """
    row, gate = 2 * D, 4 * D if backbone == "vector" else 8 if backbone == "delta" else 4  # delta: g and beta
    operations = recurrence_flops(1 + choices, D)
    costs = {
        "forward": (operations, 5 * row + 2 * gate + row),
        "backward": (2.5 * operations, (5 * row + 2 * gate + row) + (5 * row + 2 * gate)),
    }
    return {n: Floor(length * H * f, length * H * b).ms for n, (f, b) in costs.items()}


def pass_ms(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and spread as a caller sees them, and the median without waiting for the host."""
    seen = time_ms(run, repeats, 2)
    return {
        "ms": seen.median,
        "spread_ms": seen.spread,
        "device_ms": time_ms(run, repeats, 1, asleep=True).median,
    }


def same_bits(run: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether two runs agree in every bit."""
    return all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def repeats_of(length: int) -> int:
    """Repetitions, so that short ops are measured often and long ones soon."""
    return 20 if length <= 8192 else 10 if length <= 32768 else 5


def sse_rows(
    case: tuple[str, int, int, int], module: ModuleType, lengths: Sequence[int], passes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Figures of a case at every length."""
    backbone, partitions, choices, longest = case
    spec = spec_of(backbone, partitions, choices)
    per_token: dict[str, float] = {}
    for length in sorted({min(8192, *lengths), *lengths}):  # the shortest tells what the others need
        if length > longest:
            continue
        x = random_inputs(spec, (length,), H, torch.bfloat16, DEVICE)
        inputs = torch.cuda.memory_allocated()
        row: dict[str, Any] = {"system": "splagen SSE", "backbone": backbone, "N": partitions, "k": choices}
        row |= {"length": length, "floor_ms": floor_ms(backbone, choices, length)}
        for name in passes:

            def run(name: str = name, x: dict[str, Tensor] = x) -> tuple[Tensor, ...]:
                return PASSES[name](spec, module, x)

            need = per_token.get(name, 0.0) * length / 2**30
            if need > LARGEST_GIB:
                row[name] = {"skipped": f"it would need about {need:.0f} GiB"}
                continue
            peak = peak_bytes(run)
            per_token.setdefault(name, (inputs + peak) / length)
            if length not in lengths:
                continue
            row[name] = {**pass_ms(run, repeats_of(length)), "peak_gib_beyond_inputs": peak / 2**30}
            row[name]["kernels_ms"] = {n: k.ms for n, k in breakdown(module, run).items()}
            if length <= 32768:
                row[name]["same_bits"] = same_bits(run)
        del x
        torch.cuda.empty_cache()
        if length in lengths:
            yield row


def independence(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of N = 16 over that of N = 4 for one choice: equal up to the chunks that more segments leave open."""
    found = []
    sse = {(r["backbone"], r["N"], r["length"], p): r[p] for r in rows if r.get("k") == 1 for p in PASSES if p in r}
    for (backbone, n, length, name), ms in sse.items():
        few = sse.get((backbone, 4, length, name), {})
        if n == 16 and "device_ms" in ms and "device_ms" in few:
            ratio = ms["device_ms"] / few["device_ms"]
            where = {"backbone": backbone, "length": length, "pass": name}
            found.append({**where, "ratio": ratio, "within_10_percent": abs(ratio - 1) <= 0.1})
    return found


# -- fla -----------------------------------------------------------------------------------------------------------


def fla_op(backbone: str) -> Callable[..., Tensor]:
    """`fla`'s linear attention as a function of q, k, g, (beta,) v, in the order of the rows of `plain_spec`."""
    module, name = FLA[backbone]
    function = getattr(importlib.import_module(module), name)

    def call(q: Tensor, k: Tensor, g: Tensor, *rest: Tensor) -> Tensor:
        if backbone == "delta":
            beta, v = rest
            return function(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]  # type: ignore[no-any-return]
        return function(q, k, *rest, g)[0]  # type: ignore[no-any-return]

    return call


def fla_leaves(backbone: str, x: dict[str, Tensor]) -> list[Tensor]:
    """Rows as leaves [1, T, H, ...]."""
    return [x[n].unsqueeze(0).requires_grad_() for n in input_names(plain_spec(backbone))]


@contextmanager
def allowed(refusal: str | None) -> Iterator[None]:
    """`unchecked` if the backward pass was refused."""
    if refusal is None:
        yield
    else:
        with unchecked():
            yield


def fla_check(backbone: str, x: dict[str, Tensor], truth: Truth) -> dict[str, Any]:
    """The errors of `fla`'s op at one sample, and the text with which it refuses a backward pass."""
    found: dict[str, Any] = {"backward_refusal": None}
    op, leaves = fla_op(backbone), fla_leaves(backbone, x)
    o = op(*leaves)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, leaves, x["do"].unsqueeze(0), retain_graph=True)

    try:
        got = gradients()
    except RuntimeError as error:
        found["backward_refusal"] = text_of(error)
        with unchecked():
            got = gradients()
    pairs = zip((f"d{n}" for n in input_names(plain_spec(backbone))), got, strict=True)
    found["errors"] = {"o": relative_error(o[0], truth["forward"]["o"])}
    found["errors"] |= {n: relative_error(g[0], truth["backward"][n]) for n, g in pairs}
    found["errors"] = {n: min(e, 1e30) for n, e in found["errors"].items()}
    return found


def fla_rows(backbone: str, length: int, refusal: str | None) -> Iterator[dict[str, Any]]:
    """Times of `fla`'s op; those of a backward pass that it refuses, with the refusal beside them."""
    spec = plain_spec(backbone)
    x = random_inputs(spec, (length,), H, torch.bfloat16, DEVICE)
    op, leaves, do = fla_op(backbone), fla_leaves(backbone, x), x["do"].unsqueeze(0)
    row: dict[str, Any] = {"system": f"fla {FLA[backbone][1]}", "backbone": backbone, "length": length}
    with torch.no_grad():
        row["forward"] = pass_ms(lambda: op(*leaves), repeats_of(length))
        row["forward"]["peak_gib_beyond_inputs"] = peak_bytes(lambda: op(*leaves)) / 2**30
    try:
        with allowed(refusal):
            o = op(*leaves)

            def run() -> tuple[Tensor, ...]:
                return torch.autograd.grad(o, leaves, do, retain_graph=True)

            peak = peak_bytes(run)
            row["backward"] = {**pass_ms(run, repeats_of(length)), "peak_gib_beyond_inputs": peak / 2**30}
        if refusal is not None:
            row["backward"]["refused_by_fla"] = refusal
    except Exception as error:
        row["backward"] = {"exception": text_of(error)}
    yield row


# -- compilation ahead of time, in processes of their own that fill Triton's cache -----------------------------------


def compile_sse(text: str, name: str) -> str | None:
    """Compile the kernels of one pass of a spec: run it at the shape of the check.  The text of what fails."""
    try:
        spec = from_toml(text)
        assert isinstance(spec, SSESpec)
        module = pipeline.generate(spec, "build").module
        PASSES[name](spec, module, random_inputs(spec, CHECKED, CHECKED_HEADS, torch.bfloat16, DEVICE))
        torch.cuda.synchronize()
    except Exception as error:
        return text_of(error)
    return None


def compile_fla(backbone: str, shard: int) -> str | None:
    """Compile a shard of the configurations of `fla`'s kernels, and launch none: the autotuner comes later."""
    pool = ThreadPoolExecutor(2)

    def run(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        compile_ahead(tuner, args, kwargs, pool, slice(shard, None, SHARDS[backbone]))

    fewer_configurations()
    Autotuner.run = run
    try:
        fla_run(backbone)
    except Exception as error:
        return text_of(error)
    return None


def fla_run(backbone: str) -> None:
    """Both passes once, at the length for which its kernels are tuned."""
    x = random_inputs(plain_spec(backbone), (TUNED,), H, torch.bfloat16, DEVICE)
    op, leaves = fla_op(backbone), fla_leaves(backbone, x)
    with unchecked():
        torch.autograd.grad(op(*leaves), leaves, x["do"].unsqueeze(0))
    torch.cuda.synchronize()


def compile_all(specs: Sequence[SSESpec], fla: Sequence[str], meanwhile: Callable[[], None]) -> dict[Any, str]:
    """Compile everything while this process does something else: what failed, by (spec, pass) or (backbone, shard).

    A process for each, so that a compiler that crashes takes none of the others along.
    """
    context = multiprocessing.get_context("spawn")
    futures: dict[Any, Future[str | None]] = {}
    with ExitStack() as stack:

        def submit(key: Any, job: Callable[..., str | None], *args: str | int) -> None:
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=context))
            futures[key] = pool.submit(job, *args)

        for spec in specs:
            for name in PASSES:
                submit((spec, name), compile_sse, to_toml(spec), name)
        for backbone in fla:
            for shard in range(SHARDS[backbone]):
                submit((backbone, shard), compile_fla, backbone, shard)
        meanwhile()
        ends = {key: text_of(e) if (e := f.exception()) else f.result() for key, f in futures.items()}
    return {key: text for key, text in ends.items() if text is not None}


# -- the run -------------------------------------------------------------------------------------------------------


def fla_version() -> tuple[str | None, str | None]:
    """The version of `fla`, or why it cannot be imported."""
    try:
        found = importlib.import_module("fla").__version__
        for module, name in FLA.values():
            getattr(importlib.import_module(module), name)
    except Exception as error:
        return None, text_of(error)
    return str(found), None


class Run:
    """One run of the benchmark; `figures` is filled as it goes."""

    def __init__(self, lengths: Sequence[int], backbones: Sequence[str], seconds: float) -> None:
        """Rows that would start later than `seconds` from now are left out and named."""
        self.begun, self.seconds = time.perf_counter(), seconds
        self.lengths = sorted(lengths)
        self.specs = {spec_of(*c[:3]): c for c in CASES if c[0] in backbones}
        version, why = fla_version()
        self.peers = list(backbones) if version else []
        self.figures: dict[str, Any] = {
            "fla": {"version": version, "exception": why, "tuned_for": TUNED, "configurations": CONFIGURATIONS}
        }
        self.figures |= {"rows": [], "checks": [], "left_out": []}

    def report(self, what: str) -> None:
        """A line of progress."""
        print(f"[{time.perf_counter() - self.begun:5.0f} s] {what}", file=sys.stderr, flush=True)

    def measure(self) -> None:
        """Compile, check, and time what is right."""
        modules = {s: pipeline.generate(s, "build").module for s in self.specs}
        ours = {s: random_inputs(s, CHECKED, CHECKED_HEADS, torch.bfloat16, DEVICE) for s in self.specs}
        theirs = {b: random_inputs(plain_spec(b), (1000,), H, torch.bfloat16, DEVICE) for b in self.peers}
        for x in theirs.values():  # it starts from no state, and its last one is not asked for
            x["state"].zero_()
            x["dfinal"].zero_()
        truths: dict[Any, Truth] = {}

        def evaluate() -> None:
            truths.update((s, truth_of(s, x)) for s, x in ours.items())
            truths.update((b, truth_of(plain_spec(b), x)) for b, x in theirs.items())
            self.report("the oracle is done")

        failed = compile_all(list(self.specs), self.peers, evaluate)
        for key, text in failed.items():
            self.report(f"failed ahead of time: {self.specs[key[0]][:3] if key[0] in self.specs else key}: {text}")
        self.report("compiled")
        timed = {s: self.check_ours(s, modules[s], ours.pop(s), truths.pop(s), failed) for s in self.specs}
        tune_briefly()
        refusals = {b: self.check_fla(b, theirs.pop(b), truths.pop(b)) for b in self.peers}
        torch.cuda.empty_cache()
        for spec, passes in timed.items():
            if passes:
                case = self.specs[spec]
                self.rows(f"splagen SSE {case[:3]}", sse_rows(case, modules[spec], self.lengths, passes))
        for length in self.lengths:
            for b, (usable, refusal) in refusals.items():
                if usable and (b != "delta" or length <= DENSE_LONGEST):
                    self.rows(f"fla {b} {length}", fla_rows(b, length, refusal))
            if length <= DENSE_LONGEST:
                self.rows(f"dense {length}", dense_rows(length))

    def rows(self, what: str, found: Iterator[dict[str, Any]]) -> None:
        """Take rows as they are measured, as long as there is time."""
        try:
            while time.perf_counter() - self.begun <= self.seconds:
                row = next(found, None)
                if row is None:
                    return
                self.figures["rows"].append(row)
                self.report(line_of(row))
            self.figures["left_out"].append(f"{what}: no time left")
        except Exception as error:
            self.figures["left_out"].append(f"{what}: {text_of(error)}")
            self.report(self.figures["left_out"][-1])
        finally:
            torch.cuda.empty_cache()

    def check_ours(
        self, spec: SSESpec, module: ModuleType, x: dict[str, Tensor], truth: Truth, failed: Mapping[Any, str]
    ) -> list[str]:
        """The passes that are right."""
        case = self.specs[spec][:3]
        before = {name: failed[spec, name] for name in PASSES if (spec, name) in failed}
        found = check(spec, module, x, truth, before)
        named = dict(zip(("backbone", "N", "k"), case, strict=True))
        self.figures["checks"].append({**named, "samples": CHECKED, "heads": CHECKED_HEADS, **found})
        for n, f in found.items():
            bad = f.get("exception") or {q: f"{e:.1e}" for q, e in f["errors"].items() if not e <= f["limit"]}
            worst = "" if bad else f", at most {max(f['errors'].values()):.1e}"
            self.report(f"{case} {n}: " + (f"right{worst}" if f["ok"] else f"WRONG, not timed: {bad}"))
        return [n for n, f in found.items() if f["ok"]]

    def check_fla(self, backbone: str, x: dict[str, Tensor], truth: Truth) -> tuple[bool, str | None]:
        """Tune, and record errors: whether it runs, and the text with which it refuses its backward pass."""
        found: dict[str, Any] = {"system": f"fla {FLA[backbone][1]}", "backbone": backbone}
        try:
            fla_run(backbone)
            found |= fla_check(backbone, x, truth)
        except Exception as error:
            found["exception"] = text_of(error)
        self.figures["checks"].append(found)
        self.report(str(found))
        return "exception" not in found, found.get("backward_refusal")


def dense_rows(length: int) -> Iterator[dict[str, Any]]:
    """Times of dense causal attention."""
    ms = measure(PEERS["dense cuDNN"](Task((1, H, length), H, D)), list(PASSES))
    yield {"system": "dense cuDNN", "length": length, **{p: {"ms": ms[f"{p}_ms"]} for p in PASSES}}


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    kind = f"{row['backbone']} N={row['N']} k={row['k']}" if "N" in row else row.get("backbone", "")
    text = f"{row['system']:28} {kind:15} T={row['length']:7}"
    for name in PASSES:
        f = row.get(name, {})
        text += f"  {name} {f.get('ms', float('nan')):8.3f} ms"
        text += f" (device {f['device_ms']:8.3f})" if "device_ms" in f else ""
        text += f" floor {row['floor_ms'][name]:6.3f}" if "floor_ms" in row else ""
        text += f" {f['peak_gib_beyond_inputs']:5.2f} GiB" if "peak_gib_beyond_inputs" in f else ""
        text += " NOT THE SAME BITS" if f.get("same_bits") is False else ""
        text += " refused, run all the same" if "refused_by_fla" in f else ""
        text += f" {f.get('skipped', '')}{f.get('exception', '')}"
    return text.rstrip()


def main() -> None:
    """Measure, write the record, and print a table; the exit status is 1 if an op was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--backbones", nargs="+", choices=list(FLA), default=list(FLA))
    parser.add_argument("--seconds", type=float, default=210, help="no row is started later than this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    run = Run(args.lengths, args.backbones, args.seconds)
    figures = run.figures
    try:
        run.measure()
    finally:
        figures["independent_of_N"] = independence(figures["rows"])
        write("sse", figures, args.out)
    for row in figures["rows"]:
        for name in PASSES:
            for kernel, ms in row.get(name, {}).get("kernels_ms", {}).items():
                case = f"{row['backbone']} N={row['N']} k={row['k']} T={row['length']}"
                print(f"    {case} {name:8} {kernel:16} {ms:8.3f} ms")
    for ratio in figures["independent_of_N"]:
        print(f"N = 16 over N = 4: {ratio}")
    for text in figures["left_out"]:
        print(f"left out: {text}")
    for row in figures["rows"]:
        print(line_of(row))
    ours = [c for c in figures["checks"] if "N" in c]
    wrong = [(c["backbone"], c["N"], c["k"]) for c in ours if not all(c[p]["ok"] for p in PASSES)]
    if wrong:
        raise SystemExit(f"wrong, and not timed: {wrong}")


if __name__ == "__main__":
    main()
