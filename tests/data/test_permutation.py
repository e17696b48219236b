"""The order that is computed on the fly: a permutation, for any number, and a random one."""

import numpy as np
import pytest

from llm.data.permutation import Permutation


def test_each_number_is_there_once() -> None:
    for length in [*range(130), 1000, 4096, 10_007]:
        assert sorted(Permutation(length, (1, length))[:].tolist()) == [*range(length)]


def test_it_is_decided_by_its_stream_and_place_alone() -> None:
    whole = Permutation(1000, (3, 4))[:]
    assert Permutation(1000, (3, 4))[500:520].tolist() == whole[500:520].tolist()
    assert Permutation(1000, (3, 4))[np.array([7, 3])].tolist() == whole[[7, 3]].tolist()
    assert Permutation(1000, (3, 5))[:].tolist() != whole.tolist()


def test_all_orders_are_equally_likely() -> None:
    """Of the 24 orders of 4 things, 200 each are expected; by chi-squared, 23 degrees of freedom."""
    orders = [tuple(Permutation(4, (seed,))[:].tolist()) for seed in range(4800)]
    counts = np.array([orders.count(order) for order in {*orders}])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 60  # beyond 1 in 25,000


def test_ten_to_the_twelve_windows_take_no_memory() -> None:
    order = Permutation(10**12, (123, 0, 0))
    some = order[5 * 10**11 : 5 * 10**11 + 100_000]
    assert len({*some.tolist()}) == 100_000
    assert 0 <= some.min() < 10**8
    assert 10**12 - 10**8 < some.max() < 10**12
    assert some.mean() == pytest.approx(5e11, rel=0.01)
    assert abs(np.corrcoef(some[:-1], some[1:])[0, 1]) < 0.02
    assert np.histogram(some, 100, (0, 10**12))[0].std() < 50  # 32 is expected
