"""A drawing of the Hierarchical Roofline Model with a model's operators on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lightning.errors import ConfigError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.operators import Operator, decode_attention, experts
from moe_lightning.perf.roofline import HierarchicalRoofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
_CONTEXTS = (128, 512, 2048, 8192)
_MICRO_BATCHES = (4, 32, 256, 2048)
_BLUE, _GREEN, _RED, _GREY = "#1f5fa8", "#2e7d32", "#c62828", "#555555"
_DPI = 110


@dataclass(frozen=True)
class RooflineChart:
    """What is drawn.

    Attributes:
        title: above the drawing.
        roofline: the two levels and their link.
        attention: operators that run at the lower level, where their data lies.
        experts: operators that run at the upper level.
        chosen: the experts' micro-batch size whose balance point is drawn.
    """

    title: str
    roofline: HierarchicalRoofline
    attention: tuple[Operator, ...]
    experts: tuple[Operator, ...]
    chosen: Operator

    @property
    def balanced_tokens(self) -> int:
        """Tokens a pass at which the chosen micro-batches wait for the link as long as for GPU memory."""
        balance = self.roofline.balance_point(self.chosen.gpu_intensity)
        return round(self.chosen.size * balance / self.chosen.host_intensity)


def chart_of(
    spec: ModelSpec, roofline: HierarchicalRoofline, dtype: str, title: str, micro_batch_size: int
) -> RooflineChart:
    """The chart of a model at usual context lengths and micro-batch sizes, the balance at a given one."""
    chosen = experts(spec, dtype, micro_batch_size)
    others = [experts(spec, dtype, size) for size in _MICRO_BATCHES]
    # What lies next to the chosen one or its balance point, on a logarithmic axis, would hide their names.
    named = chosen.gpu_intensity, roofline.balance_point(chosen.gpu_intensity)
    apart = [o for o in others if all(abs(math.log2(o.gpu_intensity / i)) > 1.2 for i in named)]
    return RooflineChart(
        title=title,
        roofline=roofline,
        attention=tuple(decode_attention(spec, dtype, context) for context in _CONTEXTS),
        experts=tuple(sorted((*apart, chosen), key=lambda o: o.size)),
        chosen=chosen,
    )


def check_plot_path(path: Path) -> None:
    """Make sure that a drawing can be made, before anything else is computed.

    Raises:
        ConfigError: the name ends in no format that is known, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"cannot draw {path}: its name ends in {path.suffix!r}; use {' or '.join(FORMATS)}")
    _matplotlib()


def draw_roofline(path: Path, chart: RooflineChart) -> None:
    """Write the chart as SVG or PNG, as the file's name ends; equal charts give equal files.

    Raises:
        ConfigError: the format is not known, the file cannot be written, or matplotlib is not installed.
    """
    check_plot_path(path)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    # Text that stays text keeps SVG small.
    with _matplotlib().rc_context({"svg.hashsalt": "moe-lightning", "svg.fonttype": "none"}):
        try:
            figure_of(chart).savefig(path, dpi=_DPI, metadata=metadata)
        except OSError as e:
            raise ConfigError(f"cannot write {path}: {e.strerror}; choose another path") from e


