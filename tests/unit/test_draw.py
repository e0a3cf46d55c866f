from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from pass_shapes import pass_shapes

from moe_lightning.errors import ConfigError
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.draw import from_chrome, to_chrome, to_svg, to_text
from moe_lightning.pipeline.gantt import COLOURS
from moe_lightning.pipeline.simulate import simulate
from moe_lightning.pipeline.task import Lane, PassShape, Task, TaskKind
from moe_lightning.pipeline.text_chart import LETTERS
from moe_lightning.pipeline.timeline import Record, Timeline

GOLDEN = Path(__file__).parents[1] / "golden"
SVG = "{http://www.w3.org/2000/svg}"
MILLISECONDS = {
    TaskKind.PRE_ATTENTION: 1,
    TaskKind.OFFLOAD_QKV: 1,
    TaskKind.ATTENTION: 3,
    TaskKind.LOAD_HIDDEN: 1,
    TaskKind.PREFILL_ATTENTION: 2,
    TaskKind.STORE_KV: 2,
    TaskKind.POST_ATTENTION: 1,
    TaskKind.LOAD_PAGE: 3,
    TaskKind.EXPERTS: 2,
    TaskKind.SAMPLE: 1,
}


def seconds(task: Task) -> float:
    return MILLISECONDS.get(task.kind, 0) * 1e-3


def predicted(num_layers: int = 2, num_decode: int = 3) -> Timeline:
    shape = PassShape(num_layers, 1, num_decode, 1, 2, (2,) * num_layers, 4, preloaded=True)
    return simulate(SCHEDULES["cgopipe"](shape), seconds)


SMALL = predicted()


def experts(start: float, end: float, lane: Lane = Lane.GPU) -> Record:
    return Record("experts L0 mb0", TaskKind.EXPERTS, lane, 0, (0,), start, end)


def test_each_kind_has_a_letter_and_a_colour_of_its_own() -> None:
    for marks in (LETTERS, COLOURS):
        assert set(marks) == set(TaskKind)
        assert len(set(marks.values())) == len(TaskKind)


def test_text_of_a_small_pass_is_the_golden_one() -> None:
    cells = round(SMALL.span / 1e-3)  # a cell is a millisecond
    assert to_text(SMALL, cells) == (GOLDEN / "timeline.txt").read_text()


def test_a_cell_shows_what_fills_most_of_it() -> None:
    sample = Record("sample mb0", TaskKind.SAMPLE, Lane.GPU, -1, (0,), 0.6, 1.0)
    t = Timeline("t", (experts(0.0, 0.6), sample, experts(1.0, 1.2), experts(2.9, 4.0)))
    assert to_text(t, 4).splitlines()[1] == "GPU  X..X"


def test_text_without_a_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 0"):
        to_text(SMALL, 0)


@settings(max_examples=30, deadline=None)
@given(shape=pass_shapes())
def test_a_trace_read_back_is_the_timeline(shape: PassShape) -> None:
    timeline = simulate(SCHEDULES["cgopipe"](shape), seconds)
    back = from_chrome(json.loads(json.dumps(to_chrome(timeline, {"gpu": "L4"}))))
    assert back.name == timeline.name
    for r, original in zip(back.records, timeline.records, strict=True):
        assert (r.task_name, r.kind, r.lane) == (original.task_name, original.kind, original.lane)
        assert (r.layer, r.micro_batches) == (original.layer, original.micro_batches)
        assert (r.start, r.end) == pytest.approx((original.start, original.end))


def test_a_trace_names_its_rows_and_keeps_what_is_told_about_the_run() -> None:
    trace = to_chrome(SMALL, {"gpu": "L4"})
    rows = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert rows == ["GPU", "H2D", "BACK", "D2H", "CPU"]
    assert trace["otherData"] == {"gpu": "L4", "name": "cgopipe"}


def test_events_of_other_programs_are_left_out() -> None:
    trace = to_chrome(SMALL)
    trace["traceEvents"] += [{"name": "aten::mm", "ph": "X", "ts": 0, "dur": 1}, {"name": "i", "ph": "i"}]
    assert len(from_chrome(trace).records) == len(SMALL.records)


@pytest.mark.parametrize("broken", [{}, {"traceEvents": []}, {"traceEvents": 3}, {"traceEvents": [7]}])
def test_what_is_no_trace_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="not a trace of a pass"):
        from_chrome(broken)


def bars(svg: str) -> list[ElementTree.Element]:
    return [
        rect
        for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    ]


def test_svg_has_a_bar_with_a_tooltip_for_each_wide_task_inside_the_plot() -> None:
    svg = to_svg(SMALL)
    tooltips = [bar.findtext(f"{SVG}title") or "" for bar in bars(svg)]
    for r in SMALL.records:
        if r.seconds > 0:
            assert f"{r.task_name}: {r.seconds * 1e3:.1f} ms" in tooltips
    right = max(float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in bars(svg))
    left = min(float(bar.attrib["x"]) for bar in bars(svg))
    assert (left, right) == (pytest.approx(110), pytest.approx(1310, abs=0.5))


def test_svg_merges_slivers_and_counts_every_task_once() -> None:
    tiny = [experts(t * 1e-6, (t + 1) * 1e-6) for t in range(5000)]
    t = Timeline("t", (*tiny, experts(0.1, 0.2), experts(0.0, 0.2, Lane.CPU)))
    titles = [bar.findtext(f"{SVG}title") or "" for bar in bars(to_svg(t))]
    merged = [int(title.split()[0]) for title in titles if " tasks (" in title]
    assert len(titles) < 100
    assert sum(merged) + len(titles) - len(merged) == len(t.records)


def test_svg_of_no_time_and_of_names_with_markup_is_valid() -> None:
    assert bars(to_svg(Timeline("a<b>&c", ()))) == []
    text = ElementTree.fromstring(to_svg(Timeline("a<b>&c", (experts(0, 1),)))).findtext(f"{SVG}text")
    assert text == "a<b>&c: 1.0 s, 1 tasks"


def test_svg_says_how_busy_each_lane_is() -> None:
    t = Timeline("t", (experts(0, 4), experts(1, 2, Lane.H2D)))
    labels = [text.text for text in ElementTree.fromstring(to_svg(t)).iter(f"{SVG}text")]
    assert labels[labels.index("H2D") + 1] == "25% busy"
