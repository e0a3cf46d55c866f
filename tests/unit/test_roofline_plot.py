from __future__ import annotations

import itertools
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import KNOWN_MODELS, resolve
from moe_lightning.perf.roofline import gpu_over_host, host_over_disk
from moe_lightning.perf.roofline_plot import (
    RooflineChart,
    chart_of,
    check_plot_path,
    draw_roofline,
    figure_of,
)

SIZES = (1, 17, 64, 324, 4096)


def chart(hardware: str = "l4", model: str = "mixtral-8x7b", size: int = 324) -> RooflineChart:
    return chart_of(
        resolve(model), gpu_over_host(preset(hardware), "float16"), "float16", f"{model} on {hardware}", size
    )


def lines_of(drawn: RooflineChart) -> dict[str, list[tuple[float, float]]]:
    """Points of each line or marker of the legend, by the label up to its first comma or colon."""
    axes = figure_of(drawn).axes[0]
    handles, labels = axes.get_legend_handles_labels()
    return {
        label: list(zip(*handle.get_data(), strict=True))
        for handle, label in zip(handles, labels, strict=True)
    }


def point(lines: dict[str, list[tuple[float, float]]], start: str) -> list[tuple[float, float]]:
    return next(points for label, points in lines.items() if label.startswith(start))


# -- correct -----------------------------------------------------------------------------------------------


def test_roofs_points_and_balance_are_where_they_are_by_hand() -> None:
    lines = lines_of(chart())  # L4: 121 TFLOP/s, 300 GB/s; host 1.6 TFLOP/s, 76 GiB/s; link 25.5 GB/s
    low, ridge, high = point(lines, "NVIDIA L4: 300 GB/s, 121 TFLOP/s")
    assert ridge == pytest.approx((121e12 / 300e9, 121e12))
    assert low[1] == pytest.approx(300e9 * low[0]) and high[1] == 121e12
    _, ridge, high = point(lines, "Xeon, 24 cores: 81.6 GB/s, 1.6 TFLOP/s")
    assert ridge == pytest.approx((1.6e12 / (76 * 2**30), 1.6e12)) and high[1] == 1.6e12
    assert point(lines, "link: 25.5 GB/s")[-1] == pytest.approx((121e12 / 25.5e9, 121e12))
    assert point(lines, "P1, 63 FLOP/byte") == [pytest.approx((1.6e12 / 25.5e9, 1.6e12))]
    assert point(lines, "P2, 4,745 FLOP/byte") == [pytest.approx((121e12 / 25.5e9, 121e12))]
    # 324 tokens of 2 experts in 8: 81 FLOP/byte of weights, and 300 / 25.5 times as many tokens for the link.
    ((x, y),) = point(lines, "balance of n=324, 950 FLOP/byte: 3,801 tokens a pass")
    assert (x, y) == pytest.approx((81 * 300 / 25.5, 81 * 300e9), rel=0.005)


@pytest.mark.parametrize("hardware", ["l4", "h100-sxm", "rtx-5090"])
def test_operators_lie_on_the_roof_that_bounds_them(hardware: str) -> None:
    drawn = chart(hardware)
    lines, model = lines_of(drawn), drawn.roofline
    for x, y in point(lines, "decode attention"):
        assert y == pytest.approx(min(model.lower.flops, model.lower.bandwidth * x))
    for x, y in point(lines, "experts"):
        assert y == pytest.approx(min(model.upper.flops, model.upper.bandwidth * x))
    figure = figure_of(drawn)
    hollow = [line for line in figure.axes[0].lines if line.get_fillstyle() == "none"]
    assert len(hollow) == 2
    for line in hollow:
        for x, y in zip(*line.get_data(), strict=True):
            assert y == pytest.approx(min(model.link * x, model.upper.flops), rel=0.01)


def test_the_balance_of_a_micro_batch_that_arithmetic_bounds_is_on_the_compute_roof() -> None:
    drawn = chart("l4", size=4096)
    ((x, y),) = point(lines_of(drawn), "balance of n=4,096")
    assert y == 121e12
    assert (
        x
        == drawn.roofline.balance_point(drawn.chosen.gpu_intensity)
        > drawn.roofline.turning_point_2(math.inf)
    )


def test_over_a_disk_there_is_no_p1() -> None:
    model = host_over_disk(preset("l4"), "float16", 5e9)
    lines = lines_of(chart_of(resolve("mixtral-8x7b"), model, "float16", "disk", 64))
    assert not any(label.startswith("P1") for label in lines)
    assert any(label.startswith("P2") for label in lines)


# -- legible -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["t4", "l4", "rtx-3090", "h100-sxm"])
@pytest.mark.parametrize("model", ["mixtral-8x7b", "llama-2-7b"])
def test_no_label_covers_another_or_leaves_the_drawing(hardware: str, model: str) -> None:
    for size in SIZES:
        figure = figure_of(chart(hardware, model, size))
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        renderer, axes = canvas.get_renderer(), figure.axes[0]
        labels = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
        frame = axes.get_window_extent(renderer)
        legend = axes.get_legend().get_window_extent(renderer)
        for name, box in labels.items():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, (size, name)
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, (size, name)
        for (a, first), (b, second) in itertools.combinations(labels.items(), 2):
            assert not first.overlaps(second), (size, a, b)
        assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= figure.bbox.x1
        assert not legend.overlaps(axes.xaxis.label.get_window_extent(renderer))
        assert not legend.overlaps(frame)


def test_every_micro_batch_size_is_labelled_the_chosen_one_among_them() -> None:
    for size in SIZES:
        texts = [text.get_text() for text in figure_of(chart(size=size)).axes[0].texts]
        assert f"n={size:,}" in texts
        assert len([t for t in texts if t.startswith("n=")]) >= 3
        assert {"P1", "P2", "balance", "attention"} <= set(texts)


@pytest.mark.parametrize("model", KNOWN_MODELS)
def test_all_that_is_drawn_is_within_the_axes(model: str) -> None:
    axes = figure_of(chart("l4", model, 64)).axes[0]
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for line in axes.lines:
        for x, y in zip(*line.get_data(), strict=True):
            assert low <= x <= high and bottom <= y * (1 + 1e-9) and y <= top


# -- files -------------------------------------------------------------------------------------------------


def test_svg_is_small_keeps_its_text_and_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.SVG"
    draw_roofline(first, chart())
    draw_roofline(second, chart())
    text = first.read_text()
    assert second.read_text() == text and len(text) < 40_000
    words = " ".join(node.text or "" for node in ET.fromstring(text).iter() if node.tag.endswith("text"))
    for label in ("mixtral-8x7b on l4", "P1", "P2", "balance", "n=324", "NVIDIA L4", "attainable FLOP/s"):
        assert label in words


def test_png_is_written_too(tmp_path: Path) -> None:
    draw_roofline(tmp_path / "a.png", chart())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a.pdf", "a", "svg"])
def test_a_format_that_is_not_known_is_refused_before_anything_is_computed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"use \.svg or \.png"):
        check_plot_path(Path(name))


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"need matplotlib.*pip install 'moe-lightning\[plot\]'"):
        draw_roofline(tmp_path / "a.svg", chart())


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot write .*no/a\.svg: No such file or directory; choose another"
    ):
        draw_roofline(tmp_path / "no" / "a.svg", chart())
