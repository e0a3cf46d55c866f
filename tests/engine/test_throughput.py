"""What `bench throughput` measures is what the engine did."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from math import ceil

import pytest

import profiles
from checkpoints import tiny_policy
from moe_lightning.bench import machine, report, throughput
from moe_lightning.bench import session as sessions
from moe_lightning.bench.cell import Effort, turnover
from moe_lightning.bench.passes import PassRecord, Source, begin_midway, run_passes
from moe_lightning.bench.peaks import Peaks
from moe_lightning.bench.session import Session
from moe_lightning.bench.workloads import WORKLOADS, sequences, workload
from moe_lightning.config import EngineConfig
from moe_lightning.engine.plan import make_plan
from moe_lightning.errors import ConfigError
from moe_lightning.hardware.profile import Profile
from moe_lightning.models import registry
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.perf.workload import Workload

WORK = Workload((3, 5, 9), gen_len=6)
POLICY = {"max_num_seqs": 6, "num_blocks": 64, "block_size": 4}


@pytest.fixture
def session(mixtral):
    """Plans are the tiny policy, whatever the workload, with a prediction that is wrong."""
    config = EngineConfig(str(mixtral), device="cpu")
    session = Session(config, registry.resolve(str(mixtral)))
    promised = Prediction(1.0, {"gpu": 0.5, "h2d": 1.0}, 6, 3, 6.0, 5.0, None)
    plan = replace(make_plan(config, tiny_policy(**POLICY)), max_model_len=64, prediction=promised)
    session.plan = lambda work, config=None: plan
    return session


@pytest.fixture
def engine(session):
    return session.load(session.plan(WORK)).engine()


def test_a_job_answers_every_request_in_full(engine):
    source = Source(WORK, 320)
    passes = list(run_passes(engine, iter(source), source, 12, count=10))
    assert sum(p.generated for p in passes) == 10 * 6
    lengths = [len(p) for seed in range(4) for p, _ in sequences(WORK, 3, 320, seed)]
    assert sum(p.prompt_tokens for p in passes) == sum(lengths[:10])
    assert engine.num_unfinished == 0


def test_answers_of_a_job_have_the_lengths_of_their_prompts(engine):
    source = Source(Workload.of([(3, 2), (5, 6), (9, 4)]), 320, scored=range(6))
    list(run_passes(engine, iter(source), source, 12, count=6))
    found = {len(o.prompt_token_ids): len(o.outputs[0].token_ids) for o in source.outputs.values()}
    assert found == {3: 2, 5: 6, 9: 4}


def test_a_steady_state_begins_with_all_ages_and_stays_full(engine):
    source = Source(WORK, 320)
    assert begin_midway(engine, source, 6) == 6
    assert [len(s.output_ids) for s in engine._batcher.running] == [0, 1, 2, 3, 4, 5]
    passes = list(run_passes(engine, iter(source), source, 12, num_passes=18))
    assert len(passes) == 18
    # One ends in each pass and another takes its place; a prompt's pass gives its first token.
    assert all(p.generated == 6 for p in passes[1:])
    assert engine.num_preemptions == 0


def test_a_steady_state_begins_with_more_of_the_long_answers_and_at_all_ages(engine):
    source = Source(Workload.of([(3, 1), (5, 9)]), 320)
    assert begin_midway(engine, source, 6) == 6
    running = engine._batcher.running
    assert sorted(s.max_new_tokens for s in running)[1:] == [9] * 5, "nine tokens in ten are of those"
    assert [len(s.output_ids) for s in running] == [n * s.max_new_tokens // 6 for n, s in enumerate(running)]


def test_a_batch_begins_with_one_age(engine):
    begin_midway(engine, Source(WORK, 320), 6, same_age=True)
    assert [len(s.output_ids) for s in engine._batcher.running] == [3] * 6


def measured(session, **effort):
    effort = Effort(**{"copy_s": 0.001, **effort})
    return throughput.measure(session.config, WORK, effort, session)


def test_one_command_measures_steady_state_and_job_and_checks_answers_of_both(session):
    cell = measured(session, steady_passes=5, num_checked=2)
    steady, job = cell.measured
    assert (steady.kind, job.kind) == ("steady state", "job")
    assert len(steady.passes) == 5 and sum(p.generated for p in job.passes) == 12 * 6
    assert all(m.check.is_equal and len(m.check.checks) == 2 for m in cell.measured)
    assert cell.agreement == turnover(job.passes, WORK.gen_len) / steady.tokens_per_s
    assert (steady.predicted_tokens_per_s, job.predicted_tokens_per_s) == (6.0, 5.0)
    values = json.loads(json.dumps(report.to_json(cell, session.config)))
    assert [m["kind"] for m in values["measured"]] == ["steady state", "job"]
    assert values["measured"][0]["lanes"]["use"]["h2d"]["predicted_s"] == 1.0
    assert values["measured"][0]["lanes"]["num_passes"] == 3
    first = values["measured"][0]
    for name, rate in (
        ("share_of_plain_copy", "page_bytes_per_s"),
        ("link_share_of_plain_copy", "link_bytes_per_s"),
    ):
        assert first[name] == first["lanes"][rate] / cell.plain_copy
    assert values["memory"]["gpu"] is None and values["memory"]["host"] > 0
    assert set(values["measured"][0]["lanes"]["seconds_by_kind"]) >= {"experts", "attention", "load_page"}


def test_a_result_has_the_profile_that_it_was_planned_with_and_each_lanes_share_of_its_roof(session):
    plan = replace(session.plan(WORK), rates=MeasuredRates(profiles.PROFILE))
    session.plan = lambda work, config=None: plan
    cell = measured(session, steady_passes=5, is_job=False)
    values = json.loads(json.dumps(report.to_json(cell, session.config)))
    assert Profile.from_json(values["profile"]) == profiles.PROFILE
    use = cell.measured[0].lanes.use
    assert values["measured"][0]["lanes"]["use"]["h2d"]["roof_s"] == use["h2d"].roof_s > 0
    (line,) = (line for line in report.to_text(cell).splitlines() if line.startswith("  H2D"))
    assert line.split()[2] == f"{use['h2d'].roof_s / use['h2d'].seconds:.0%}"


def test_host_memory_that_reads_slower_than_in_the_profile_is_said(session, monkeypatch):
    assert measured(session).plain_read is None, "so little memory is in a cache"
    monkeypatch.setattr(throughput, "READ_BYTES", 1024)
    plan = replace(session.plan(WORK), rates=MeasuredRates(profiles.PROFILE))
    session.plan = lambda work, config=None: plan
    cell = measured(session)
    values = report.to_json(cell, session.config)
    assert values["plain_read_bytes_per_s"] == cell.plain_read > 0
    share = cell.plain_read / profiles.PROFILE.host.read
    assert values["measured"][0]["like_profile"] == cell.like_profile == share
    for share, ends in ((0.90, "45.0, 90% of the profile's"), (0.89, "44.5, 89% of the profile's, SLOWER")):
        host = replace(profiles.PROFILE.host, read=50e9)
        rates = MeasuredRates(replace(profiles.PROFILE, host=host))
        like = replace(cell, plan=replace(plan, rates=rates), plain_read=share * 50e9)
        assert report.to_text(like).endswith(f"plain reads {ends}")
    no_kv = replace(cell, plain_read=None)
    assert no_kv.like_profile is None and "plain reads" not in report.to_text(no_kv)
    assert replace(cell, plan=replace(plan, rates=None)).like_profile is None


def test_passes_are_recorded_all_over_the_time_in_which_others_are_measured(session, monkeypatch):
    ran, run = [], throughput.run_passes

    def noted(engine, *args, **more):
        passes = list(run(engine, *args, **more))
        ran.extend([False] * (len(passes) - 1) + [engine._worker.recorded is not None])
        return passes

    monkeypatch.setattr(throughput, "run_passes", noted)
    steady, _ = measured(session, steady_passes=6).measured
    assert len(steady.passes) == 6 and steady.lanes.num_passes == 3
    assert "".join("r" if was else "." for was in ran[4:13]) == "..r..r..r"


def test_where_more_may_run_than_fill_memory_a_steady_state_is_of_those_that_do(session):
    """Three at their mean length; the six that may run do so while they are short."""
    plan = session.plan(WORK)
    policy = replace(plan.policy, num_blocks=ceil(3 * WORK.mean_blocks(plan.policy.block_size)))
    session.plan = lambda work, config=None: replace(plan, policy=policy)
    steady, job = measured(session, steady_passes=5).measured
    assert steady.num_seqs == job.num_seqs == 3
    assert sum(p.generated for p in job.passes) == 2 * 3 * 6


def test_of_a_job_counts_the_time_in_which_full_memory_changes_hands_once(session):
    """From the first pass with all but 3 % of the most sequences, as many passes as an answer has tokens."""
    passes = [PassRecord(s, n, n, 0) for s, n in ((9, 90), (2, 98), (1, 100), (1, 50), (4, 10), (9, 9))]
    assert turnover(passes, 4) == (98 + 100 + 50 + 10) / 8
    cell = measured(session, steady_passes=5)
    fixed = replace(cell.workload, num_requests=12)
    assert replace(cell, workload=fixed).agreement is None, "they may not fill memory, or not twice"


def test_a_wrong_engine_fails_the_check(session, monkeypatch):
    load = session.load

    def load_damaged(plan, gpu_memory=None):
        loaded = load(plan)
        attend = loaded.worker._cpu_kernels.attend
        monkeypatch.setattr(
            loaded.worker._cpu_kernels, "attend",
            lambda out, *args, **kwargs: (attend(out, *args, **kwargs), out.neg_()),
        )  # fmt: skip
        return loaded

    session.load = load_damaged
    cell = measured(session, num_checked=2)
    assert not cell.measured[0].check.is_equal
    assert "NOT EQUAL" in report.to_text(cell)


def test_what_is_off_is_flagged(session):
    cell = measured(session)
    text = report.to_text(cell)
    assert "predicted 5 tokens/s (+" in text and "OFF" in text
    peaks = Peaks(gpu=3 * 2**30, gpu_allowed=2 * 2**30, host=2**30, host_before=0, host_planned=0)
    text = report.to_text(replace(cell, peaks=peaks))
    assert "GPU memory 3.00 GiB of 2.00 allowed OVER" in text
    assert "0.00 planned OVER" in text
    assert not peaks.is_gpu_within and not peaks.is_host_within


def test_what_the_host_gave_to_others_is_counted_by_passes_and_said(session, monkeypatch):
    taken = itertools.count()
    monkeypatch.setattr("moe_lightning.bench.passes.stolen_seconds", lambda: 2.5 * next(taken))
    cell = measured(session)
    assert {p.stolen for p in cell.measured[0].passes} == {2.5}

    def told(share):
        """Of two passes of five seconds on eight processors."""
        passes = [PassRecord(5.0, 6, 6, 0, stolen=80 * share / 2)] * 2
        return report.to_text(replace(cell, measured=(replace(cell.measured[0], passes=tuple(passes)),)))

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "the host of this virtual machine gave 0.6% of its CPU time to others" in told(0.006)
    assert "gave" not in told(0.004)


def test_stolen_time_is_the_eighth_of_all_processors(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  11 12 13 14 15 16 17 800 19 20\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    monkeypatch.setattr(machine, "_STAT", stat)
    assert machine.stolen_seconds() == 800 / os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu  11 12 13 14\ncpu0 1 2 3 4\n")
    assert machine.stolen_seconds() == 0, "of a system that counts fewer times"
    monkeypatch.setattr(machine, "_STAT", tmp_path / "none")
    assert machine.stolen_seconds() == 0


def test_a_workload_that_does_not_fit_is_refused(session):
    work = Workload((60,), gen_len=6)
    with pytest.raises(ConfigError, match="sequences of 66 tokens, and max_model_len=64"):
        throughput.measure(session.config, work, Effort(), session)


def test_engines_that_share_memory_stream_other_shares_and_stay_right(mixtral):
    """Dummy weights of one engine are taken over by the next, and each computes with what is there."""
    config = EngineConfig(
        str(mixtral), device="cpu", load_format="dummy", host_memory=514 * 2**20, dtype="float32"
    )
    session = Session(config, registry.resolve(str(mixtral)), shares_memory=True)
    addresses = set()
    for resident, kv_every in (((1, 0, 2), 0), ((10, 6, 16), 2), ((4, 0, 2), 1), ((0, 0, 0), 0)):
        policy = tiny_policy(**{**POLICY, "resident_pages": resident, "kv_every": kv_every})
        plan = make_plan(config, policy)
        session.plan = lambda work, config=None, plan=plan: plan
        assert measured(session, num_checked=3).measured[0].check.is_equal
        addresses.add(session._shared.arena.tensor.data_ptr())
        session.unload()
    assert len(addresses) == 1


def test_experts_on_the_cpu_are_in_memory_that_no_other_engine_shares(mixtral):
    config = EngineConfig(
        str(mixtral), device="cpu", load_format="dummy", host_memory=514 * 2**20, dtype="float32"
    )
    session = Session(config, registry.resolve(str(mixtral)), shares_memory=True)
    for cpu_every in (0, 2, 1, 0):
        resident = tuple(0 if cpu_every and (layer + 1) % cpu_every == 0 else 1 for layer in range(3))
        policy = tiny_policy(**{**POLICY, "resident_pages": resident, "cpu_every": cpu_every})
        plan = make_plan(config, policy)
        session.plan = lambda work, config=None, plan=plan: plan
        assert measured(session, num_checked=3).measured[0].check.is_equal
        assert (session._shared is None) == (cpu_every > 0)
        session.unload()


def test_what_checks_leave_in_memory_is_no_later_engines(mixtral, monkeypatch):
    config = EngineConfig(str(mixtral), device="cpu", load_format="dummy", host_memory=514 * 2**20)
    session = Session(config, registry.resolve(str(mixtral)), shares_memory=True)
    plan = replace(make_plan(config, tiny_policy(**POLICY)), max_model_len=64)
    session.plan = lambda work, config=None: plan
    # Not the process's own: what earlier tests left is freed at any time.
    resident = [1_000]
    monkeypatch.setattr(sessions, "resident_bytes", lambda: resident[-1])
    changes = [+300, -200, +50]

    def check(loaded, source, effort):
        resident.append(resident[-1] + changes.pop(0))
        if effort.num_checked > 1:
            raise RuntimeError

    monkeypatch.setattr(throughput, "_check", check)
    assert measured(session).peaks.host_before == 1_000
    assert session.watch().host_before == 1_300
    assert measured(session).peaks.host_before == 1_300, "what it freed, no engine had"
    with pytest.raises(RuntimeError):
        measured(session, num_checked=2)
    assert session.watch().host_before == 1_350, "also where a check fails"


def test_workloads_have_the_lengths_that_they_are_known_for():
    mean = {name: workload(name).mean_prompt for name in WORKLOADS}
    assert mean["mtbench"] == pytest.approx(76.1, abs=0.05)
    assert max(workload("mtbench").prompt_lens) == 418
    assert mean["synthetic-reasoning"] == pytest.approx(242, abs=1)
    assert mean["summarization"] == pytest.approx(1693, abs=5)
    assert max(workload("summarization").prompt_lens) == 1984
    assert mean["random"] == pytest.approx(512, abs=5)
    assert {name: workload(name).gen_len for name in WORKLOADS} == {
        "mtbench": 128, "synthetic-reasoning": 50, "summarization": 64, "random": 128,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no workload is named 'mt'; choose one of mtbench"):
        workload("mt")


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_the_lengths_of_their_workload(name):
    work = workload(name)
    found = [len(p) for p, _ in sequences(work, 2 * len(work.prompt_lens), 100)]
    assert sorted(found) == sorted(work.prompt_lens * 2)


def test_prompts_go_through_all_lengths_before_one_comes_again():
    found = [prompt for prompt, _ in sequences(WORK, 7, 100)]
    assert sorted(len(p) for p in found[:3]) == sorted(len(p) for p in found[3:6]) == [3, 5, 9]
    assert all(3 <= token < 100 for token in itertools.chain(*found))
