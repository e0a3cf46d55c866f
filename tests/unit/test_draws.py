from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.engine.draws import uniform

GOLDEN = (0.6299085342998937, 0.5315736317031288, 0.3536341030580943)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 1023), st.integers(0, 2**31))
def test_every_draw_is_at_least_zero_and_below_one(seed, index, position):
    assert 0.0 <= uniform(seed, index, position) < 1.0


def test_draws_are_the_same_on_every_platform_and_in_every_release():
    assert uniform(0, 0, 0) == GOLDEN[0]
    assert uniform(-1, 2, 3) == GOLDEN[1]
    assert uniform(2**64 - 1, 0, 4096) == GOLDEN[2]


def test_seed_index_and_position_each_change_the_draw():
    draws = {uniform(s, i, p) for s in (-1, 0, 1, 2**64 - 1) for i in range(8) for p in range(64)}
    assert len(draws) == 4 * 8 * 64


def test_draws_fill_the_interval_evenly():
    buckets = [0] * 32
    for position in range(32_000):
        buckets[int(uniform(7, 0, position) * 32)] += 1
    chi_square = sum((count - 1000) ** 2 / 1000 for count in buckets)
    assert chi_square < 31 + 5 * math.sqrt(2 * 31)  # five standard deviations


def test_draws_of_neighbouring_positions_and_seeds_are_uncorrelated():
    n = 10_000
    for left, right in (
        ([uniform(1, 0, p) for p in range(n)], [uniform(1, 0, p + 1) for p in range(n)]),
        ([uniform(s, 0, 0) for s in range(n)], [uniform(s + 1, 0, 0) for s in range(n)]),
        ([uniform(1, 0, p) for p in range(n)], [uniform(1, 1, p) for p in range(n)]),
    ):
        covariance = sum((a - 0.5) * (b - 0.5) for a, b in zip(left, right, strict=True)) / n
        assert abs(covariance * 12) < 5 / math.sqrt(n)
