"""Today's model beside what was measured once: recorded policies predicted again from the profiles of their runs.

    python benchmarks/model_on_record.py benchmarks/results/plans_* benchmarks/results/cells_*

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

from moe_lightning.bench.models import spec_of
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.perf.workload import Workload
from moe_lightning.policy import Policy

_IDLE = 0.05
_RATE_TOLERANCE, _LANE_TOLERANCE = 0.10, 0.15
Values = dict[str, Any]


class Run(NamedTuple):
    """Tokens/s of a run: reached, promised, and as the model has them now; how far its lanes are off that."""

    title: str
    measured: float
    promised: float
    now: float
    lanes: dict[str, float]

    @property
    def off(self) -> float:
        """How much more was measured than the model says, as a share."""
        return self.measured / self.now - 1


def runs(directory: Path) -> Iterator[Run]:
    """Of a directory with results and the profile that was taken before them."""
    for path in sorted(directory.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "measured" not in values or "policy" not in values:
            continue
        profile = directory / f"profile_of_{values['settings']['model'].split('-')[0]}.json"
        rates = MeasuredRates(load_profile(profile if profile.exists() else directory / "profile.json"))
        spec = spec_of(values["settings"]["model"], values.get("num_layers"))
        policy = Policy(**{k: tuple(v) if isinstance(v, list) else v for k, v in values["policy"].items()})
        work = Workload(**{k: tuple(v) if isinstance(v, list) else v for k, v in values["workload"].items()})
        found = Outlook(spec, spec.dtype, policy, rates, work).prediction
        for m in values["measured"]:
            if not m["predicted_tokens_per_s"]:
                continue
            is_job, title = m["kind"] == "job", values.get("cell", path.stem)
            yield Run(
                f"{directory.name}: {values['settings']['model']}, {title}, {values.get('point', m['kind'])}",
                m["tokens_per_s"], m["predicted_tokens_per_s"],
                found.job_tokens_per_s if is_job else found.tokens_per_s, {} if is_job else _lanes(m, found.lane_s),
            )  # fmt: skip


def _lanes(measured: Values, predicted: dict[str, float]) -> dict[str, float]:
    use = measured["lanes"]["use"] if measured["lanes"] else {}
    return {
        lane: values["seconds"] / predicted[lane] - 1
        for lane, values in use.items()
        if values["share"] >= _IDLE and predicted[lane]
    }


def summary(found: list[Run]) -> str:
    """How many are within tolerance, and what is usual."""
    offs, lanes = [run.off for run in found], [off for run in found for off in run.lanes.values()]
    then = [run.measured / run.promised - 1 for run in found]
    return (
        f"{len(found)} runs: {_within(offs, _RATE_TOLERANCE)} within {_RATE_TOLERANCE:.0%}, median "
        f"{statistics.median(offs):+.1%}; as promised then: {_within(then, _RATE_TOLERANCE)}, "
        f"{statistics.median(then):+.1%}; {len(lanes)} lanes: {_within(lanes, _LANE_TOLERANCE)} within "
        f"{_LANE_TOLERANCE:.0%}, median {statistics.median(lanes):+.1%}"
    )


def _within(offs: list[float], tolerance: float) -> int:
    return sum(abs(off) <= tolerance for off in offs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="directories; those without a profile are left out"
    )
    args = parser.parse_args()
    found = [run for path in args.results if (path / "profile.json").exists() for run in runs(path)]
    for run in found:
        lanes = ", ".join(f"{lane} {off:+.0%}" for lane, off in run.lanes.items())
        print(f"{run.off:+6.1%} of {run.now:,.0f} (promised {run.promised:,.0f})  {run.title}; {lanes}")
    print(summary(found))


if __name__ == "__main__":
    main()
