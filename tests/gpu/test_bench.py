"""What `bench` measures on a GPU: engines that share host memory, each under its cap and right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shapes import write_config

from moe_lightning.bench import schedules, throughput
from moe_lightning.bench.cell import Effort
from moe_lightning.bench.session import Session
from moe_lightning.bench.variants import VARIANTS
from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import machine_of, measured_rates
from moe_lightning.models import registry
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]
WORK = Workload((20, 40, 90, 200), gen_len=24, num_requests=600)
NUM_LAYERS = 6


@pytest.fixture
def session(tmp_path):
    model = str(write_config(tmp_path, NUM_LAYERS))
    config = EngineConfig(model, load_format="dummy", host_memory=22 * GIB, gpu_memory=9 * GIB)
    return Session(config, registry.resolve(model), shares_memory=True)


def test_cells_of_other_sizes_follow_each_other_each_within_its_cap_and_right(session):
    effort = Effort(steady_passes=4, num_checked=2, copy_s=0.2)
    for gib in (8, 11, 7):
        config = replace(session.config, gpu_memory=gib * GIB)
        cell = throughput.measure(config, WORK, effort, session)
        assert cell.peaks.gpu <= gib * GIB
        assert cell.peaks.is_host_within
        assert sum(cell.plan.policy.resident_pages) < NUM_LAYERS * 8 * cell.plan.policy.pages_per_expert
        for measured in cell.measured:
            assert measured.check.is_equal, measured.check.all
            assert measured.lanes.page_bytes_per_s > 0
        session.unload()
        assert torch.cuda.memory_reserved() < GIB


def test_every_variant_runs(session):
    plan = session.plan(WORK)
    rates, machine = measured_rates(plan.device, plan.dtype), machine_of(plan.device)
    variants = list(VARIANTS.values())
    rows = list(schedules.measure(session, plan, WORK, variants, rates, machine, num_passes=2))
    assert [row.variant.name for row in rows] == list(VARIANTS)
    found = {row.variant.name: row for row in rows}
    assert "gpu_attention" in found["flexgen"].lanes.seconds_by_kind
