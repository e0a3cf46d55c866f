"""Today's model beside what was measured once: recorded policies predicted again from the profiles of their runs.

    python benchmarks/model_on_record.py benchmarks/results/*
    python benchmarks/model_on_record.py --hardware h100-sxm benchmarks/results/*      # by the datasheet alone

So a change of the model is judged by all runs that there are, without a GPU. A run has the profile of its
directory, taken minutes before it or, in a directory of many cells, up to half an hour; lanes that work for less
than a twentieth of a pass are not judged.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_tables import IDLE, is_steady, memory_of

from moe_lightning.bench.models import spec_of
from moe_lightning.bench.report import LANE_TOLERANCE, RATE_TOLERANCE
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile import Profile
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.perf.outlook import Outlook, Prediction
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy

Values = dict[str, Any]


class Run(NamedTuple):
    """Tokens/s of a run: reached, promised, and as the model has them now; how far its lanes are off that.

    A steady state is steady where no pass took much longer than another; of a job nobody expects that: None.
    """

    cell: str
    title: str
    measured: float
    promised: float
    now: float
    lanes: dict[str, float]
    is_steady: bool | None

    @property
    def off(self) -> float:
        """How much more was measured than the model says, as a share."""
        return self.measured / self.now - 1


def runs(directory: Path, hardware: str | None = None) -> Iterator[Run]:
    """Of a directory with results and the profile that was taken before them; or by a preset's datasheet."""
    for path in sorted(directory.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "measured" not in values or "policy" not in values:
            continue
        found, cell = _predicted(values, directory, hardware), _cell(values)
        for m in (*values.get("unsteady", ()), *values["measured"]):
            now, lanes = found.tokens_per_s, _lanes(m, found.lane_s)
            if m["kind"] == "job":
                now, lanes = found.job_tokens_per_s, {}
            yield Run(
                cell and f"{cell}, {m['kind']}", f"{directory.name}/{path.stem}",
                m["tokens_per_s"], m["predicted_tokens_per_s"], now, lanes,
                None if m["kind"] == "job" else is_steady(m),
            )  # fmt: skip


def _predicted(values: Values, directory: Path, hardware: str | None) -> Prediction:
    """What the model says now of the policy that ran."""
    model = values["settings"]["model"]
    rates = (
        DatasheetRates(preset(hardware)) if hardware else MeasuredRates(_profile(values, directory, model))
    )
    spec = spec_of(model, values.get("num_layers"))
    policy, work = Policy(**hashable(values["policy"])), Workload(**hashable(values["workload"]))
    return Outlook(spec, spec.dtype, policy, rates, work).prediction


def _profile(values: Values, directory: Path, model: str) -> Profile:
    """The result's own; older ones have it in a file beside them, of their model or of all."""
    if values.get("profile"):
        return Profile.from_json(values["profile"])
    beside = directory / f"profile_of_{model.split('-')[0]}.json"
    return load_profile(beside if beside.exists() else directory / "profile.json")


def hashable(values: Values) -> Values:
    """JSON's lists as the tuples that policies and workloads have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _cell(values: Values) -> str:
    """Of the planner's policy; nothing for others, and where sequences, requests or host memory were fewer."""
    settings = values["settings"]
    is_plan = values.get("point", "plan").startswith("plan")
    fewer = settings["max_num_seqs"] or values["workload"]["num_requests"] or "host" in values.get("cell", "")
    if not is_plan or fewer:
        return ""
    return f"{settings['model']}, {memory_of(values)}, {values['workload']['gen_len']:3}"


def _lanes(measured: Values, predicted: dict[str, float]) -> dict[str, float]:
    use = measured["lanes"]["use"] if measured["lanes"] else {}
    return {
        lane: values["seconds"] / predicted[lane] - 1
        for lane, values in use.items()
        if values["share"] > IDLE and predicted[lane]
    }


def by_cell(found: list[Run]) -> str:
    """A row for each cell whose plans ran: how far off they were."""
    cells: dict[str, list[Run]] = {}
    for run in found:
        if run.cell:
            cells.setdefault(run.cell, []).append(run)
    rows = [
        "| model, GPU memory, answers | runs | off, median | least | most | steady runs within 10 % |",
        "| --- " * 6 + "|",
    ]
    for cell, runs in sorted(cells.items()):
        offs, steady = [run.off for run in runs], [run.off for run in runs if run.is_steady]
        rows.append(
            f"| {cell} | {len(offs)} | {statistics.median(offs):+.1%} | {min(offs):+.1%} | {max(offs):+.1%} "
            f"| {f'{_within(steady, RATE_TOLERANCE)} of {len(steady)}' if steady else ''} |"
        )
    return "\n".join(rows)


def summary(found: list[Run]) -> str:
    """How many are within tolerance, and what is usual."""
    offs, lanes = [run.off for run in found], [off for run in found for off in run.lanes.values()]
    steady = [run.off for run in found if run.is_steady]
    then = [run.measured / run.promised - 1 for run in found]
    usual = f", median {statistics.median(lanes):+.1%}" if lanes else ""
    return (
        f"{len(found)} runs: {_within(offs, RATE_TOLERANCE)} within {RATE_TOLERANCE:.0%}, median "
        f"{statistics.median(offs):+.1%}; of {len(steady)} steady states that were steady "
        f"{_within(steady, RATE_TOLERANCE)}; as promised then: {_within(then, RATE_TOLERANCE)}, "
        f"{statistics.median(then):+.1%}; {len(lanes)} lanes: {_within(lanes, LANE_TOLERANCE)} within "
        f"{LANE_TOLERANCE:.0%}{usual}"
    )


def _within(offs: list[float], tolerance: float) -> int:
    return sum(abs(off) <= tolerance for off in offs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="directories; without --hardware those with a profile"
    )
    parser.add_argument("--hardware", metavar="PRESET", help="predict by its datasheet instead of profiles")
    args = parser.parse_args()
    some = [path for path in args.results if args.hardware or (path / "profile.json").exists()]
    found = [run for path in some for run in runs(path, args.hardware)]
    if not found:
        parser.error("none of these directories has a profile.json and a run with a promise")
    for run in found:
        lanes = ", ".join(f"{lane} {off:+.0%}" for lane, off in run.lanes.items())
        print(f"{run.off:+6.1%} of {run.now:,.0f} (promised {run.promised:,.0f})  {run.title}  {lanes}")
    print("", by_cell(found), "", summary(found), sep="\n")


if __name__ == "__main__":
    main()
