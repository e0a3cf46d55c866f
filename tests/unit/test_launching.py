"""The launcher's time is that of all tasks of a pass, and no pass is promised in less."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_lightning.hardware.presets import PRESETS
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.models import registry
from moe_lightning.perf import launching
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.launching import launch_seconds
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import DatasheetRates, LighterPages, MeasuredRates
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline import cgopipe
from moe_lightning.pipeline.task import PassShape
from moe_lightning.units import GIB

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    "shape",
    [
        PassShape(4, 2, 3, 2, 1, (6, 5, 6, 6), 12, preloaded=True),
        PassShape(4, 0, 1, 1, 0, (0, 0, 0, 0), 0),
        PassShape(4, 3, 4, 2**16, 4, (8, 7, 8, 8), 6, preloaded=True, part_pages=(4, 4)),
        PassShape(6, 2, 4, 2, 2, (8, 8, 8, 8, 8, 8), 16, preloaded=True, kv_every=2),
        PassShape(6, 2, 4, 2, 2, (8, 8, 0, 8, 8, 0), 16, preloaded=True, kv_every=4, cpu_every=3),
        PassShape(6, 2, 4, 2, 2, (8, 0, 8, 0, 8, 0), 8, preloaded=True, part_pages=(4, 4), cpu_every=2),
    ],
)
def test_all_tasks_of_a_pass_are_launched(shape):
    tasks = cgopipe.build(shape).tasks
    assert launch_seconds(shape) == pytest.approx(sum(launching._LAUNCH_S[task.kind] for task in tasks))


def test_a_pass_takes_no_less_than_launching_it():
    """Ten sequences of Mistral-7B: lanes are done in 42 ms, and the tasks of 32 layers are launched in 76."""
    spec, rates = registry.resolve("mistral-7b"), DatasheetRates(PRESETS["rtx-4090"])
    memory, work = Memory(64 * GIB, 23 * GIB), Workload((77,), 128)
    plan = search(spec, "bfloat16", memory, rates, work)
    few = replace(plan.policy, max_num_seqs=10, num_blocks=130, num_frames=plan.policy.num_frames)
    found = Outlook(spec, "bfloat16", few, rates, work).prediction
    assert found.bottleneck == "launcher" and found.launch_s > 1.5 * max(found.lane_s.values())
    assert found.pass_s > found.launch_s
    twice = MeasuredRates(load_profile(RESULTS / "profile_h100.json"))
    assert Outlook(spec, "bfloat16", few, twice, work).prediction.launch_s == pytest.approx(
        found.launch_s * twice.launching
    )


def test_how_fast_a_machine_launches_is_in_its_profile():
    profile = load_profile(RESULTS / "profile_h100.json")
    rates = MeasuredRates(profile)
    assert rates.launching == profile.gpu.lanes.gpu_kernel_launch_s / launching.KERNEL_S
    assert LighterPages(rates, 0.5).launching == Refitted(rates, {}).launching == rates.launching


def test_the_times_are_those_on_record():
    """The least of all passes, rounded."""
    runs = json.loads((RESULTS / "launching_h100.json").read_text())["runs"].values()
    least = {name: min(run[name][0] for run in runs) for run in runs for name in run}
    assert len(least) == 13
    for name, micros in least.items():
        assert launching._LAUNCH_S[name] == pytest.approx(micros * 1e-6, rel=0.1)
