"""How turns of several works are counted, by a clock that tests turn."""

from __future__ import annotations

import pytest

from moe_lightning.bench import timing


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def measured(clock, budget, *seconds):
    """Two works, the first of which takes these seconds in its turns; what was called and found."""
    turns, called = iter(seconds), []

    def first():
        called.append("first")
        clock.now += next(turns)

    def second():
        called.append("second")
        clock.now += 1.0

    def before(number):
        called.append(number)
        clock.now += 0.25

    def after():
        called.append("after")
        clock.now += 0.25

    return called, timing.seconds_in_turn([first, second], budget, before, after)


def test_works_take_turns_and_the_first_round_and_what_comes_before_and_after_do_not_count(clock):
    called, found = measured(clock, 5.0, 9.0, 2.0, 3.0, 4.0)
    assert found == [3.0, 1.0]
    assert called == [0, "first", "after", 1, "second", "after"] * 4


def test_a_slow_turn_makes_all_works_slower_alike(clock):
    _, found = measured(clock, 5.0, 9.0, 2.0, 2.0, 8.0)
    assert found == pytest.approx([2.0 * 5 / 3, 1.0 * 5 / 3]), (
        "a mean of 4 and of 1, beside medians of 2 and 1"
    )


def test_rounds_go_on_until_the_budget_of_all_is_spent(clock):
    called, found = measured(clock, 12.0, *[1.0] * 50)
    assert found == [1.0, 1.0] and len(called) == 6 * 9, "3 s a round, 24 s in all are exceeded by the ninth"


def test_works_that_take_much_longer_than_the_budget_have_one_round_that_counts(clock):
    called, found = measured(clock, 0.1, *[1.0] * 50)
    assert found == [1.0, 1.0] and len(called) == 6 * 2
