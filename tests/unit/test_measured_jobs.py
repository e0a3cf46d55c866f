"""Jobs that were measured, beside what is said of them where lanes are as fast as in their steady state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lightning.bench.workloads import workload
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.models import registry
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.perf.refit import Refitted
from moe_lightning.pipeline.task import TaskKind
from moe_lightning.policy import Policy

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MIXTRAL = registry.resolve("mixtral-8x7b")
ON_GPU = [
    TaskKind.PRE_ATTENTION, TaskKind.POST_ATTENTION, TaskKind.PREFILL_ATTENTION, TaskKind.EXPERTS,
    TaskKind.SAMPLE, TaskKind.EMBED,
]  # fmt: skip
LANES = {"gpu": ON_GPU, "h2d": [TaskKind.LOAD_PAGE], "cpu": [TaskKind.ATTENTION]}


@pytest.mark.parametrize(
    ("cell", "profile"),
    [
        ("table/cell_mixtral-8x7b_gpu24gib_gen32_both_1.json", "profile_h100.json"),
        ("packed/cell_mixtral-8x7b_gpu24gib_gen32_both_0.json", "packed/profile.json"),
    ],
)
def test_a_job_takes_what_is_predicted_where_lanes_are_as_fast_as_measured(cell, profile):
    stored = json.loads((RESULTS / cell).read_text(encoding="utf-8"))
    values = stored["policy"] | {"resident_pages": tuple(stored["policy"]["resident_pages"])}
    policy, work = Policy(**values), workload("mtbench", stored["workload"]["gen_len"])
    steady, job = stored["measured"]
    rates = MeasuredRates(load_profile(RESULTS / profile))
    thought = Outlook(MIXTRAL, "bfloat16", policy, rates, work).prediction.lane_s
    factors = {
        kind: steady["lanes"]["use"][lane]["seconds"] / thought[lane]
        for lane, kinds in LANES.items()
        for kind in kinds
    }
    found = Outlook(MIXTRAL, "bfloat16", policy, Refitted(rates, factors), work).prediction
    assert found.tokens_per_s == pytest.approx(steady["tokens_per_s"], rel=0.05)
    assert found.job_tokens_per_s == pytest.approx(job["tokens_per_s"], rel=0.05)
