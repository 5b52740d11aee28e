"""What the benchmark of bounds reads from Nsight Compute's text, and what it concludes."""

import pytest

from benchmarks.bounds import STEP, bound, kernels_of, parsed

TEXT = """\
==PROF== Profiling "block_sparse_dkv_kernel": 0%....50%....100% - 20 passes
done
[734] python3.12@127.0.0.1
  block_sparse_dkv_kernel (16384, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    SM Frequency                    Ghz         1.79
    Memory Throughput                 %        70.22
    DRAM Throughput                   %        15.41
    Duration                         ms         1.86
    L1/TEX Cache Throughput           %        71.10
    L2 Cache Throughput               %        27.06
    Compute (SM) Throughput           %        31.04
    ----------------------- ----------- ------------

    OPT   Memory is more heavily utilized than Compute: Look at the Memory Workload Analysis section to identify the L1
          bottleneck.

    Section: Launch Statistics
    -------------------------------- --------------- ---------------
    Registers Per Thread             register/thread             255
    -------------------------------- --------------- ---------------
    Local Memory Spilling Requests                         3,014,656
    No Eligible                            %        68.54
    Achieved Active Warps Per SM           warp         7.93

  attend_kernel (1, 128, 2)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       100.32
    DRAM Throughput                   %        61.45
    L2 Cache Throughput               %        68.57
    L1/TEX Cache Throughput           %        49.97
    Compute (SM) Throughput           %        39.39

  attend_kernel (1, 128, 2)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       200.00
    DRAM Throughput                   %        10.00
"""


def test_the_first_launch_of_each_kernel_is_read() -> None:
    dkv, attend = parsed(TEXT)
    assert dkv == {
        "kernel": "block_sparse_dkv", "under_ncu_ms": 1.86,
        "busy_percent": {"dram": 15.41, "l2": 27.06, "l1": 71.10, "sm": 31.04},
        "no_eligible_warp": 68.54, "warps_per_sm": 7.93, "registers": 255.0, "spill_requests": 3_014_656.0,
        "bound": "l1",
    }  # fmt: skip
    assert attend["under_ncu_ms"] == pytest.approx(0.10032)
    assert attend["bound"] == "latency"


def test_text_without_kernels_gives_no_rows() -> None:
    assert parsed("==ERROR== Failed to initialize the profiler\n  some_kernel (1, 1, 1)x(32, 1, 1)\n") == []
    assert parsed("==PROF== Disconnected from process 1\n") == []


def test_what_is_busiest_binds_if_it_is_busy() -> None:
    assert bound({"dram": 30.0, "l2": 84.7, "sm": 70.0}) == "l2"
    assert bound({"dram": 69.9, "l2": 50.0}) == "latency"


def test_the_kernels_of_a_work_are_those_of_its_module() -> None:
    assert {"block_sparse_dkv", "merge_segments", "linear_dkv", "index"} <= {*kernels_of("whole", 2)}
    assert "linear_forward" in kernels_of("tile", 32, "residual")
    assert "linear_forward" not in kernels_of("tile", 32)
    assert {*kernels_of(STEP, None)} == {"append", "score", "select", "attend", "merge"}
