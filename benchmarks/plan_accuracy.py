"""Whether plans keep their promises, from one model in memory: plans, their neighbours, the ablation.

Steady tokens/s of the planned policy in some cells, of eight policies and more beside the plan of the first cell,
and of the ablation's variants there, each beside its prediction. Points are written as soon as they are there and
not measured again, so the same command goes on where it stopped; without a GPU, `--report` prints what is there.
Where passes of a steady state differ by more than a quarter, or host memory is a tenth slower after them than in
the profile, something slowed the machine down: such a point is measured once more at once, and what it was before
is kept.

    moe-lightning profile && \
    python benchmarks/plan_accuracy.py --out benchmarks/results/accuracy --time-limit 560
    python benchmarks/plan_accuracy.py --out benchmarks/results/accuracy --part variants --time-limit 560
    python benchmarks/plan_accuracy.py --out benchmarks/results/accuracy --report
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accuracy_tables import Values, accuracy, beside, is_like_profile, is_steady, verdicts
from make_tables import read, schedules
from points import Asked, Point

from moe_lightning.bench.cell import Effort
from moe_lightning.bench.machine import facts, seconds_since_start
from moe_lightning.bench.report import to_json
from moe_lightning.bench.schedules import measure as measure_variants
from moe_lightning.bench.schedules_report import to_json as rows_to_json
from moe_lightning.bench.throughput import measure_plan
from moe_lightning.bench.variants import VARIANTS
from moe_lightning.engine.plan import Plan, machine_of
from moe_lightning.errors import MoELightningError
from moe_lightning.units import parse_bytes

CELLS = ("24GiB,128,steady", "24GiB,32,steady", "16GiB,128,steady", "16GiB,32,steady")
PARTS = ("plans", "neighbours", "variants")
_LOAD_S, _NEXT_LOAD_S, _VARIANT_S = 90.0, 20.0, 75.0  # guesses, for what fits into the time that is left
_SLOWER, _OTHER_PASSES = 1.25, 7
_TRIES = 2  # of a point, where something slowed the first one down


class Run:
    """Measures in one session until time is up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.asked = args, Asked(args)
        self.session = self.asked.session
        self.is_first, self.failures = True, 0

    def measure_points(self) -> None:
        """Those that are not there yet, as far as time goes."""
        for point in self.asked.points():
            if point.path(self.args).exists():
                continue
            tries = list[Values]()
            while len(tries) < _TRIES and not (tries and _is_undisturbed(tries[-1])):
                plan = self.asked.plan_of(point.cell, point.policy)
                assert plan.prediction is not None
                passes = self.args.steady_passes + _OTHER_PASSES
                if not self._has_time(
                    _SLOWER * plan.prediction.pass_s * passes, f"{point.cell}: {point.name}"
                ):
                    return
                try:
                    tries.append(self._measure(point, plan, tries))
                except MoELightningError as error:
                    print(f"{point.cell}, {point.name}: {error}", file=sys.stderr, flush=True)
                    self.failures += 1
                    break
                finally:
                    self.session.unload()

    def _measure(self, point: Point, plan: Plan, tries: list[Values]) -> Values:
        """What was measured; it is written with the tries before it."""
        effort = Effort(self.args.steady_passes, is_job=False, copy_s=0.2)
        assert plan.workload is not None
        setting = self.asked.setting(point.cell)
        began_s = time.time()
        cell = measure_plan(plan, setting, plan.workload, effort, self.session)
        values = to_json(cell, setting) | {
            "point": point.name, "cell": str(point.cell), "name": Path(self.args.model).name,
            "rates": type(self.asked.rates).__name__, "unsteady": tries, "began_s": began_s,
        }  # fmt: skip
        _write(point.path(self.args), values)
        found = cell.measured[0]
        print(
            f"{point.cell}, {point.name}: {found.tokens_per_s:,.1f} tokens/s, predicted "
            f"{found.predicted_tokens_per_s:,.1f}",
            flush=True,
        )
        measured: Values = values["measured"][0]
        return measured

    def measure_variants(self) -> None:
        """The ablation in the first cell; ratios are those to its first variant."""
        path, first = self.args.out / "schedules.json", self.asked.cells[0]
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        work, plan = first.work, None
        for variant in VARIANTS.values():
            if any(row["name"] == variant.name for row in rows):
                continue
            # Pages of another size: host memory is brought in once more.
            if not self._has_time(_VARIANT_S + variant.packs * _LOAD_S, variant.name):
                return
            plan = plan or self.asked.plan_of(first, self.asked.planned(first)[1].policy)
            machine = machine_of(self.asked.device)
            found = list(
                measure_variants(self.session, plan, work, [variant], self.asked.rates, machine, show=_say)
            )
            self.failures += not found
            rows += rows_to_json(found) if found else []
            for row in rows:
                row["ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
                row["predicted_ratio"] = row["predicted_tokens_per_s"] / rows[0]["predicted_tokens_per_s"]
            setting = asdict(self.asked.setting(first))
            _write(path, facts() | {"settings": setting, "workload": asdict(work), "rows": rows})

    def _has_time(self, seconds: float, what: str) -> bool:
        needed = seconds + (_LOAD_S if self.is_first else _NEXT_LOAD_S)
        left = self.args.time_limit - seconds_since_start()
        if needed > left:
            print(f"{what}: {needed:.0f} s needed and {left:.0f} s left; run the command again", flush=True)
            return False
        self.is_first = False
        return True


def _is_undisturbed(found: Values) -> bool:
    return is_steady(found) and is_like_profile(found)


def _say(line: str) -> None:
    if not line.startswith("pass "):
        print(line, flush=True)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a file that is there is whole
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.rename(path)


def report(out: Path, tolerance: float) -> bool:
    """Print what is there; whether all is as it should be."""
    results = read(out)
    lines, is_good = verdicts(results, tolerance)
    print("\n\n".join(("", accuracy(results), beside(results), schedules(results), "\n".join(lines))))
    return is_good


def main() -> int:
    args = _arguments()
    failures = 0
    if not args.report:
        run = Run(args)
        if {"plans", "neighbours"} & set(args.part):
            run.measure_points()
        if "variants" in args.part:
            run.measure_variants()
        failures = run.failures
    return 0 if report(args.out, args.tolerance) and not failures else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of results")
    add("--model", default="mixtral-8x7b", help="a known name or a config (default: %(default)s)")
    add("--num-layers", type=int)
    add("--cell", action="append", metavar="GPU,GEN,steady[,...]", help=f"default: {' '.join(CELLS)}")
    add("--part", action="append", choices=PARTS, help="may be repeated (default: all)")
    add("--steady-passes", type=int, default=10)
    add(
        "--tolerance",
        type=float,
        default=0.03,
        help="a neighbour may be faster by that (default: %(default)s)",
    )
    add("--time-limit", type=float, default=560.0, help="seconds of the whole process (default: %(default)s)")
    add("--profile", type=Path, help="instead of what was measured here")
    add("--host-memory", type=parse_bytes)
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--executor", default="auto")
    add("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    args.part, args.cell = args.part or PARTS, args.cell or CELLS
    return args


if __name__ == "__main__":
    sys.exit(main())
