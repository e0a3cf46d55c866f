"""What was predicted of a pass beside what was measured of it, by lane or by kind of task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from moe_lightning.perf.refit import kind_seconds
from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.pipeline.timeline import Timeline


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes:
        name: a lane, a kind of task, or the pass.
        count: tasks.
        predicted_s: seconds; None where nothing was predicted.
        measured_s: seconds.
    """

    name: str
    count: int
    predicted_s: float | None
    measured_s: float

    @property
    def ratio(self) -> float | None:
        """How many times as long as predicted; None where nothing was."""
        return self.measured_s / self.predicted_s if self.predicted_s else None


def by_lane(predicted: Timeline | None, measured: Timeline) -> list[Row]:
    """A row for each lane that works, with the seconds in which it does, and one for the pass until its tokens."""
    counts = Counter(record.lane for record in measured.records)
    now, before = measured.busy_seconds(), predicted.busy_seconds() if predicted else {}
    rows = [Row(lane, counts[lane], before.get(lane), now[lane]) for lane in Lane if counts[lane]]
    whole = predicted.until_tokens if predicted else None
    return [*rows, Row("pass", len(measured.records), whole, measured.until_tokens)]


def by_kind(predicted: Mapping[TaskKind, float] | None, measured: Timeline) -> list[Row]:
    """A row for each kind of task that ran, with the seconds of all its tasks."""
    counts = Counter(record.kind for record in measured.records)
    now, before = kind_seconds(measured), predicted or {}
    return [Row(kind, counts[kind], before.get(kind), now[kind]) for kind in TaskKind if counts[kind]]
