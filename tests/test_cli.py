"""The command line: what it prints, what it exits with, and that wrong requests end in one error."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from splagen import doctor, pipeline
from splagen.cli import app
from splagen.codegen import compile as ahead_of_time
from splagen.codegen.compile import Built
from splagen.spec import read_spec
from splagen.verification import Report, Row

ROOT = Path(__file__).resolve().parent.parent
SPECS = sorted((ROOT / "examples/specs").glob("*.toml"))
SMALL = str(ROOT / "examples/specs/small.toml")
SEQUENCE = """kind = "sse"
name = "tiny"
head_dim = 16
backbone = "scalar"
[router]
partitions = 3
writers = 1
"""


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # verify sets it: put back afterwards


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    """The file of a small SSE spec."""
    path = tmp_path / "tiny.toml"
    path.write_text(SEQUENCE)
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: object) -> str:
    """Run a wrong request; return its message."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def document(result: Result) -> dict[str, Any]:
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


# -- set-up ------------------------------------------------------------------------------------------------


def test_packed_writes_the_op_on_packed_sequences(sequence: Path, tmp_path: Path) -> None:
    """One file more beside that of the batch; a kind whose op packs by itself says so, and no build is written."""
    found = json.loads(run("generate", SMALL, "--packed", "--out", tmp_path / "kernels", "--json").stdout)
    assert found["op"] == f"{read_spec(SMALL).name}_varlen"
    assert f"def {found['op']}(q, k, v, cu_seqlens, max_seqlen" in Path(found["path"]).read_text()
    assert "takes cu_seqlens as it is" in refused("generate", sequence, "--packed", "--out", tmp_path / "kernels")
    assert "no build of packed" in refused("compile", SMALL, "--packed", "--out", tmp_path / "build")


def test_help_needs_neither_torch_nor_sympy() -> None:
    check = (
        "import sys\nfrom typer.testing import CliRunner\nfrom splagen.cli import app\n"
        "out = CliRunner().invoke(app, ['--help']).output\n"
        "assert all(name in out for name in ('generate', 'show', 'verify', 'compile', 'doctor')), out\n"
        "heavy = {'torch', 'triton', 'sympy', 'jinja2', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_the_example_specs_are_specs_of_their_name(path: Path) -> None:
    assert read_spec(path).name == path.stem


# -- wrong requests ----------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    spec = tmp_path / "typo.toml"
    spec.write_text("head_dim = 32\n[select]\nblok_size = 16\n")
    out = tmp_path / "out"
    message = refused("generate", spec, "--out", out)
    assert "typo.toml: unknown key select.blok_size" in message
    assert "hint: did you mean block_size?" in message
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "show", "verify", "compile"])
def test_a_file_that_is_missing_or_not_toml_is_a_wrong_request(command: str, tmp_path: Path) -> None:
    assert "cannot read" in refused(command, tmp_path / "nothing.toml")
    (tmp_path / "broken.toml").write_text("head_dim = = 3\n")
    assert "not a TOML file" in refused(command, tmp_path / "broken.toml")


def test_with_json_an_error_is_a_document_too(tmp_path: Path) -> None:
    result = run("show", tmp_path / "nothing.toml", "--json")
    assert result.exit_code == 2
    found = document(result)
    assert "cannot read" in found["error"]
    assert found["hint"]
    assert found["error"] in result.stderr


@pytest.mark.parametrize("arguments", [("generate",), ("show", SMALL, "--nothing"), ("nothing",)])
def test_wrong_arguments_exit_with_two(arguments: tuple[str, ...]) -> None:
    refused(*arguments)


@pytest.mark.parametrize("shape", ["1,2", "1,2,x", "1,2,0", "1,2,3,4"])
def test_verify_refuses_what_is_not_a_shape(shape: str) -> None:
    assert "--shape" in refused("verify", SMALL, "--shape", shape)


def test_verify_refuses_dtypes_and_devices_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pipeline, "generate", lambda *_: pytest.fail("something was generated"))
    assert "bf16, fp16, fp32" in refused("verify", SMALL, "--dtype", "float8")
    assert "bfloat16 is wrong" in refused("verify", SMALL, "--dtype", "bf16")
    assert "no GPU" in refused("verify", SMALL, "--device", "cuda")
    assert "unknown device 'tpu'" in refused("verify", SMALL, "--device", "tpu")


def test_compile_names_the_known_targets() -> None:
    assert "one of sm_80, sm_90, sm_100, gfx942" in refused("compile", SMALL, "--target", "sm_70")
    assert "one of bf16, fp16, fp32" in refused("compile", SMALL, "--dtype", "fp8")


