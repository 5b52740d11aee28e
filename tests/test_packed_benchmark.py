"""The benchmark of packed sequences where no GPU is needed: the lengths that it takes."""

import pytest

from benchmarks import packed


@pytest.mark.parametrize(("sequences", "longest"), [(64, 8192), (3, 2), (1, 1), (7, 1)])
def test_lengths_are_random_and_have_a_mean(sequences: int, longest: int) -> None:
    """The sequences of one length, beside which they are timed, hold as many tokens."""
    found = packed.lengths_of(sequences, longest)
    assert len(found) == sequences
    assert all(1 <= n <= longest for n in found)
    assert sum(found) % sequences == 0
    assert found == packed.lengths_of(sequences, longest)
    assert len(set(found)) > sequences // 2 or longest < 9
