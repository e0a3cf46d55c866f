"""Timelines as SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline
from moe_lightning.units import format_duration

# One hue per lane, light enough for dark text on it.
COLOURS = {
    TaskKind.EMBED: "#cfd8dc",
    TaskKind.PRE_ATTENTION: "#90caf9",
    TaskKind.PREFILL_ATTENTION: "#5c9ce6",
    TaskKind.GPU_ATTENTION: "#4dd0e1",
    TaskKind.RESIDENT_ATTENTION: "#26a69a",
    TaskKind.KEEP_KV: "#90a4ae",
    TaskKind.POST_ATTENTION: "#80cbc4",
    TaskKind.EXPERTS: "#81c784",
    TaskKind.SAMPLE: "#bcaaa4",
    TaskKind.LOAD_PAGE: "#ffb74d",
    TaskKind.LOAD_HIDDEN: "#e57373",
    TaskKind.LOAD_KV: "#f48fb1",
    TaskKind.OFFLOAD_QKV: "#ba9ce0",
    TaskKind.STORE_KV: "#d7bde9",
    TaskKind.ATTENTION: "#dce775",
    TaskKind.OFFLOAD_INPUTS: "#9575cd",
    TaskKind.CPU_EXPERTS: "#aed581",
    TaskKind.ADD_OUTPUTS: "#ef9a9a",
}
_LEFT, _PLOT, _RIGHT = 110, 1200, 30  # px across: lane names, time, margin
_TOP, _ROW, _BAR = 44, 52, 40  # px down: title, distance of rows, height of a bar
_SLIVER = 0.3  # px; narrower bars are drawn together
_MERGED = 1.0  # px; what slivers are merged to, so that a row of them still shows its colours
_CHAR = 5.8  # px of a character in a bar
_LEGEND_COLUMNS = 5
_STYLE = (
    "text{font-family:sans-serif;font-size:12px;fill:#222}.title{font-size:15px;font-weight:bold}"
    ".lane{font-size:14px;font-weight:bold}.bar{font-size:10px;pointer-events:none}"
    ".grid{stroke:#ddd}.row{fill:#f5f5f5}.task{stroke:#fff;stroke-width:.5}"
)


def to_svg(timeline: Timeline) -> str:
    """A Gantt chart with a row per lane, a colour per kind of task and a tooltip per bar."""
    bottom = _TOP + _ROW * len(Lane)
    kinds = [kind for kind in COLOURS if any(record.kind is kind for record in timeline.records)]
    height = bottom + 44 + 20 * math.ceil(len(kinds) / _LEGEND_COLUMNS)
    width = _LEFT + _PLOT + _RIGHT
    size = f'width="{width}" height="{height}"'
    title = escape(f"{timeline.name}: {format_duration(timeline.span)}, {len(timeline.records)} tasks")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect {size} fill="#fff"/>',
        f'<text class="title" x="{_LEFT}" y="24">{title}</text>',
        *_axis(timeline.span, bottom),
    ]
    for row, (lane, share) in enumerate(timeline.utilization().items()):
        parts += _lane(timeline, lane, share, _TOP + row * _ROW)
    parts += _legend(timeline, kinds, bottom + 36)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(span: float, bottom: int) -> Iterator[str]:
    """Grid lines with their times, counted from the start."""
    if span <= 0:
        return
    step = _tick_step(span / 10)
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if span * s >= 1), ("µs", 1e6))
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    for tick in range(int(span / step * (1 + 1e-9)) + 1):
        x = _LEFT + tick * step / span * _PLOT
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>'
        label = f"{tick * step * scale:.{digits}f} {unit}"
        yield f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{label}</text>'


def _tick_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((m * power for m in (1, 2, 5) if m * power >= least * (1 - 1e-9)), 10 * power)


def _lane(timeline: Timeline, lane: Lane, share: float, top: int) -> Iterator[str]:
    yield f'<text class="lane" x="{_LEFT - 10}" y="{top + 18}" text-anchor="end">{lane.upper()}</text>'
    yield f'<text x="{_LEFT - 10}" y="{top + 34}" text-anchor="end">{share:.0%} busy</text>'
    yield f'<rect class="row" x="{_LEFT}" y="{top}" width="{_PLOT}" height="{_BAR}" fill-opacity=".6"/>'
    if timeline.span <= 0:
        return
    scale = _PLOT / timeline.span
    records = sorted((r for r in timeline.records if r.lane is lane), key=lambda r: (r.start, r.end))
    for bar in _bars(records, scale):
        yield _bar(bar, _LEFT + (bar[0].start - timeline.start) * scale, scale, top)


def _bars(records: Sequence[Record], scale: float) -> Iterator[list[Record]]:
    """The records in order, slivers next to each other in one list."""
    bar: list[Record] = []
    for record in records:
        is_sliver = record.seconds * scale < _SLIVER
        if bar and is_sliver and bar[0].seconds * scale < _SLIVER:
            near = (record.start - bar[-1].end) * scale < _SLIVER
            if near and (record.end - bar[0].start) * scale <= _MERGED:
                bar.append(record)
                continue
        if bar:
            yield bar
        bar = [record]
    if bar:
        yield bar


def _bar(bar: list[Record], x: float, scale: float, top: int) -> str:
    start, end = bar[0].start, max(record.end for record in bar)
    width = max((end - start) * scale, _SLIVER)
    seconds = Counter[TaskKind]()
    for record in bar:
        seconds[record.kind] += round(record.seconds * 1e12)
    colour = COLOURS[seconds.most_common(1)[0][0]]
    # A white edge parts neighbours, but would paint over a narrow bar.
    edge = ' class="task"' if width > 4 else ""
    rect = f'<rect{edge} x="{x:.2f}" y="{top}" width="{width:.2f}" height="{_BAR}" fill="{colour}">'
    text = rect + f"<title>{escape(_tooltip(bar, end - start))}</title></rect>"
    label = bar[0].task_name.removeprefix(f"{bar[0].kind} ")
    if len(bar) == 1 and len(label) * _CHAR + 4 <= width:
        middle = f'x="{x + width / 2:.2f}" y="{top + _BAR / 2 + 4:.0f}"'
        text += f'<text class="bar" {middle} text-anchor="middle">{escape(label)}</text>'
    return text


def _tooltip(bar: list[Record], seconds: float) -> str:
    if len(bar) == 1:
        return f"{bar[0].task_name}: {format_duration(seconds)}"
    counts = Counter(record.kind for record in bar)
    what = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f"{len(bar)} tasks ({what}): {format_duration(seconds)}"


def _legend(timeline: Timeline, kinds: Sequence[TaskKind], top: int) -> Iterator[str]:
    """The colours, with what all tasks of a kind take together."""
    column = _PLOT / _LEGEND_COLUMNS
    for place, kind in enumerate(kinds):
        x, y = _LEFT + place % _LEGEND_COLUMNS * column, top + place // _LEGEND_COLUMNS * 20
        total = sum(record.seconds for record in timeline.records if record.kind is kind)
        yield f'<rect x="{x:.0f}" y="{y}" width="14" height="12" fill="{COLOURS[kind]}"/>'
        yield f'<text x="{x + 20:.0f}" y="{y + 10}">{kind} {format_duration(total)}</text>'
