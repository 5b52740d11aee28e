"""What is kept of a run of the GPU tests, also of one that ended before its tests did."""

from benchmarks.gpu_tests import figures_of

RUN = """\
created: 2/2 workers
2 workers [5 items]

scheduling tests via WorkStealingScheduling
tests/a.py::test_x[1]
[gw0] [ 20%] PASSED tests/a.py::test_x[1]
[gw1] [ 40%] SKIPPED tests/a.py::test_y
tests/a.py::test_x[a b]
[gw0] [ 60%] FAILED tests/a.py::test_x[a b]
"""


def test_every_outcome_is_counted_and_what_never_ended_too() -> None:
    found = figures_of(RUN.splitlines(keepends=True))
    assert {n: found[n] for n in ("passed", "failed", "skipped", "not_ended")} == {
        "passed": 1, "failed": 1, "skipped": 1, "not_ended": 2,
    }  # fmt: skip
    assert found["failing"] == ["tests/a.py::test_x[a b]"]
    last = ["[gw1] [100%] ERROR tests/b.py::test_z\n", "1.25s call     tests/a.py::test_x[1]\n"]
    assert figures_of([*RUN.splitlines(), *last])["slowest"] == [(1.25, "tests/a.py::test_x[1]")]
    assert figures_of([*RUN.splitlines(), *last])["failed"] == 2
