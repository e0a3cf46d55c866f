"""Measured points, and what is between and beyond them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from moe_lightning.errors import ConfigError


@dataclass(frozen=True)
class TimeCurve:
    """Seconds of one kind of work at several sizes, for work that takes no less time when there is more of it.

    Between two points the logarithm of the seconds is linear in that of the size, so both the seconds and the rate
    (size over seconds) stay between those of the points.

    Attributes:
        sizes: above 0, rising.
        seconds: as measured. Where a larger size took less, the smaller one was disturbed: it counts as no slower.

    Raises:
        ConfigError: the points are not as said.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        check_points(self.sizes, self.seconds, "seconds")

    def seconds_at(self, size: float) -> float:
        """Seconds at any size of 0 or more.

        Below the first point: a fixed cost, and the rest in proportion to the size, as the first two points have
        it; with one point only, all in proportion. Above the last point: at its rate.
        """
        sizes, seconds = self.sizes, self._risen
        if size >= sizes[-1]:
            return seconds[-1] * (size / sizes[-1])
        if size <= sizes[0]:
            return self.fixed_s + (seconds[0] - self.fixed_s) * (size / sizes[0])
        return _between(sizes, seconds, size)

    def rate_at(self, size: float) -> float:
        """Size over seconds, at a size above 0."""
        return size / self.seconds_at(size)

    @property
    def best_rate(self) -> float:
        """The highest rate of the points."""
        return max(size / second for size, second in zip(self.sizes, self.seconds, strict=True))

    def never_slower(self) -> TimeCurve:
        """The curve of work whose rate falls at no larger size: where it did, the larger one was disturbed."""
        rates = accumulate(
            (size / second for size, second in zip(self.sizes, self.seconds, strict=True)), max
        )
        return TimeCurve(self.sizes, tuple(size / rate for size, rate in zip(self.sizes, rates, strict=True)))

    @cached_property
    def fixed_s(self) -> float:
        """Seconds at size 0: where the line through the first two points ends."""
        if len(self.sizes) == 1:
            return 0.0
        (x, more_x), (y, more_y) = self.sizes[:2], self._risen[:2]
        return min(y, max(0.0, y - (more_y - y) / (more_x - x) * x))

    @cached_property
    def _risen(self) -> tuple[float, ...]:
        """Seconds without what disturbed a smaller size more than a larger one."""
        return tuple(accumulate(reversed(self.seconds), min))[::-1]


@dataclass(frozen=True)
class RateCurve:
    """A rate at several sizes: between them its logarithm is linear in that of the size, beyond them it stays.

    Attributes:
        sizes: above 0, rising.
        rates: bytes/s or FLOP/s.

    Raises:
        ConfigError: the points are not as said.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        check_points(self.sizes, self.rates, "rates")

    def rate_at(self, size: float) -> float:
        """The rate at any size."""
        if size >= self.sizes[-1]:
            return self.rates[-1]
        return self.rates[0] if size <= self.sizes[0] else _between(self.sizes, self.rates, size)


def check_points(sizes: Sequence[float], values: Sequence[float], name: str) -> None:
    """Make sure that these are points of a curve.

    Raises:
        ConfigError: there are none, their numbers differ, or one is out of place.
    """
    if not sizes or len(sizes) != len(values):
        raise ConfigError(
            f"{len(sizes)} sizes and {len(values)} {name}; a curve has one or more points, with both of each"
        )
    for key, numbers in (("sizes", sizes), (name, values)):
        for index, number in enumerate(numbers):
            if not 0 < number < math.inf:
                raise ConfigError(f"{key}[{index}] is {number}; it must be a number above 0")
    for index in range(1, len(sizes)):
        if sizes[index] <= sizes[index - 1]:
            raise ConfigError(
                f"sizes[{index}] is {sizes[index]} after {sizes[index - 1]}; sizes must rise from point to point"
            )


def _between(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    after = bisect_right(sizes, size)
    x, next_x = sizes[after - 1], sizes[after]
    y, next_y = values[after - 1], values[after]
    share = math.log(size / x) / math.log(next_x / x)
    return y * math.exp(share * math.log(next_y / y))
