"""Two processes train a layer under DDP or FSDP2: each runs `python parallel.py KIND DEVICE FOLDER RANK`.

Each process has half of a batch; the gradients must be those of the whole batch in one process.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import splagen
from splagen.nn import Rotary, SPLAAttention, SSEAttention


class Model(nn.Module):
    """A layer of each kind."""

    def __init__(self, folder: Path, **made: object) -> None:
        super().__init__()
        select = splagen.Select(block_size=16, budget=1, sinks=1, local=0)
        spla = splagen.SPLASpec(head_dim=16, group_size=2, select=select, linear=splagen.Residual(temperature=True))
        sse = splagen.SSESpec(head_dim=16, backbone="scalar", router=splagen.Router(2))
        self.spla = SPLAAttention(24, 4, spla, rotary=Rotary(), folder=folder, **made)  # type: ignore[arg-type]
        self.sse = SSEAttention(24, 2, sse, folder=folder, **made)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.sse(self.spla(x))
        return y.square().mean()  # type: ignore[no-any-return]


def main(kind: str, device: str, folder: Path, rank: int) -> None:
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/{kind}_{device}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=100),
    )
    here = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    dtype = torch.float32 if device == "cuda" else torch.float64  # float64 rows go through the equations
    torch.manual_seed(0)
    model = Model(folder, device=here, dtype=dtype)
    x = torch.randn(4, 40, 24, dtype=dtype).to(here)
    model(x).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mine = x[2 * rank : 2 * rank + 2]
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)  # its hooks live as long as it does
        wrapped(mine).backward()
    else:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device, (2,))
        for part in (model.spla, model.sse, model):
            fully_shard(part, mesh=mesh)
        model(mine).backward()
    assert len(want) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        g = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert g is not None
        torch.testing.assert_close(g, want[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    dist.destroy_process_group()
    print("equal", flush=True)
    os._exit(0)  # the process group's threads may keep the interpreter from ending


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
