"""Mixtures: a pure function of (seed, draw), right proportions, every record once per epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_lab.data.mixture import BLOCK, Mixture


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 3 * BLOCK),
)
def test_any_draw_can_be_asked_for_directly(sizes: list[int], seed: int, start: int) -> None:
    weights = [1.0 + i for i in range(len(sizes))]
    in_order, fresh = Mixture(sizes, weights, seed), Mixture(sizes, weights, seed)
    expected = [in_order[i] for i in range(start, start + 20)]
    assert [fresh[i] for i in reversed(range(start, start + 20))][::-1] == expected


def test_each_epoch_of_a_source_is_a_permutation() -> None:
    mixture = Mixture([7, 13], [1.0, 2.0], 0)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for i in range(2000):
        source, index = mixture[i]
        drawn[source].append(index)
    for source, size in ((0, 7), (1, 13)):
        epochs = [drawn[source][k : k + size] for k in range(0, len(drawn[source]) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # a new order every epoch


def test_proportions_follow_the_weights() -> None:
    mixture = Mixture([10, 10, 10], [1.0, 0.0, 3.0], 1)
    counts = Counter(mixture[i][0] for i in range(8000))
    assert counts[1] == 0
    assert counts[2] / counts[0] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(("sizes", "weights"), [([1], [1.0, 2.0]), ([], []), ([1, 1], [0.0, 0.0]), ([1], [-1.0])])
def test_bad_weights(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(sizes, weights, 0)
