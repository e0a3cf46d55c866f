"""Throughput against sequences, length of answers, GPU memory and host memory: predicted lines, measured dots.

Dots are the steady states in result files; a dot is on a curve if it differs from the middle cell in nothing but
what the curve varies. Lines are what the planner promises with a profile's rates.

    python benchmarks/cost_curves.py --results benchmarks/results/table \
        --profile benchmarks/results/profile_h100.json --svg docs/images/cost_curves.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accuracy_tables import sequences
from make_tables import Values, read

from moe_lightning.bench.models import spec_of
from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.hardware.profile import Profile
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import MeasuredRates, Rates
from moe_lightning.units import GIB, parse_bytes

_CONTEXT = GIB * 7 // 8  # the driver's and the kernels'


@dataclass(frozen=True)
class Point:
    """A cell of the curves: bytes of both memories, tokens of an answer, sequences at most (None: all that fit).

    Host memory is that for weights and KV.
    """

    gpu: int
    host: int
    gen_len: int
    seqs: int | None = None


@dataclass(frozen=True)
class Curve:
    """What varies: how it is read and set, and the values of the line."""

    label: str
    name: str
    scale: float
    values: tuple[int, ...]

    def at(self, middle: Point, value: int) -> Point:
        """The middle cell with this value."""
        return replace(middle, **{self.name: value})


CURVES = (
    Curve("sequences at most", "seqs", 1, (250, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 4800)),
    Curve("tokens of an answer", "gen_len", 1, (16, 32, 64, 128, 256, 512)),
    Curve("GPU memory, GiB", "gpu", GIB, tuple(g * GIB for g in (12, 16, 20, 24, 32, 40, 48, 64))),
    Curve(
        "host memory for weights and KV, GiB",
        "host",
        GIB,
        tuple(g * GIB for g in (90, 96, 104, 112, 121, 160, 192)),
    ),
)


def measured(results: Iterable[Values], model: str) -> list[tuple[Point, float, int]]:
    """Steady states of a model with the default workload: where, tokens/s, sequences."""
    found = []
    for values in results:
        if "measured" not in values or Path(values["settings"]["model"]).name != model:
            continue
        work, settings = values["workload"], values["settings"]
        if tuple(work["prompt_lens"]) != WORKLOADS["mtbench"][0] or values["gpu_memory"] is None:
            continue
        free = values["limit_host_memory"]  # of which a little stays free, where nobody said how much to take
        host = settings["host_memory"] or free - max(3 * GIB, int(0.03 * free))
        point = Point(values["gpu_memory"], host, work["gen_len"], settings["max_num_seqs"])
        for m in values["measured"]:
            if m["kind"] == "steady state":
                found.append((point, m["tokens_per_s"], sequences(values)))
    return found


def dots(curve: Curve, middle: Point, found: Sequence[tuple[Point, float, int]]) -> list[tuple[float, float]]:
    """Those on a curve: (value, tokens/s)."""
    on_curve = []
    for point, rate, seqs in found:
        if curve.name == "seqs":
            if _alike(replace(point, seqs=None), middle):
                on_curve.append((float(seqs), rate))
        elif _alike(curve.at(point, getattr(middle, curve.name)), middle):
            on_curve.append((getattr(point, curve.name) / curve.scale, rate))
    return sorted(on_curve)


def _alike(point: Point, middle: Point) -> bool:
    """Host memory that is free differs a little from run to run."""
    return replace(point, host=middle.host) == middle and abs(point.host / middle.host - 1) < 0.03


def predictor(spec: ModelSpec, rates: Rates) -> Callable[[Point], tuple[int, float] | None]:
    """Sequences and tokens/s that the planner promises; None where nothing fits."""

    def predicted(point: Point) -> tuple[int, float] | None:
        memory = Memory(point.host, point.gpu - _CONTEXT)
        work = workload("mtbench", point.gen_len)
        try:
            found = search(spec, spec.dtype, memory, rates, work, max_num_seqs=point.seqs).prediction
        except NoFeasiblePolicyError:
            return None
        return found.num_seqs, found.tokens_per_s

    return predicted


def line(
    curve: Curve, middle: Point, predicted: Callable[[Point], tuple[int, float] | None]
) -> list[tuple[float, float]]:
    """The predicted curve: (value, tokens/s)."""
    found = []
    for value in curve.values:
        promised = predicted(curve.at(middle, value))
        if promised is not None:
            x = promised[0] if curve.name == "seqs" else value / curve.scale
            found.append((float(x), promised[1]))
    return sorted(set(found))


def draw(
    curves: Sequence[tuple[Curve, list[tuple[float, float]], list[tuple[float, float]]]], title: str, path: Path
) -> None:  # fmt: skip
    """A panel for each curve."""
    from matplotlib import rcParams
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "moe-lightning"  # the same drawing, the same bytes
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (curve, promised, found) in zip(figure.subplots(2, 2).flat, curves, strict=True):
        if promised:
            axes.plot(*zip(*promised, strict=True), color="#4878a8", label="predicted")
        if found:
            axes.plot(
                *zip(*found, strict=True), "o", color="#c44e52", markersize=7, label="measured", zorder=3
            )
        axes.set_xlabel(curve.label)
        axes.set_ylabel("generated tokens/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if curve.name != "gen_len" else "upper right")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--results", type=Path, action="append", required=True, help="may be repeated")
    add("--profile", type=Path, required=True)
    add("--model", default="mixtral-8x7b")
    add("--gpu-memory", type=parse_bytes, default=24 * GIB)
    add("--host-memory", type=parse_bytes, default=121 * GIB)
    add("--gen-len", type=int, default=128)
    add("--svg", type=Path, required=True)
    args = parser.parse_args()
    rates = MeasuredRates(Profile.from_json(json.loads(args.profile.read_text(encoding="utf-8"))))
    middle = Point(args.gpu_memory, args.host_memory, args.gen_len)
    results = [values for directory in args.results for values in read(directory)]
    found = measured(results, args.model)
    predicted = predictor(spec_of(args.model), rates)
    curves = [(curve, line(curve, middle, predicted), dots(curve, middle, found)) for curve in CURVES]
    title = (
        f"{args.model}, MTBench lengths\nunless varied {args.gpu_memory / GIB:g} GiB of GPU memory, "
        f"{args.host_memory / GIB:g} GiB of host memory, {args.gen_len} tokens an answer"
    )
    draw(curves, title, args.svg)
    for curve, promised, on_curve in curves:
        print(f"{curve.label}: {len(promised)} predicted, {len(on_curve)} measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
