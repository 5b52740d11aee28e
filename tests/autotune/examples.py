"""A key with its entry, others that differ from it, and hypothesis strategies for both."""

from hypothesis import strategies as st

from splagen.autotune.entry import RANGES, Entry
from splagen.autotune.key import LONGEST, Key

KEY = Key(
    generator=1,
    spec="5" * 32,
    kernel="block_sparse_forward",
    source="a" * 32,
    templates="b" * 32,
    dtype="bf16",
    length=8192,
    batch=4,
    gpu="NVIDIA H200",
    arch="sm_90",
    triton="3.6.0",
    cuda="13.0",
)
ENTRY = Entry({"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}, 0.25, 0.01, "quick", "2026-11-02T12:00:00+00:00")
OTHER = {
    "generator": 2,
    "spec": "6" * 32,
    "kernel": "block_sparse_dq",
    "source": "c" * 32,
    "templates": "d" * 32,
    "dtype": "fp16",
    "length": 16384,
    "batch": 8,
    "gpu": "NVIDIA B200",
    "arch": "sm_100",
    "triton": "3.7.1",
    "cuda": "12.8",
}


def texts() -> st.SearchStrategy[str]:
    printable = st.characters(categories=("L", "N", "P", "S"), include_characters=" ").filter(str.isprintable)
    return st.text(printable, min_size=1, max_size=LONGEST)


def keys() -> st.SearchStrategy[Key]:
    count = st.integers(1, 2**62 - 1)
    return st.builds(
        Key, count, texts(), texts(), texts(), texts(), texts(), count, count, texts(), texts(), texts(), texts()
    )


def entries() -> st.SearchStrategy[Entry]:
    numbers = {name: st.integers(low, high) for name, (low, high) in RANGES.items()}
    schedules = st.fixed_dictionaries({}, optional=numbers).filter(bool)
    medians, spreads = st.floats(0, 1e8, exclude_min=True), st.floats(0, 1e8)
    return st.builds(Entry, schedules, medians, spreads, texts(), st.just(ENTRY.found))
