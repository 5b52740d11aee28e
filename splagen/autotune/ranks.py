"""One tuning for all ranks of a torch.distributed job: rank 0 decides, the others take what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
import torch.distributed as dist

from splagen.autotune.entry import Entry
from splagen.errors import SplagenError, TuningError


def several() -> bool:
    """True in a job of more than one rank whose process group is set up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def decided_by_first(find: Callable[[], Mapping[str, Entry]]) -> Mapping[str, Entry]:
    """What `find` returns on rank 0, on every rank; all ranks must call it.

    The others wait as long as the process group's timeout lets them.

    Raises:
        TuningError: on the other ranks, where `find` failed on rank 0; there its own error passes.
    """
    if dist.get_rank() != 0:
        answer = json.loads(_broadcast(b""))
        if "error" in answer:
            raise TuningError(f"rank 0 found no Schedules: {answer['error']}")
        return {name: Entry(**fields) for name, fields in answer.items()}
    try:
        found = find()
    except BaseException as error:
        reason = error.message if isinstance(error, SplagenError) else f"{type(error).__name__}: {error}"
        _broadcast(json.dumps({"error": reason}).encode())
        raise
    _broadcast(json.dumps({name: asdict(entry) for name, entry in found.items()}).encode())
    return found


def _broadcast(data: bytes) -> bytes:
    """The bytes of rank 0; not `broadcast_object_list`, which pickles."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, 0)
    rows = torch.tensor(list(data), dtype=torch.uint8, device=device)
    rows = rows if dist.get_rank() == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(rows, 0)
    return bytes(rows.tolist())
