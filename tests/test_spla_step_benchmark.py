"""The benchmark of decoding where no GPU is needed: its floors and what it fills a cache with."""

import pytest

from benchmarks import spla_step
from benchmarks.floors import PEAK_BYTES


@pytest.mark.parametrize(
    ("batch", "kv_heads", "length", "megabytes"),
    [(1, 2, 131_072, 6.6), (1, 2, 1_048_576, 21.2), (16, 8, 131_072, 16 * 26.4), (64, 2, 131_072, 64 * 6.6)],
)
def test_floors_are_those_of_the_specification(batch: int, kv_heads: int, length: int, megabytes: float) -> None:
    read = spla_step.floor_us(batch, kv_heads, length) * PEAK_BYTES / 1e12
    assert read == pytest.approx(megabytes, rel=0.01)


def test_pages_of_8_bits_take_half_of_what_is_not_a_state() -> None:
    sixteen, eight = (spla_step.floor_us(16, 8, 131_072, t) for t in ("input", "e4m3"))
    states = 16 * 8 * 2 * 128 * 128 * 4
    rest = sixteen * PEAK_BYTES / 1e6 - states
    assert eight * PEAK_BYTES / 1e6 - states == pytest.approx(rest / 2, rel=0.02), "and numbers of keys stay"


def test_specs_attend_to_64_blocks() -> None:
    for kv_heads in (2, 8):
        spec = spla_step.spec_of(kv_heads)
        assert spec.select is not None
        assert spec.select.budget + spec.select.sinks + spec.select.local + 1 == 64
        assert spec.group_size * kv_heads == spla_step.HQ
