"""Layers under DDP and FSDP2: two processes find the gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def trained(kind: str, device: str, folder: Path) -> None:
    """Run two processes of tests/nn/parallel.py and check that both agree with one."""
    together = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    together.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("parallel.py")), kind, device, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env=together,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "equal"


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_find_the_gradients_of_one(kind: str, folder: Path) -> None:
    trained(kind, "cpu", folder)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_gpus_find_the_gradients_of_one(kind: str, folder: Path) -> None:
    trained(kind, "cuda", folder)
