"""The ablation's variants run on one engine, over one load of weights, and each says what it did."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from checkpoints import tiny_policy
from moe_lightning.bench import schedules, schedules_report
from moe_lightning.bench.passes import PassRecord
from moe_lightning.bench.peaks import Peaks
from moe_lightning.bench.session import Session
from moe_lightning.bench.variants import VARIANTS, paper_plan
from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import make_plan
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import preset
from moe_lightning.memory.arena import HostArena
from moe_lightning.models import registry
from moe_lightning.perf.memory import memory_use
from moe_lightning.perf.paper_model import PaperMachine
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.workload import Workload

WORK = Workload((3, 5, 9), gen_len=12)
L4 = preset("l4")
PAGE = 3 * 64 * 96 * 4


@pytest.fixture
def session(mixtral, monkeypatch):
    """A model of three layers of eight pages, under a cap that leaves frames for thirteen pages."""
    spec = registry.resolve(str(mixtral))
    empty = tiny_policy(
        max_num_seqs=6, micro_batch_size=3, prefill_tokens=44, chunk_tokens=44, pages_per_expert=1,
        resident_pages=(0, 0, 0), num_frames=0,
    )  # fmt: skip
    gpu_memory = memory_use(spec, 4, empty).gpu_bytes + 13 * PAGE
    config = EngineConfig(
        str(mixtral), device="cpu", load_format="dummy", dtype="float32", host_memory=1240 * 2**20,
        gpu_memory=gpu_memory, executor="threads",
    )  # fmt: skip
    found = paper_plan(registry.resolve("mixtral-8x7b"), PaperMachine.of(L4), WORK)
    found = replace(found, ubs=3, n_ub=2, wg=0.3)
    monkeypatch.setattr(schedules, "paper_plan", lambda *args: found)
    return Session(config, spec, shares_memory=True)


OURS = tiny_policy(pages_per_expert=1, resident_pages=(2, 2, 2), num_frames=7)


def rows_of(session, names=tuple(VARIANTS), work=WORK, ours=OURS, **options):
    plan = make_plan(session.config, ours)
    variants = [VARIANTS[name] for name in names]
    return list(schedules.measure(session, plan, work, variants, DatasheetRates(L4), L4, **options))


def test_every_variant_runs_as_it_says(session):
    rows = rows_of(session, num_passes=3)
    assert [row.variant.name for row in rows] == list(VARIANTS)
    found = {row.variant.name: row for row in rows}
    for name, row in found.items():
        assert row.policy.schedule == row.variant.schedule
        assert len(row.passes) == 3
        assert row.tokens_per_s > 0 and row.predicted_tokens_per_s > 0
        assert bool(row.ramp_s) == row.variant.in_batches
        if row.variant.in_batches:
            assert all(p.prompt_tokens == 0 and p.generated == row.num_seqs for p in row.passes)
        else:
            assert sum(p.prompt_tokens for p in row.passes) > 0
        assert (name in ("grouped", "plain", "plan")) == (row.policy.group_size > 1)
    assert "load_kv" in found["flexgen"].lanes.seconds_by_kind
    assert "attention" not in found["flexgen"].lanes.seconds_by_kind
    assert found["continuous"].num_seqs > found["paper"].num_seqs

    values = json.loads(json.dumps(schedules_report.to_json(rows)))
    assert values[0]["ratio"] == values[0]["predicted_ratio"] == 1.0
    assert values[3]["ratio"] == pytest.approx(rows[3].tokens_per_s / rows[0].tokens_per_s)
    assert len(schedules_report.to_text(rows).splitlines()) == 2 * len(VARIANTS) + 2


def test_only_the_plan_itself_runs_on_packed_experts(session, monkeypatch):
    """The others run on those of the checkpoint, with a plan for these."""
    searched, told = [], []

    def search(spec, dtype, memory, rates, work, *, packs):
        searched.append((dtype, memory.host, packs))
        return SimpleNamespace(policy=OURS)

    def row(session, plan, variant, *_):
        passes = (PassRecord(1.0, 6, 6, 0),)
        return schedules.Row(
            variant, plan.policy, 6, 6.0, 6.0, passes, 0.0, 1.0, None, Peaks(None, None, 1, 1, 1)
        )

    monkeypatch.setattr(schedules, "search", search)
    monkeypatch.setattr(schedules, "_row", row)
    session.config = replace(session.config, dtype="bfloat16")
    names = ("grouped", "plain", "plan")
    rows = rows_of(session, names, ours=replace(OURS, packed=True), num_passes=1, show=told.append)
    assert [row.variant.name for row in rows] == list(names)
    assert [row.policy.packed for row in rows] == [False, False, True]
    assert rows[1].policy == OURS and set(searched) == {("bfloat16", session.host_memory, False)}
    assert len(searched) == 1, "once for all"
    assert [line.split()[-2] for line in told if line.split(":")[0] in names] == ["plain", "plain", "packed"]
    assert schedules_report.to_text(rows).splitlines()[3].split()[8] == "packed"


def test_a_variant_that_does_not_fit_stops_no_other(session, monkeypatch):
    find, told = schedules.policy_of, []

    def policy_of(variant, *args):
        if variant.name == "paper":
            raise NoFeasiblePolicyError("nothing fits", "Raise gpu_memory")
        return find(variant, *args)

    monkeypatch.setattr(schedules, "policy_of", policy_of)
    rows = rows_of(session, ("paper", "plan"), num_passes=1, show=told.append)
    assert [row.variant.name for row in rows] == ["plan"]
    assert any("paper: nothing fits" in line for line in told)


def test_memory_is_brought_in_once(session, monkeypatch):
    made = []
    prepare = HostArena.prepare

    def counted(self, **options):
        made.append(self.num_bytes)
        prepare(self, **options)

    monkeypatch.setattr(HostArena, "prepare", counted)
    rows_of(session, ("paper", "flexgen", "plan"), num_passes=1)
    assert len(made) == 1


def test_without_a_limit_nothing_streams_and_there_is_nothing_to_compare(mixtral):
    session = Session(EngineConfig(str(mixtral), device="cpu"), registry.resolve(str(mixtral)))
    with pytest.raises(ConfigError, match="give gpu_memory"):
        rows_of(session)
