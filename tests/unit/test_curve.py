"""Curves between, at and beyond their points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.curve import RateCurve, TimeCurve

POSITIVE = st.floats(1e-9, 1e9)
SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=8, unique=True).map(sorted)


@st.composite
def time_curves(draw: st.DrawFn) -> TimeCurve:
    sizes = draw(SIZES)
    return TimeCurve(tuple(sizes), tuple(draw(POSITIVE) for _ in sizes))


@st.composite
def rate_curves(draw: st.DrawFn) -> RateCurve:
    sizes = draw(SIZES)
    return RateCurve(tuple(sizes), tuple(draw(POSITIVE) for _ in sizes))


@settings(deadline=None)
@given(time_curves(), st.floats(0, 1e10), st.floats(0, 1e10))
def test_more_work_never_takes_less_time(curve: TimeCurve, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert curve.seconds_at(low) <= curve.seconds_at(high) * (1 + 1e-9)


@settings(deadline=None)
@given(time_curves())
def test_a_point_that_no_larger_size_contradicts_is_met(curve: TimeCurve) -> None:
    for number, (size, seconds) in enumerate(zip(curve.sizes, curve.seconds, strict=True)):
        least = min(curve.seconds[number:])
        assert math.isclose(curve.seconds_at(size), least, rel_tol=1e-9)
        assert curve.seconds_at(size) <= seconds * (1 + 1e-9)


@settings(deadline=None)
@given(time_curves(), st.floats(1, 1e3))
def test_beyond_the_last_point_its_rate_holds(curve: TimeCurve, factor: float) -> None:
    last = curve.sizes[-1]
    assert math.isclose(curve.seconds_at(last * factor), curve.seconds[-1] * factor, rel_tol=1e-9)


@settings(deadline=None)
@given(time_curves(), st.floats(0, 1))
def test_below_the_first_point_lie_a_fixed_cost_and_a_share_of_the_rest(
    curve: TimeCurve, share: float
) -> None:
    first = curve.seconds_at(curve.sizes[0])
    assert 0 <= curve.fixed_s <= first
    expected = curve.fixed_s + (first - curve.fixed_s) * share
    assert math.isclose(curve.seconds_at(curve.sizes[0] * share), expected, rel_tol=1e-9, abs_tol=1e-18)


@settings(deadline=None)
@given(
    st.floats(1e-7, 1e-3), st.floats(1e6, 1e12), SIZES.filter(lambda sizes: len(sizes) > 1), st.floats(0, 1)
)
def test_a_fixed_cost_beside_a_rate_is_found_again(
    fixed: float, rate: float, sizes: list[int], share: float
) -> None:
    curve = TimeCurve(tuple(sizes), tuple(fixed + size / rate for size in sizes))
    size = share * sizes[0]
    assert math.isclose(curve.seconds_at(size), fixed + size / rate, rel_tol=1e-3)


@settings(deadline=None)
@given(time_curves(), st.data())
def test_between_two_rising_points_seconds_and_rate_are_between_theirs(
    curve: TimeCurve, data: st.DataObject
) -> None:
    rising = TimeCurve(curve.sizes, tuple(sorted(curve.seconds)))
    size = data.draw(st.floats(rising.sizes[0], rising.sizes[-1]))
    number = max(n for n, start in enumerate(rising.sizes) if start <= size)
    ends = [n for n in (number, number + 1) if n < len(rising.sizes)]
    seconds = [rising.seconds[n] for n in ends]
    rates = [rising.sizes[n] / rising.seconds[n] for n in ends]
    assert min(seconds) * (1 - 1e-9) <= rising.seconds_at(size) <= max(seconds) * (1 + 1e-9)
    assert min(rates) * (1 - 1e-9) <= rising.rate_at(size) <= max(rates) * (1 + 1e-9)


@settings(deadline=None)
@given(rate_curves(), st.floats(1e-3, 1e10))
def test_a_rate_is_never_beyond_those_that_were_measured(curve: RateCurve, size: float) -> None:
    assert min(curve.rates) * (1 - 1e-9) <= curve.rate_at(size) <= max(curve.rates) * (1 + 1e-9)


@settings(deadline=None)
@given(rate_curves())
def test_a_rate_curve_meets_its_points_and_stays_beyond_them(curve: RateCurve) -> None:
    for size, rate in zip(curve.sizes, curve.rates, strict=True):
        assert math.isclose(curve.rate_at(size), rate, rel_tol=1e-9)
    assert curve.rate_at(curve.sizes[0] / 2) == curve.rates[0]
    assert curve.rate_at(curve.sizes[-1] * 2) == curve.rates[-1]


def test_one_point_means_one_rate_everywhere() -> None:
    curve = TimeCurve((100,), (2.0,))
    assert [curve.seconds_at(size) for size in (0, 50, 100, 400)] == [0.0, 1.0, 2.0, 8.0]


def test_halfway_between_two_sizes_on_a_logarithmic_scale_is_their_geometric_mean() -> None:
    assert TimeCurve((1, 100), (2.0, 18.0)).seconds_at(10) == pytest.approx(6.0)
    assert RateCurve((1, 100), (2.0, 18.0)).rate_at(10) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ((), (), "0 sizes and 0"),
        ((1.0, 2.0), (1.0,), "2 sizes and 1"),
        ((1.0, 1.0), (1.0, 2.0), r"sizes\[1\] is 1.0 after 1.0; sizes must rise"),
        ((2.0, 1.0), (1.0, 2.0), r"sizes\[1\] is 1.0 after 2.0; sizes must rise"),
        ((0.0, 1.0), (1.0, 2.0), r"sizes\[0\] is 0.0; it must be a number above 0"),
        ((1.0, 2.0), (1.0, -3.0), r"\[1\] is -3.0; it must be a number above 0"),
        ((1.0, 2.0), (1.0, 0.0), r"\[1\] is 0.0; it must be a number above 0"),
        ((1.0, 2.0), (math.nan, 1.0), r"\[0\] is nan; it must be a number above 0"),
        ((1.0, math.inf), (1.0, 1.0), r"sizes\[1\] is inf; it must be a number above 0"),
    ],
)
@pytest.mark.parametrize("kind", [TimeCurve, RateCurve])
def test_points_that_are_none_are_refused_with_their_value(
    kind: type, sizes: tuple[float, ...], values: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(sizes, values)
