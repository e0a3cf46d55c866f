"""Rates corrected by what tasks were measured to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.rates import Rates
from moe_lightning.pipeline.task import Task, TaskKind
from moe_lightning.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Refitted:
    """Rates whose tasks take so many times as long; kinds without a factor take what they did.

    Attributes:
        rates: of the machine as it was thought to be.
        factors: by kind of task.
    """

    rates: Rates
    factors: Mapping[TaskKind, float]

    @property
    def h2d(self) -> float:
        """Bytes/s of large copies to the GPU, which pages are."""
        return self.rates.h2d / self.factors.get(TaskKind.LOAD_PAGE, 1.0)

    @property
    def knows_cpu_experts(self) -> bool:
        """As the rates."""
        return self.rates.knows_cpu_experts

    def seconds(self, work: PassWork) -> Callable[[Task], float]:
        """What the rates say, times the factor of the kind."""
        before, factors = self.rates.seconds(work), dict(self.factors)
        return lambda task: before(task) * factors.get(task.kind, 1.0)


def fit(predicted: Timeline, measured: Timeline) -> dict[TaskKind, float]:
    """How many times as long as predicted the tasks of each kind took, all together.

    Kinds of which nothing was predicted or measured have no factor: nothing is known of them.
    """
    before, now = kind_seconds(predicted), kind_seconds(measured)
    return {kind: now[kind] / before[kind] for kind in TaskKind if before[kind] > 0 and now[kind] > 0}


def kind_seconds(timeline: Timeline) -> dict[TaskKind, float]:
    """Seconds of all tasks of each kind."""
    seconds = dict.fromkeys(TaskKind, 0.0)
    for record in timeline.records:
        seconds[record.kind] += record.seconds
    return seconds