def figure_of(chart: RooflineChart) -> Figure:
    """The chart as a figure of matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4), layout="constrained")
    axes = figure.add_subplot()
    low, high = _span(chart)
    bottom = 0.5 * min(chart.roofline.link, chart.roofline.lower.bandwidth) * low
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, 4 * chart.roofline.upper.flops))
    axes.set_title(chart.title)
    axes.set_xlabel("operational intensity: FLOP per byte of the level that the roof belongs to")
    axes.set_ylabel("attainable FLOP/s")
    axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    _format_ticks(axes)
    _draw_roofs(axes, chart, low, high)
    _draw_operators(axes, chart)
    _draw_points(axes, chart)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9)
    return figure


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError(
            "drawings need matplotlib, which is not installed; pip install 'moe-lightning[plot]'"
        ) from e
    return matplotlib


def _span(chart: RooflineChart) -> tuple[float, float]:
    r, operators = chart.roofline, (*chart.attention, *chart.experts)
    intensities = [i for o in operators for i in (o.gpu_intensity, o.host_intensity)]
    marks = (r.turning_point_2(math.inf), r.balance_point(chart.chosen.gpu_intensity), r.upper.ridge)
    return min(intensities) / 4, 5 * max(*marks, *intensities)


def _format_ticks(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(LogLocator(numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _draw_roofs(axes: Axes, chart: RooflineChart, low: float, high: float) -> None:
    r = chart.roofline
    for level, colour in ((r.upper, _BLUE), (r.lower, _GREEN)):
        x = [low, level.ridge, high] if level.flops else [low, high]
        label = f"{level.name}: {_rate(level.bandwidth, 'B/s')}, {_rate(level.flops, 'FLOP/s')}"
        axes.plot(x, [level.attainable(i) for i in x], color=colour, linewidth=2, label=label)
    x = [low, r.turning_point_2(math.inf)]  # further right the upper level's own roof is lower
    axes.plot(x, [r.link * i for i in x], color=_RED, linewidth=2, label=f"link: {_rate(r.link, 'B/s')}")


def _draw_operators(axes: Axes, chart: RooflineChart) -> None:
    upper, lower = chart.roofline.upper, chart.roofline.lower
    first, last = chart.attention[0], chart.attention[-1]
    span = f"context {first.size:,} to {last.size:,}"
    at_home = [(o.host_intensity, lower.attainable(o.host_intensity)) for o in chart.attention]
    _draw_pair(
        axes, chart, chart.attention, at_home, "o", _GREEN, f"decode attention, {span}, where its KV lies"
    )
    _label(axes, "attention", *at_home[0], (-6, 5), "right")
    at_home = [(o.gpu_intensity, upper.attainable(o.gpu_intensity)) for o in chart.experts]
    _draw_pair(
        axes, chart, chart.experts, at_home, "s", _BLUE, "experts, n tokens at once, weights on the GPU"
    )
    for operator, point in zip(chart.experts, at_home, strict=True):
        _label(axes, f"n={operator.size:,}", *point, (-6, 5), "right")


def _draw_pair(
    axes: Axes,
    chart: RooflineChart,
    operators: Sequence[Operator],
    at_home: Sequence[tuple[float, float]],
    marker: str,
    colour: str,
    label: str,
) -> None:
    """Filled where the data lies at the level that computes, hollow where it is fetched."""
    axes.plot(*zip(*at_home, strict=True), marker, color=colour, label=label)
    x = [o.host_intensity for o in operators]
    fetched = [chart.roofline.attainable(o.gpu_intensity, o.host_intensity) for o in operators]
    axes.plot(
        x, fetched, marker, color=colour, fillstyle="none", label="the same, fetched over the link each time"
    )


def _draw_points(axes: Axes, chart: RooflineChart) -> None:
    r, n = chart.roofline, chart.chosen
    p1, p2, balance = r.turning_point_1, r.turning_point_2(math.inf), r.balance_point(n.gpu_intensity)
    if p1 > 0:
        label = f"P1, {p1:,.0f} FLOP/byte: left of it, compute where the data lies"
        _mark(axes, (p1, r.link * p1), "D", label)
        _label(axes, "P1", p1, r.link * p1, (7, -12), "left")
    _mark(axes, (p2, r.link * p2), "^", f"P2, {p2:,.0f} FLOP/byte: right of it, the link is no bound")
    _label(axes, "P2", p2, r.link * p2, (7, -12), "left")
    reached = r.upper.attainable(n.gpu_intensity)
    axes.plot([n.gpu_intensity, balance], [reached, reached], "--", color=_GREY, linewidth=1)
    label = f"balance of n={n.size:,}, {balance:,.0f} FLOP/byte: {chart.balanced_tokens:,} tokens a pass"
    _mark(axes, (balance, reached), "*", label)
    _label(axes, "balance", balance, reached, (-5, 6), "right")


def _mark(axes: Axes, point: tuple[float, float], marker: str, label: str) -> None:
    x, y = point
    axes.plot([x, x], [axes.get_ylim()[0], y], ":", color=_GREY, linewidth=1)
    axes.plot([x], [y], marker, color="black", markersize=12 if marker == "*" else 7, label=label)


def _label(axes: Axes, text: str, x: float, y: float, offset: tuple[float, float], align: str) -> None:
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha=align, fontsize=9)


def _rate(value: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:,.4g} {prefix}{unit}"
    return f"{value:,.4g} {unit}"
