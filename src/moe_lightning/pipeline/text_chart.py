"""Timelines as plain text."""

from __future__ import annotations

from collections import defaultdict

from moe_lightning.errors import ConfigError
from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.units import format_duration

LETTERS = {
    TaskKind.EMBED: "e",
    TaskKind.PRE_ATTENTION: "q",
    TaskKind.OFFLOAD_QKV: "o",
    TaskKind.ATTENTION: "A",
    TaskKind.LOAD_HIDDEN: "h",
    TaskKind.PREFILL_ATTENTION: "F",
    TaskKind.STORE_KV: "s",
    TaskKind.LOAD_KV: "k",
    TaskKind.GPU_ATTENTION: "G",
    TaskKind.RESIDENT_ATTENTION: "R",
    TaskKind.KEEP_KV: "K",
    TaskKind.POST_ATTENTION: "p",
    TaskKind.LOAD_PAGE: "W",
    TaskKind.EXPERTS: "X",
    TaskKind.OFFLOAD_INPUTS: "i",
    TaskKind.CPU_EXPERTS: "C",
    TaskKind.ADD_OUTPUTS: "a",
    TaskKind.SAMPLE: "t",
}
_IDLE = "."


def to_text(timeline: Timeline, width: int = 100) -> str:
    """A grid with a row per lane and `width` cells of equal time.

    A cell shows what fills most of it, a kind of task or nothing (``.``). The legend and each lane's share of
    busy time follow.

    Raises:
        ConfigError: the width is below 1.
    """
    if width < 1:
        raise ConfigError(f"a timeline of width {width} shows nothing; give 1 or more")
    rows = [f"{lane.upper():4} {_row(timeline, lane, width)}" for lane in Lane]
    present = {record.kind for record in timeline.records}
    legend = [f"{letter} {kind}" for kind, letter in LETTERS.items() if kind in present]
    shares = [f"{lane.upper()} {share:.0%}" for lane, share in timeline.utilization().items()]
    head = f"{timeline.name}, {format_duration(timeline.span)}"
    return (
        "\n".join([head, *rows, "; ".join([*legend, f"{_IDLE} idle"]), "busy: " + ", ".join(shares)]) + "\n"
    )


def _row(timeline: Timeline, lane: Lane, width: int) -> str:
    """The cells of a lane."""
    if timeline.span <= 0:
        return _IDLE * width
    cells = [defaultdict[str, float](float) for _ in range(width)]
    for record in timeline.records:
        if record.lane is not lane:
            continue
        start = (record.start - timeline.start) / timeline.span * width
        end = (record.end - timeline.start) / timeline.span * width
        for cell in range(int(start), min(int(end) + 1, width)):
            cells[cell][LETTERS[record.kind]] += min(end, cell + 1) - max(start, cell)
    return "".join(_letter(cell) for cell in cells)


def _letter(cell: dict[str, float]) -> str:
    idle = 1 - sum(cell.values())
    letter, share = max(cell.items(), key=lambda item: item[1], default=(_IDLE, 0.0))
    # Rounding must not turn a cell that is exactly half busy into one thing here and another there.
    return letter if share >= idle - 1e-9 and share > 0 else _IDLE