# -- generate, show ----------------------------------------------------------------------------------------


def test_generate_writes_one_file_and_prints_its_path(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("generate", SMALL, "--out", out)
    assert first.exit_code == 0
    (path,) = out.iterdir()
    assert first.stdout.strip() == str(path)
    found = document(run("generate", SMALL, "--out", out, "--json"))
    assert found == {"path": str(path), "module": path.stem, "op": "small"}
    assert path.read_text() == run("show", SMALL, "--source").stdout


def test_generate_keeps_a_file_that_is_not_its_own(tmp_path: Path) -> None:
    run("generate", SMALL, "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").iterdir()
    path.write_text("mine\n")
    assert "not overwritten" in refused("generate", SMALL, "--out", path.parent)
    assert path.read_text() == "mine\n"


def test_show_prints_the_equations() -> None:
    shown = run("show", SMALL)
    assert shown.exit_code == 0
    assert "\n  qk[b h g T m J C n] = contract(q, k)\n" in shown.stdout
    assert document(run("show", SMALL, "--json"))["text"] == shown.stdout


def test_show_after_a_pass() -> None:
    after = document(run("show", SMALL, "--after", "derive_gradient", "--json"))
    assert after["after"] == "derive_gradient"
    assert "gradients dq=" in after["text"]
    message = refused("show", SMALL, "--after", "split")
    assert "unknown pass 'split'" in message
    assert "split_complement" in message


def test_show_the_costs() -> None:
    shown = run("show", SMALL, "--after", "cost")
    assert shown.exit_code == 0
    assert "B, H, L = 1, 32, 65536; bf16; NVIDIA H200" in shown.stdout
    assert "all of backward" in shown.stdout
    found = document(run("show", SMALL, "--after", "cost", "--json"))
    rows = {r["kernel"]: r for r in found["kernels"]}
    assert list(rows) == [k.name for k in pipeline.kernels(read_spec(SMALL)).kernels]
    forward = rows["block_sparse_forward"]
    assert forward["launched_in"] == ["forward"]
    assert forward["bound"] in ("bytes", "flops")
    assert "B*Hkv*L" in forward["flops_formula"]
    assert forward["flops_formula"] in shown.stdout
    assert found["total_ms"]["forward"] > forward["ms"] > 0
    shorter = document(run("show", SMALL, "--after", "cost", "--shape", "2,4,4096", "--dtype", "fp32", "--json"))
    assert shorter["shape"] == [2, 4, 4096]
    assert shorter["kernels"][0]["ms"] < found["kernels"][0]["ms"]
    slower = document(run("show", SMALL, "--after", "cost", "--gpu", "A100", "--json"))
    assert slower["gpu"] == "NVIDIA A100-SXM4-80GB"
    assert slower["total_ms"]["forward"] > found["total_ms"]["forward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--after", "cost", "--shape", "1,3,64"), "multiple of 2"),
        (("--after", "cost", "--shape", "1,2"), "three whole numbers"),
        (("--after", "cost", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--after", "cost", "--gpu", "H300"), "NVIDIA H200"),
        (("--gpu", "H100"), "add --after cost"),
        (("--after", "costs"), "cost"),
    ],
)
def test_wrong_requests_for_costs(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("show", SMALL, *arguments)


def test_show_the_costs_of_an_sse_spec(tmp_path: Path) -> None:
    path = tmp_path / "decay.toml"
    path.write_text(SEQUENCE.replace("scalar", "vector"))
    rows = {r["kernel"]: r for r in document(run("show", path, "--after", "cost", "--json"))["kernels"]}
    assert [k for k, r in rows.items() if r["alternative"] and k.startswith("output")] == [
        "output_strong1",
        "output_strong2",
    ]
    assert rows["step"]["launched_in"] == ["step"]
    assert f"({rows['output_strong1']['ms']:.3f})" in run("show", path, "--after", "cost").stdout


def test_show_a_kernel() -> None:
    shown = run("show", SMALL, "--kernel", "block_sparse_forward")
    assert shown.exit_code == 0
    assert "def block_sparse_forward_kernel(" in shown.stdout
    assert "block_sparse_forward" in refused("show", SMALL, "--kernel", "forward")
    assert "exclude" in refused("show", SMALL, "--kernel", "block_sparse_forward", "--source")


def test_generate_and_show_take_an_sse_spec(sequence: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = document(run("generate", sequence, "--out", out, "--json"))
    (path,) = out.iterdir()
    assert found == {"path": str(path), "module": path.stem, "op": "tiny"}
    assert path.read_text() == run("show", sequence, "--source").stdout
    assert run("generate", sequence, "--out", out).exit_code == 0  # its own file is written again
    assert "outputs o, final1, final2, balance" in run("show", sequence).stdout
    assert "def gradient2_kernel(" in run("show", sequence, "--kernel", "gradient2").stdout


def test_show_after_a_pass_of_a_part_of_an_sse_spec(sequence: Path) -> None:
    assert " p " in run("show", sequence, "--after", "sparse").stdout
    assert " p " not in run("show", sequence, "--after", "sparse.restrict").stdout
    assert "gradients dlogits=" in run("show", sequence, "--after", "router.derive_gradient").stdout
    message = refused("show", sequence, "--after", "derive_gradient")
    assert "router.derive_gradient" in message
    assert "shared.settle_names" in message


# -- verify, compile, doctor: a wrong result is 1 ----------------------------------------------------------


def _report(error: float) -> Report:
    return Report("small", (Row("o", (1, 2, 99), "float32", 1e-7, 1e-5), Row("dq", (1, 2, 99), "float32", error, 1e-5)))


@pytest.mark.parametrize(("error", "status"), [(2e-6, 0), (0.5, 1), (math.nan, 1), (math.inf, 1)])
def test_verify_exits_with_one_if_a_number_is_wrong(error: float, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def verify(library: pipeline.Library, **given: Any) -> Report:
        asked.append((given["shapes"], given["dtypes"], given["device"], given["seed"]))
        return _report(error)

    monkeypatch.setattr(pipeline, "verify", verify)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("verify", SMALL, "--shape", "1,2,99", "--dtype", "fp16", "--seed", 3)
    result = run(*arguments)
    assert result.exit_code == status
    assert ("WRONG" in result.stdout) == (status == 1)
    assert ("1 of 2 comparisons" in result.stderr) == (status == 1)
    found = document(run(*arguments, "--json"))
    assert found["ok"] is (status == 0)
    assert found["rows"][1]["error"] == (error if math.isfinite(error) else None)
    assert asked == 2 * [([(1, 2, 99)], [torch.float16], "cpu", 3)]


def test_verify_runs_the_kernels_of_an_sse_spec(sequence: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("verify", sequence, "--shape", "2,1,9", "--json")
    assert result.exit_code == 0, result.output
    found = document(result)
    assert found["ok"]
    assert {"o", "final, packed", "balance", "dlogits", "dg2, strong decay"} <= {r["quantity"] for r in found["rows"]}
    assert all(r["shape"] == [2, 1, 9] for r in found["rows"])


def test_compile_reports_the_kernels_of_an_sse_spec(tmp_path: Path) -> None:
    spec = tmp_path / "shared.toml"
    spec.write_text('kind = "sse"\nhead_dim = 16\nbackbone = "none"\nrouter = "none"\n')
    found = document(run("compile", spec, "--target", "sm_90", "--json"))
    assert found["ok"]
    assert {"output1", "dreads1", "dwrites1"} <= {r["kernel"] for r in found["rows"]}
    assert all(r["registers"] and r["shared"] is not None for r in found["rows"])


@pytest.mark.parametrize("error", [None, "ptxas: unknown instruction"])
def test_compile_exits_with_one_if_a_kernel_fails(error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    row = Built("rows", "sm_90", "bf16", schedule, registers=40, shared=0, spilled=0, seconds=1.0, error=error)
    monkeypatch.setattr(ahead_of_time, "compile_module", lambda *_, **__: [row])
    result = run("compile", SMALL)
    assert result.exit_code == (1 if error else 0)
    assert "BLOCK_M=16 warps=4 stages=1" in result.stdout
    assert (error or "") in result.stderr
    found = document(run("compile", SMALL, "--json"))
    assert found["ok"] is (error is None)
    assert found["rows"][0]["schedule"] == schedule
    assert found["rows"][0]["error"] == error


def test_compile_writes_a_build(tmp_path: Path) -> None:
    spec, out = tmp_path / "shared.toml", tmp_path / "out"
    spec.write_text('kind = "sse"\nhead_dim = 16\nbackbone = "none"\nrouter = "none"\n')
    found = document(run("compile", spec, "--target", "sm_90", "--out", out, "--json"))
    assert found["ok"]
    path, folder = Path(found["path"]), Path(found["build"])
    assert {path, folder} == set(out.iterdir())
    assert found["specialisations"] >= len(found["rows"])
    assert found["bytes"] == sum(f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json")
    result = run("compile", spec, "--target", "sm_90", "--out", out)
    assert str(path) in result.stdout
    assert all(note in result.stderr for note in found["notes"])


def test_decode_stands_for_the_step_in_every_command_that_generates(tmp_path: Path) -> None:
    found = document(run("generate", SMALL, "--decode", "--out", tmp_path, "--json"))
    assert found["op"].endswith("_step")
    assert run("show", SMALL, "--decode", "--source").stdout.strip() == Path(found["path"]).read_text().strip()
    assert "_settled" in run("show", SMALL, "--decode").stdout
    assert "def select_kernel(" in run("show", SMALL, "--decode", "--kernel", "select").stdout
    cost = document(run("show", SMALL, "--decode", "--after", "cost", "--shape", "4,2,4096", "--json"))
    assert [k["launched_in"] for k in cost["kernels"]] == [["step"]] * 4
    moved = sum(k["bytes"] for k in cost["kernels"])
    assert 0 < cost["floor"]["bytes"] < moved
    assert cost["total_ms"]["step"] == pytest.approx(sum(k["ms"] for k in cost["kernels"]))


def test_pages_of_8_bits_have_a_module_of_their_own(tmp_path: Path) -> None:
    found = document(run("generate", SMALL, "--decode", "--page-type", "e4m3", "--out", tmp_path, "--json"))
    assert found["module"].startswith("small_decode_e4m3_")
    assert "round_e4m3(" in run("show", SMALL, "--decode", "--page-type", "e4m3", "--kernel", "score").stdout
    cost = ("show", SMALL, "--decode", "--after", "cost", "--shape", "8,2,65536", "--json")
    wide, narrow = (document(run(*cost, "--page-type", t))["floor"]["bytes"] for t in ("input", "e4m3"))
    assert 0.5 < narrow / wide < 0.6, "states and rows of tokens stay"
    assert "only decoding has pages" in refused("compile", SMALL, "--page-type", "e4m3")
    assert "unknown type of pages 'e5m2'" in refused("generate", SMALL, "--decode", "--page-type", "e5m2")


@pytest.mark.slow
def test_compile_reports_the_kernels_of_a_step() -> None:
    found = document(run("compile", SMALL, "--decode", "--target", "sm_90", "--json"))
    assert [r["kernel"] for r in found["rows"]] == ["score", "select", "attend", "merge"]
    assert all(r["registers"] and r["spilled"] < 64 for r in found["rows"])


def test_what_has_no_step_of_its_own_is_refused() -> None:
    sse = ROOT / "examples/specs/sse_gla.toml"
    for command in (("generate",), ("show",), ("compile",)):
        assert "sse_gla_step" in refused(*command, sse, "--decode")
    assert "--after split_complement beside --decode" in refused(
        "show", SMALL, "--decode", "--after", "split_complement"
    )


def test_compile_writes_no_build_of_a_kernel_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Built("rows", "sm_90", "bf16", {"num_warps": 4}, error="ptxas: unknown instruction")
    monkeypatch.setattr(ahead_of_time, "keep_module", lambda *_, **__: ([row], [{}]))
    result = run("compile", SMALL, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert not document(result)["ok"]
    assert not (tmp_path / "out").exists()


def test_doctor_finds_this_machine_fit() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = {c["name"]: c for c in document(result)["checks"]}
    assert {
        "python",
        "torch",
        "triton",
        "gpu",
        "known miscompiles",
        "cache",
        "templates",
        "interpreter",
    } <= found.keys()
    assert found["interpreter"]["status"] == "good"


def test_doctor_exits_with_one_if_splagen_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_interpreter", lambda: doctor.Check("interpreter", "not tried"))
    (tmp_path / "plain").write_text("")
    monkeypatch.setenv("SPLAGEN_CACHE_DIR", str(tmp_path / "plain" / "cache"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "SPLAGEN_CACHE_DIR" in result.stdout
    assert "cannot work here: cache" in result.stderr


@pytest.mark.parametrize(
    ("triton", "capability", "status"),
    [
        ("3.6.0", (9, 0), "warning"),
        ("3.7.0+git1a2b3c", (9, 0), "warning"),
        ("3.4.0", None, "warning"),
        ("3.6.0", (10, 0), "good"),
        ("3.7.1", (9, 0), "good"),
        ("3.9.0", None, "good"),
    ],
)
def test_doctor_knows_which_triton_miscompiles_on_hopper(
    triton: str, capability: tuple[int, int] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = {c.name: c for c in doctor._gpu()}
    assert found["known miscompiles"].status == status
