"""The plan fits, uses what it may, and is no worse for better hardware."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.bench.workloads import workload
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import PRESETS
from moe_lightning.hardware.profile_cache import load_profile
from moe_lightning.models import registry
from moe_lightning.models.spec import AttentionSpec, ExpertsSpec, RouterSpec
from moe_lightning.perf import attending
from moe_lightning.perf.alternatives import alternatives
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.limit import hardware_limit
from moe_lightning.perf.memory import memory_use
from moe_lightning.perf.outlook import Outlook
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.predict import pass_work
from moe_lightning.perf.rates import DatasheetRates, LighterPages, MeasuredRates
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.sizing import ROOM, Choice, largest_policy, sized
from moe_lightning.perf.trials import Planned, Trials
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.pipeline import cgopipe
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.shape import check_ring, layers_on_cpu
from moe_lightning.pipeline.task import Lane, PassShape, Task, TaskKind
from moe_lightning.policy import Policy
from moe_lightning.units import GIB

MIXTRAL = registry.resolve("mixtral-8x7b")
H100 = PRESETS["h100-sxm"]
WORK = Workload((20, 30, 40, 214), gen_len=32)
MTBENCH = workload("mtbench", 128)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PROFILE = RESULTS / "profile_h100.json"


@cache
def planned(gpu=24, host=120, **changes):
    """The plan for Mixtral on an H100 with less memory, searched for once."""
    return search(
        MIXTRAL,
        "bfloat16",
        Memory(int(host * GIB), int(gpu * GIB)),
        DatasheetRates(H100),
        replace(WORK, **changes),
    )


@pytest.mark.parametrize("gpu", [10, 24])
@pytest.mark.parametrize("host", [96, 120])
def test_the_plan_fits_both_memories_and_leaves_little_of_them(gpu, host):
    policy = planned(gpu, host).policy
    use = memory_use(MIXTRAL, 2, policy)
    assert 0.99 * gpu * GIB < use.gpu_bytes <= gpu * GIB
    assert 0.99 * host * GIB < use.host_bytes <= host * GIB
    check_ring(policy, num_experts=8)


@pytest.mark.parametrize("gpu", [10, 24])
def test_as_many_sequences_as_fill_memory_at_their_mean_length_decode_and_a_quarter_more_may_run(gpu):
    plan = planned(gpu, 120)
    policy, n = plan.policy, plan.prediction.num_seqs
    assert n * WORK.mean_blocks(16) <= policy.num_blocks < (n + 1) * WORK.mean_blocks(16)
    assert policy.max_num_seqs == pytest.approx(ROOM * n, rel=0.005)
    fewer = Outlook(
        MIXTRAL, "bfloat16", replace(policy, max_num_seqs=n), DatasheetRates(H100), WORK
    ).prediction
    job_rate = plan.prediction.job_tokens_per_s
    same = replace(fewer, job_tokens_per_s=job_rate)
    assert same == plan.prediction, "what may run while all are short is no part of a steady pass"
    assert fewer.job_tokens_per_s < 1.02 * job_rate, "and makes a job shorter, or hardly longer"


def test_where_a_limit_and_not_memory_binds_as_many_decode_as_may_run():
    plan = planned(num_requests=40)
    assert plan.policy.max_num_seqs == plan.prediction.num_seqs == 40
    blocks = 10 * WORK.mean_blocks(16)
    for policy, n in (
        (replace(plan.policy, num_blocks=ceil(blocks)), 10),
        (replace(plan.policy, num_blocks=1), 1),
    ):
        assert num_decoding(policy, WORK) == n


@pytest.mark.parametrize(("gpu", "host"), [(24, 120), (16, 120), (24, 96)])
def test_parts_are_planned_with_the_first_at_once_which_is_no_slower(gpu, host):
    plan = planned(gpu, host)
    policy = plan.policy
    assert policy.first_part_at_once == (policy.expert_parts > 1)
    late = Outlook(MIXTRAL, "bfloat16", replace(policy, first_part_at_once=False), DatasheetRates(H100), WORK)
    assert late.prediction.pass_s >= plan.prediction.pass_s
    if policy.expert_parts > 1 and not policy.group_size > policy.max_num_seqs // policy.micro_batch_size:
        assert late.prediction.pass_s > 1.005 * plan.prediction.pass_s, (
            "so passes are built as the policy says"
        )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tasks_of_a_pass_that_are_asked_for_once_take_what_each_of_them_does(data):
    """Micro-batches of one size are taken for alike but where one's sweep unpacks pages for the others."""
    few = st.sampled_from
    policy = Policy(
        200, data.draw(few([10, 16, 50])), data.draw(few([1, 2, 2**16])), 4, 4096, 256, 7,
        (data.draw(st.integers(0, 20)),) * 32, 60, 1000, expert_parts=data.draw(few([1, 2, 3])),
        first_part_at_once=data.draw(st.booleans()), packed=data.draw(st.booleans()),
    )  # fmt: skip
    decode, prompts = data.draw(few([0, 50, 64, 100])), data.draw(few([256, 512, 700]))
    passes = Passes(MIXTRAL, "bfloat16", policy, DatasheetRates(PRESETS["l4"]), 300.0, 200.0)
    kind, lanes = passes._kind(decode, prompts), Counter[Lane]()
    seconds = passes.rates.seconds(kind.work)
    for task in cgopipe.launched(kind.shape).tasks():
        assert kind.seconds(task) == seconds(task), task
        if task.kind not in (TaskKind.EMBED, TaskKind.SAMPLE):
            lanes[task.lane] += seconds(task)
    for lane, busy in passes.lane_seconds(decode, prompts).items():
        if lane is not Lane.H2D:
            assert busy == pytest.approx(lanes[lane]), lane


@pytest.mark.parametrize(("gpu", "more"), [(12, 22), (11, 22)])
def test_where_the_gpu_is_the_bound_no_more_run_than_there_is_memory_for_to_their_end(gpu, more):
    """Others would be put back and computed anew, by whom nobody has to spare: with more memory, more of them."""
    work, rates = Workload((30,), 64), DatasheetRates(PRESETS["rtx-3090"])
    plans = [search(MIXTRAL, "bfloat16", Memory(192 * GIB, each * GIB), rates, work) for each in (gpu, more)]
    assert all(plan.prediction.bottleneck == "gpu" for plan in plans)
    assert plans[1].tokens_per_s >= plans[0].tokens_per_s
    policy = plans[1].policy
    assert policy.max_num_seqs * -(-work.longest // 16) <= policy.num_blocks


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_no_other_schedule_is_predicted_faster_than_the_plan(schedule):
    plan = planned()
    # Those that sweep whole layers need a ring for one, with what room it takes.
    whole = search(
        MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), DatasheetRates(H100), WORK, near=plan
    ).policy
    pages = 8 * whole.pages_per_expert
    frames = sum(whole.resident_pages) + whole.num_frames
    resident = next(r for r in range(pages, -1, -1) if 32 * r + pages - r <= frames)
    policy = replace(
        whole, schedule=schedule, expert_parts=1, resident_pages=(resident,) * 32, num_frames=pages - resident
    )
    found = Outlook(MIXTRAL, "bfloat16", policy, DatasheetRates(H100), WORK).prediction
    assert found.job_tokens_per_s <= plan.tokens_per_s
    if schedule in ("flexgen", "no_overlap"):
        assert found.pass_s > 1.2 * plan.prediction.pass_s, "the test could not fail otherwise"


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 2}, {"look_ahead": 1}, {"look_ahead": 8}, {"micro_batch_size": 64},
        {"micro_batch_size": 512}, {"chunk_tokens": 512},
    ],
    ids=str,
)  # fmt: skip
def test_no_policy_that_differs_in_one_value_is_predicted_much_faster(change):
    plan = planned()
    found = Outlook(
        MIXTRAL, "bfloat16", replace(plan.policy, **change), DatasheetRates(H100), WORK
    ).prediction
    assert found.job_tokens_per_s <= 1.005 * plan.tokens_per_s


def test_a_plan_gives_a_little_of_its_speed_for_a_ring_that_bridges_slower_attention(monkeypatch):
    given = (MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), MeasuredRates(load_profile(PROFILE)), MTBENCH)
    plan = search(*given, packs=False)
    monkeypatch.setattr("moe_lightning.perf.planner.with_slack", lambda problem, plan, rates: plan)
    fastest = search(*given, packs=False)
    assert plan.choice == replace(fastest.choice, ring=plan.choice.ring)
    assert plan.choice.ring > fastest.choice.ring
    assert 0.985 * fastest.tokens_per_s <= plan.tokens_per_s <= fastest.tokens_per_s
    slower = Refitted(given[3], {TaskKind.ATTENTION: 1.35, TaskKind.EXPERTS: 1.2})
    slow, slowest = (
        Outlook(*given[:2], p.policy, slower, MTBENCH).prediction.tokens_per_s for p in (plan, fastest)
    )
    assert slow > 1.02 * slowest
    assert plan.runners_up, "those that are faster and have less slack are none, but others are"
    assert all(other.tokens_per_s < plan.tokens_per_s for other in plan.runners_up)


def test_runners_up_fit_too_and_each_is_slower_than_the_one_before():
    plan = planned()
    speeds = [p.tokens_per_s for p in (plan, *plan.runners_up)]
    assert len(speeds) > 2 and all(b < a for a, b in pairwise(speeds))
    for other in plan.runners_up:
        assert other.choice != plan.choice
        use = memory_use(MIXTRAL, 2, other.policy)
        assert use.gpu_bytes <= 24 * GIB and use.host_bytes <= 120 * GIB


def test_estimates_and_bounds_are_about_what_is_simulated():
    plan, rates = planned(), DatasheetRates(H100)
    for found in (plan, *plan.runners_up):
        given = (MIXTRAL, "bfloat16", found.policy, rates, WORK)
        assert Outlook(*given).estimate == pytest.approx(found.tokens_per_s, rel=0.05)
        assert Outlook(*given).at_best > 0.99 * found.tokens_per_s


def test_the_search_for_a_large_model_simulates_few_tasks(monkeypatch):
    """Seconds are not measured here: some 10 us a task make the 5 s that a plan may take."""
    spec = replace(
        MIXTRAL,
        num_layers=94,
        attention=AttentionSpec(64, 4, 128),
        experts=ExpertsSpec(128, 1536, RouterSpec(8)),
    )
    count, launched = 0, cgopipe.launched

    def counting(shape):
        nonlocal count
        builder = launched(shape)
        count += len(builder.tasks())
        return builder

    monkeypatch.setattr(cgopipe, "launched", counting)
    search(spec, "bfloat16", Memory(520 * GIB, 24 * GIB), DatasheetRates(H100), Workload((77,), 128))
    assert 10_000 < count < 450_000


def test_host_memory_beyond_what_prompts_can_fill_makes_no_plan_slower():
    spec = replace(
        MIXTRAL, num_layers=8, hidden_size=2048, attention=AttentionSpec(16, 2, 128),
        experts=ExpertsSpec(64, 1408, RouterSpec(6)),
    )  # fmt: skip
    rates, work = DatasheetRates(H100), Workload((77,), 8)
    some, more = (search(spec, "bfloat16", Memory(host * GIB, 8 * GIB), rates, work) for host in (30, 80))
    assert more.tokens_per_s >= 0.999 * some.tokens_per_s
    assert more.policy.max_num_seqs * 77 <= 2**16 * 8


def test_kv_memory_is_made_for_as_many_as_make_passes_fast_and_no_more_than_a_quarter_more_may_run():
    spec = registry.resolve("smollm2-135m")
    memory, work = Memory(512 * GIB, 16 * GIB), Workload((20, 30, 1500), 128)
    plan = search(spec, "bfloat16", memory, DatasheetRates(H100), work)
    policy, n = plan.policy, plan.prediction.num_seqs
    problem = problem_of(spec, "bfloat16", memory, work)
    assert (
        problem.blocks_of_longest
        <= policy.num_blocks
        < 0.5 * problem.free_blocks(replace(policy, num_blocks=0))
    )
    assert n <= policy.max_num_seqs <= 1.01 * ROOM * n
    assert policy.kv_every == 1, "there is room on the GPU for as many"
    one = replace(problem, enough=1)
    assert one.most_blocks == problem.blocks_of_longest > problem.mean_blocks
    assert replace(problem, most_seqs=1).most_blocks == problem.blocks_of_longest


def test_a_model_that_fits_on_the_gpu_with_its_kv_streams_nothing():
    policy = planned(400, num_requests=2000).policy
    assert policy.resident_pages == (8 * policy.pages_per_expert,) * 32
    assert (policy.num_frames, policy.kv_every) == (0, 1)


@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_models_of_few_layers_can_be_planned(num_layers):
    spec = replace(MIXTRAL, num_layers=num_layers)
    plan = search(spec, "bfloat16", Memory(40 * GIB, 7 * GIB), DatasheetRates(H100), WORK, max_num_seqs=200)
    assert len(plan.policy.resident_pages) == num_layers
    assert plan.prediction.pass_s > 0


def test_prompts_with_answers_of_one_token_are_planned_in_time_and_in_passes_that_can_be_built():
    work = Workload((50,), 1, 200_000)
    policy = search(MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), DatasheetRates(H100), work).policy
    assert policy.prefill_tokens <= 2**16


def test_a_batch_is_no_larger_than_the_work():
    plan = planned(num_requests=40)
    assert plan.policy.max_num_seqs <= 40
    assert plan.prediction.job_s is not None
    assert plan.prediction.job_tokens_per_s == pytest.approx(40 * 32 / plan.prediction.job_s)


def better_machine(better, factor):
    """Memory and hardware of which one thing is better than those of `planned`."""
    gpu, host, hardware = 16, 110, H100
    if better in ("h2d", "d2h"):
        hardware = replace(hardware, **{better: factor * getattr(hardware, better)})
    elif better == "gpu memory":
        gpu *= factor
    elif better == "host memory":
        host *= factor
    else:
        device, what = better.split()
        old = getattr(hardware, device)
        rates = {dtype: factor * rate for dtype, rate in old.flops.items()}
        changed = {"bandwidth": {"bandwidth": factor * old.bandwidth}, "flops": {"flops": rates}}[what]
        hardware = replace(hardware, **{device: replace(old, **changed)})
    return Memory(int(host * GIB), int(gpu * GIB)), DatasheetRates(hardware)


BETTER = [
    "h2d", "d2h", "cpu bandwidth", "cpu flops", "gpu bandwidth", "gpu flops", "gpu memory", "host memory",
]  # fmt: skip


@settings(max_examples=3, deadline=None)
@given(better=st.sampled_from(BETTER), factor=st.sampled_from([1.02, 1.1, 1.5, 2.0]))
def test_better_hardware_is_never_predicted_slower(better, factor):
    memory, rates = better_machine(better, factor)
    after = search(MIXTRAL, "bfloat16", memory, rates, WORK)
    # A search that varies one choice at a time may miss a little.
    assert after.tokens_per_s >= 0.995 * planned(16, 110).tokens_per_s


@settings(max_examples=6, deadline=None)
@given(better=st.sampled_from(BETTER), factor=st.sampled_from([1.02, 1.1, 2.0]))
def test_a_plan_runs_on_better_hardware_at_least_as_fast(better, factor):
    """So a search that has the smaller machine's plan in hand, as what-ifs have, never says less."""
    memory, rates = better_machine(better, factor)
    before = planned(16, 110)
    use = memory_use(MIXTRAL, 2, before.policy)
    assert use.gpu_bytes <= memory.gpu and use.host_bytes <= memory.host
    after = Outlook(MIXTRAL, "bfloat16", before.policy, rates, WORK).prediction
    assert after.job_tokens_per_s >= before.tokens_per_s * (1 - 1e-9)


def test_a_search_near_a_plan_is_no_slower_than_the_plan_and_about_as_fast_as_a_whole_one():
    memory, rates = better_machine("gpu memory", 1.5)
    near = search(MIXTRAL, "bfloat16", memory, rates, WORK, near=planned(16, 110))
    whole = search(MIXTRAL, "bfloat16", memory, rates, WORK)
    assert near.tokens_per_s >= planned(16, 110).tokens_per_s
    assert near.tokens_per_s >= 0.97 * whole.tokens_per_s


def test_a_plan_with_all_experts_on_the_cpu_is_tried_with_plain_ones():
    memory, rates = Memory(120 * GIB, 24 * GIB), DatasheetRates(H100)
    problem = replace(problem_of(MIXTRAL, "bfloat16", memory, WORK), packed=True)
    choice = replace(planned().choice, cpu_every=1, kv_every=0)
    policy = largest_policy(problem, choice)
    trials = Trials(problem, rates)
    trials.try_plan(Planned(problem.outlook(policy, rates), choice))
    assert trials.best.policy == policy and not policy.packed


@pytest.mark.parametrize(("num_requests", "gen_len", "host"), [(3, 64, 120), (10, 32, 120), (70, 32, 160)])
def test_a_small_job_is_no_slower_than_with_less_memory(num_requests, gen_len, host):
    """By a profile of C++ kernels: with experts of some layers on the CPU much depends on other choices."""
    rates = MeasuredRates(load_profile(RESULTS / "small_jobs_fc6bac0" / "profile.json"))
    work, gpu = Workload((77,), gen_len, num_requests), 23 * GIB
    plan = search(MIXTRAL, "bfloat16", Memory(host * GIB, gpu), rates, work)
    assert plan.policy.cpu_every
    for less in (Memory((host - 32) * GIB, gpu), Memory(host * GIB, gpu - 2 * GIB)):
        other = search(MIXTRAL, "bfloat16", less, rates, work, near=plan)
        assert other.tokens_per_s < 1.012 * plan.tokens_per_s


@pytest.mark.parametrize(
    ("heads", "sizes", "gpu", "hosts", "gen_len"),
    [
        # 128 experts of 768 rows in 48 layers, 64 of 1,408 in 27: with twice the host memory these were 1 and 3 %
        # slower while KV on the GPU was tried for other numbers of sequences only, and while micro-batches and
        # groups were not varied together.
        (AttentionSpec(32, 4, 128), (48, 2048, 768, 128, 8, 151936), 16, (128, 256), 128),
        (AttentionSpec(16, 2, 128), (27, 2048, 1408, 64, 6, 102400), 16, (128, 256), 512),
        # 32 experts of 2,880 rows in 24 layers: 3.5 % slower where the two numbers of sequences that choices are
        # varied for may be nearly the same.
        (AttentionSpec(64, 8, 64), (24, 2880, 2880, 32, 4, 201088), 24, (64, 128), 128),
    ],
)
def test_a_job_is_no_slower_with_more_host_memory(heads, sizes, gpu, hosts, gen_len):
    layers, hidden, inner, experts, top_k, vocab = sizes
    moe = replace(
        MIXTRAL.experts, num_experts=experts, intermediate_size=inner,
        router=replace(MIXTRAL.experts.router, top_k=top_k),
    )  # fmt: skip
    spec = replace(
        MIXTRAL, num_layers=layers, hidden_size=hidden, vocab_size=vocab, attention=heads, experts=moe
    )
    rates = MeasuredRates(load_profile(RESULTS / "small_jobs_fc6bac0" / "profile.json"))
    work = Workload(MTBENCH.prompt_lens, gen_len, 10_000)
    less, more = (
        search(spec, "bfloat16", Memory(host * GIB, gpu * GIB), rates, work).tokens_per_s for host in hosts
    )
    assert more >= 0.995 * less


def test_half_the_bytes_of_experts_leave_twice_as_many_resident_and_take_half_the_time():
    rates = LighterPages(DatasheetRates(H100), 0.5)
    work = pass_work(MIXTRAL, PassShape(32, 0, 1, 1, 0, (112,) * 32, 112), (8,), 100, pages_per_expert=14)
    page, other = (
        Task(kind, lane, 0, (0,), (), ())
        for kind, lane in ((TaskKind.LOAD_PAGE, Lane.H2D), (TaskKind.EXPERTS, Lane.GPU))
    )
    whole, half = DatasheetRates(H100).seconds(work), rates.seconds(work)
    assert (half(page), half(other)) == (whole(page) / 2, whole(other))
    policy = replace(planned().policy, packed=False)
    full, light = memory_use(MIXTRAL, 2, policy), memory_use(MIXTRAL, 2, policy, expert_bytes=1)
    assert 2 * light.device.resident == full.device.resident and 2 * light.host.experts == full.host.experts
    assert light.device.weights == full.device.weights and light.host.kv == full.host.kv


def test_packed_experts_are_faster_where_they_stream_and_plain_ones_where_all_fit():
    memory = Memory(120 * GIB, 24 * GIB)
    packed, plain = (
        search(MIXTRAL, "bfloat16", memory, DatasheetRates(H100), WORK, packs=p) for p in (True, False)
    )
    assert packed.policy.packed and not plain.policy.packed
    assert packed.tokens_per_s > 1.25 * plain.tokens_per_s
    assert not search(
        MIXTRAL, "bfloat16", Memory(120 * GIB, 150 * GIB), DatasheetRates(H100), WORK
    ).policy.packed
    assert not search(MIXTRAL, "float16", memory, DatasheetRates(H100), WORK).policy.packed


@pytest.mark.parametrize(
    ("gpu", "memory", "symbol"), [(10, Memory(120 * GIB, GIB), "r_c>0"), (64, Memory(GIB, 64 * GIB), "r_c=0")]
)
def test_kv_in_another_place_may_not_fit(gpu, memory, symbol):
    plan = planned(gpu)
    problem = replace(problem_of(MIXTRAL, "bfloat16", memory, WORK), packed=plan.policy.packed)
    (kv,) = (each for each in alternatives(problem, plan, DatasheetRates(H100)) if "r_c" in each.symbol)
    assert (kv.symbol, kv.gain) == (symbol, None)


@pytest.mark.parametrize(
    ("model", "gpu", "host", "prompt", "gen"),
    [
        ("llama-3.1-70b", "h100-sxm", 93, 1, 32),
        ("mistral-7b", "l4", 100, 16, 1000),
        ("mixtral-8x7b", "l4", 182, 77, 32),
    ],
)
def test_no_place_that_is_left_out_would_be_faster_for_a_single_request(model, gpu, host, prompt, gen):
    """All places by the same simulation: estimates of a single sequence are bounds, up to twice as fast."""
    spec, rates, memory = registry.resolve(model), DatasheetRates(PRESETS[gpu]), PRESETS[gpu].gpu.memory_bytes
    work, machine = Workload((prompt,), gen, 1), Memory(host * GIB, memory - GIB)
    plan = search(spec, "bfloat16", machine, rates, work)
    problem = replace(problem_of(spec, "bfloat16", machine, work), packed=plan.policy.packed)
    found = alternatives(problem, plan, rates)
    assert found and all(each.gain is None or each.gain < 0.01 for each in found)


# -- jobs of few requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "host", "gen", "requests"), [("h100-sxm", 190, 32, 30), ("l4", 182, 64, 40)])
def test_a_small_job_has_room_for_its_prompts_as_if_sequences_might_be_longer(gpu, host, gen, requests):
    """A pass has room for the longest sequence in any case: these jobs were up to 22 % slower without that."""
    rates, memory = DatasheetRates(PRESETS[gpu]), Memory(host * GIB, PRESETS[gpu].gpu.memory_bytes - GIB)
    work = Workload((77,), gen, requests)
    plan, longer = (
        search(MIXTRAL, "bfloat16", memory, rates, work, max_model_len=length) for length in (None, 4096)
    )
    assert longer.policy.prefill_tokens >= 4096 > plan.policy.prefill_tokens
    assert plan.tokens_per_s > 0.995 * longer.tokens_per_s


def test_a_pass_takes_no_less_than_its_pages_where_the_first_layers_stream_none():
    """28 pages a layer, 20 of 32 layers keep all of them: of the first six none comes."""
    spec, policy = registry.resolve("mistral-7b"), planned(24, 120).policy
    pages = spec.experts.num_experts * 28
    policy = replace(
        policy, resident_pages=(pages,) * 20 + (pages - 1,) * 12, num_frames=1, pages_per_expert=28, expert_parts=1,
        packed=False,
    )  # fmt: skip
    passes = Passes(spec, "float16", policy, DatasheetRates(PRESETS["v100-16gb"]), 300.0, 242.0)
    assert passes.lane_seconds(3, 0)[Lane.H2D] > 0
    for depth in (2, 6, 32):
        seconds, lanes = passes.steady(3, 0, depth)
        assert seconds >= lanes["h2d"] == pytest.approx(passes.lane_seconds(3, 0)[Lane.H2D])


def test_no_lane_works_longer_than_a_pass_and_no_job_is_faster_than_its_lanes():
    """Every third of 32 layers: those that stream are no whole periods, of which few are simulated."""
    problem = problem_of(MIXTRAL, "bfloat16", Memory(93 * GIB, 16 * GIB), Workload((2000,), 1000, 30))
    choice = Choice(2.0, 1, 1.25, 1, 2.0, 7, 1, kv_every=0, cpu_every=3)
    outlook = problem.outlook(largest_policy(problem, choice), DatasheetRates(PRESETS["a100-80gb"]))
    for decode, prompts in ((1, 0), (outlook.num_seqs, 0), (outlook.num_seqs, 500)):
        lanes = outlook.passes.lane_seconds(decode, prompts)
        for depth in (2, 6, 32):
            seconds, found = outlook.passes.steady(decode, prompts, depth)
            assert seconds >= max(lanes.values()) and found["h2d"] == lanes[Lane.H2D]
    assert max(outlook.estimate, outlook.prediction.job_tokens_per_s) <= outlook.at_best


def test_a_job_of_a_model_with_few_pages_is_no_slower_with_a_faster_cpu():
    """All layers of such passes are simulated: six, each with a share of a page, hide what is waited for."""
    spec, machine, work = registry.resolve("llama-3.1-8b"), PRESETS["v100-16gb"], Workload((242,), 128, 30)
    reached = []
    for times in (1.0, 1.1, 1.5):
        rates = DatasheetRates(
            replace(machine, cpu=replace(machine.cpu, bandwidth=times * machine.cpu.bandwidth))
        )
        reached.append(search(spec, "float16", Memory(128 * GIB, 15 * GIB), rates, work).tokens_per_s)
    assert reached == sorted(reached)


# -- experts on the CPU -------------------------------------------------------------------------------------


def few(num_requests, **changes):
    """The plan for a job so small that pages are what takes long."""
    rates = DatasheetRates(replace(PRESETS["rtx-4090"], **changes))
    return search(MIXTRAL, "bfloat16", Memory(100 * GIB, 23 * GIB), rates, Workload((77,), 64, num_requests))


def test_the_cpu_computes_experts_where_few_sequences_make_waiting_for_pages_long():
    with_cpu, slow = few(50), replace(PRESETS["rtx-4090"].cpu, flops={"bfloat16": 1e10})
    assert with_cpu.policy.cpu_every and few(1000).policy.cpu_every == 0
    without = few(50, cpu=slow)
    assert without.policy.cpu_every == 0, "a CPU that computes nothing is left alone"
    assert with_cpu.tokens_per_s > 1.2 * without.tokens_per_s
    on_cpu = layers_on_cpu(with_cpu.policy)
    assert all(
        (count == 0) == (layer in on_cpu) for layer, count in enumerate(with_cpu.policy.resident_pages)
    )


def test_no_other_share_of_experts_on_the_cpu_is_faster_than_the_plans():
    plan, rates, work = few(50), DatasheetRates(PRESETS["rtx-4090"]), Workload((77,), 64, 50)
    problem = problem_of(MIXTRAL, "bfloat16", Memory(100 * GIB, 23 * GIB), work)
    problem = replace(problem, packed=plan.policy.packed)
    for every in (0, 1, 2, 3, 4, 8):
        other = largest_policy(problem, replace(plan.choice, cpu_every=every))
        if other:
            assert problem.outlook(other, rates).prediction.job_tokens_per_s < 1.01 * plan.tokens_per_s
    (found,) = (each for each in alternatives(problem, plan, rates) if "F_g" in each.symbol)
    assert found.symbol == "F_g=1" and found.gain < -0.1


def test_attention_on_the_gpu_is_simulated_where_the_plans_ring_does_not_hold_a_layer():
    plan = planned()
    problem = replace(problem_of(MIXTRAL, "bfloat16", Memory(120 * GIB, 24 * GIB), WORK), packed=True)
    choice = replace(plan.choice, ring=0.5, parts=8, cpu_every=4)
    few = sized(problem, choice, 100)
    assert few.num_frames < MIXTRAL.experts.num_experts * few.pages_per_expert - min(few.resident_pages)
    found = alternatives(problem, replace(plan, choice=choice), DatasheetRates(H100))
    assert found[0].symbol == "A_g=1" and found[0].gain < 0


def test_a_model_that_fits_packed_alone_is_planned_plain_where_unpacking_takes_long():
    """One sequence meets 8 of 128 experts of a layer, and packed ones are unpacked all: 3.4 times as slow."""
    heads, layers = AttentionSpec(32, 4, 128), 48
    router = replace(MIXTRAL.experts.router, top_k=8)
    moe = replace(MIXTRAL.experts, num_experts=128, intermediate_size=768, router=router)
    spec = replace(
        MIXTRAL, num_layers=layers, hidden_size=2048, vocab_size=151936, attention=heads, experts=moe
    )
    given = (
        spec,
        "bfloat16",
        Memory(128 * GIB, 47 * GIB),
        DatasheetRates(PRESETS["l40s"]),
        Workload((77,), 128, 1),
    )
    plan, plain = search(*given), search(*given, packs=False)
    assert not plan.policy.packed and plan.tokens_per_s > 0.99 * plain.tokens_per_s


def test_experts_on_the_cpu_may_not_fit_and_are_left_out_where_nothing_is_known_of_them():
    plan = planned()
    problem = replace(problem_of(MIXTRAL, "bfloat16", Memory(44 * GIB, 24 * GIB), WORK), packed=True)
    (found,) = (each for each in alternatives(problem, plan, DatasheetRates(H100)) if "F_g" in each.symbol)
    assert (found.symbol, found.gain) == ("F_g<1", None)
    before = load_profile(PROFILE)
    unknown = MeasuredRates(replace(before, host=replace(before.host, experts=())))
    assert not any("F_g" in each.symbol for each in alternatives(problem, plan, unknown))


@pytest.mark.parametrize(("every", "kv_every"), [(1, 0), (2, 0), (3, 2), (5, 0), (8, 4)])
def test_a_pass_of_few_simulated_layers_stands_for_all_where_some_have_experts_on_the_cpu(every, kv_every):
    problem = replace(problem_of(MIXTRAL, "bfloat16", Memory(150 * GIB, 24 * GIB), WORK), packed=True)
    choice = replace(planned(24).choice, cpu_every=every, kv_every=kv_every)
    policy = sized(problem, choice, 100)
    passes = Passes(MIXTRAL, "bfloat16", policy, DatasheetRates(H100), WORK.mean_context, WORK.mean_prompt)
    few, lanes_of_few = passes.steady(100, 60, 6)
    every_layer, lanes = passes.steady(100, 60, 32)
    assert few == pytest.approx(every_layer, rel=0.08)
    alone = passes.lane_seconds(100, 60)
    for lane in ("cpu", "h2d", "back", "d2h"):
        assert lanes_of_few[lane] == pytest.approx(lanes[lane], rel=0.08)
        assert alone[lane] == pytest.approx(lanes[lane], rel=0.02)


# -- KV on the GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpu", "least", "most"), [(10, 0, 0), (24, 0, 1 / 6), (64, 1 / 6, 0.5)])
def test_the_more_gpu_memory_the_more_kv_is_there(gpu, least, most):
    every = planned(gpu).policy.kv_every
    assert least <= (1 / every if every else 0) <= most


def test_few_large_micro_batches_are_found_where_kv_on_the_gpu_pays_with_these_alone():
    """Of the other starts none leads there, and without KV on the GPU they are slower."""
    spec, memory, rates = (
        registry.resolve("llama-3.1-8b"),
        Memory(160 * GIB, 23 * GIB),
        DatasheetRates(PRESETS["l4"]),
    )
    work = Workload((77,), 128, 10_000)
    choice = Choice(
        ring=2.0, micro_batches=2, prefill=1.25, groups=4, ahead=2.0, pages=14, parts=1, kv_every=2
    )
    known = largest_policy(problem_of(spec, "bfloat16", memory, work), choice)
    known_rate = Outlook(spec, "bfloat16", known, rates, work).prediction.job_tokens_per_s
    assert search(spec, "bfloat16", memory, rates, work).tokens_per_s > 0.99 * known_rate


@pytest.mark.parametrize(("gen_len", "num_seqs"), [(32, 664), (512, 166)])
def test_so_few_sequences_are_found_that_all_experts_stay_beside_their_kv(gen_len, num_seqs):
    """A quarter more, and pages come that take as long as all else: as many as fit are up to 40 % slower."""
    spec, memory = registry.resolve("llama-3.1-8b"), Memory(64 * GIB, 24 * GIB)
    rates = MeasuredRates(load_profile(RESULTS / "small_jobs_fc6bac0" / "profile.json"))
    work = Workload(MTBENCH.prompt_lens, gen_len)
    choice = Choice(
        ring=2.0, micro_batches=1, prefill=1.25, groups=1, ahead=2.0, pages=14, parts=1, kv_every=1
    )
    problem = replace(problem_of(spec, "bfloat16", memory, work), packed=True, enough=num_seqs)
    known = sized(problem, choice, num_seqs)
    assert not known.num_frames, "all experts stay"
    known_rate = problem.outlook(known, rates).prediction.job_tokens_per_s
    assert search(spec, "bfloat16", memory, rates, work).tokens_per_s > 0.99 * known_rate


def test_where_all_experts_stay_some_may_stream_for_kv_on_the_gpu():
    """The estimate of such a plan is 3 % below what it reaches: from there choices are varied nevertheless."""
    spec, memory, rates = (
        registry.resolve("llama-3.1-8b"),
        Memory(64 * GIB, 22 * GIB),
        DatasheetRates(PRESETS["l4"]),
    )
    choice = Choice(
        ring=2.0, micro_batches=4, prefill=1.25, groups=4, ahead=2.0, pages=14, parts=1, kv_every=4
    )
    problem = replace(problem_of(spec, "bfloat16", memory, MTBENCH), packed=True)
    known = largest_policy(problem, choice)
    known_rate = problem.outlook(known, rates).prediction.job_tokens_per_s
    assert search(spec, "bfloat16", memory, rates, MTBENCH).tokens_per_s > 0.99 * known_rate


def test_no_other_share_of_kv_on_the_gpu_is_faster_than_the_plans():
    plan = planned(64)
    assert plan.policy.kv_every
    problem = problem_of(MIXTRAL, "bfloat16", Memory(120 * GIB, 64 * GIB), WORK)
    problem = replace(problem, packed=plan.policy.packed)
    for every in (0, 2, 4, 8):
        other = largest_policy(problem, replace(plan.choice, kv_every=every))
        reached = Outlook(MIXTRAL, "bfloat16", other, DatasheetRates(H100), WORK).prediction.job_tokens_per_s
        assert reached < 1.005 * plan.tokens_per_s
    (_, kv, _) = alternatives(problem, plan, DatasheetRates(H100))
    assert kv.symbol == "r_c=0" and kv.gain < -0.01


def test_the_work_of_a_pass_has_the_share_of_layers_that_keep_their_kv():
    shape = PassShape(32, 0, 1, 1, 0, (112,) * 32, 112, kv_every=3)
    assert pass_work(MIXTRAL, shape, (8,), 100, pages_per_expert=14).kv_share == 10 / 32


@pytest.mark.parametrize(
    ("model", "gpu", "memory", "gen", "num_requests"),
    [
        ("mixtral-8x7b", "a100-80gb", (200, 79), 32, 100),
        ("mixtral-8x7b", "rtx-4090", (182, 79), 128, 300),
        ("mistral-7b", "l4", (100, 23), 64, 100),
        ("mistral-7b", "rtx-4090", (100, 23), 64, 100),
        ("llama-3.1-8b", "a100-80gb", (100, 79), 64, 200),
    ],
)
def test_small_jobs_attend_where_all_experts_are_and_no_other_way_is_faster(
    model, gpu, memory, gen, num_requests
):
    """Nothing streams that attention could hide behind: KV is on the GPU, and all memory that is left is for it."""
    spec, rates = registry.resolve(model), DatasheetRates(PRESETS[gpu])
    given = spec, "bfloat16", Memory(*(size * GIB for size in memory))
    work = Workload(MTBENCH.prompt_lens, gen, num_requests)
    plan = search(*given, rates, work)
    assert (plan.policy.num_frames, plan.policy.kv_every) == (0, 1)
    problem = replace(problem_of(*given, work), packed=plan.policy.packed)
    assert all(each.gain is None or each.gain < 0.01 for each in alternatives(problem, plan, rates))
    for name in ("flexgen", "flexgen_cpu", "whole_layer", "no_overlap"):
        other = replace(plan.policy, schedule=name)
        assert problem.outlook(other, rates).prediction.job_tokens_per_s < 1.01 * plan.tokens_per_s
    for micro_batches, kv_every in product((1, 2, 4), (0, 1, 2)):
        changed = replace(plan.choice, micro_batches=micro_batches, kv_every=kv_every)
        other = problem.outlook(largest_policy(problem, changed), rates)
        assert other.prediction.job_tokens_per_s < 1.01 * plan.tokens_per_s
    assert search(*given, rates, work, packs=False).tokens_per_s < 1.01 * plan.tokens_per_s


def slow_cpu(gpu, share):
    """Rates of a preset whose host memory has a share of its bandwidth."""
    card = PRESETS[gpu]
    return DatasheetRates(replace(card, cpu=replace(card.cpu, bandwidth=share * card.cpu.bandwidth)))


def test_few_sequences_over_an_idle_link_are_attended_to_on_the_gpu():
    """FlexGen's schedule: all experts fit on the GPU, KV does not beside them, and the CPU is slow."""
    spec, rates, work = registry.resolve("llama-3.1-8b"), slow_cpu("v100-16gb", 0.3), Workload((512,), 128, 4)
    given = spec, "float16", Memory(16 * GIB, 16 * GIB)
    plan = search(*given, rates, work)
    assert plan.policy.schedule == "flexgen"
    use = memory_use(spec, 2, plan.policy)
    assert use.device.staging > 0
    assert use.gpu_bytes <= 16 * GIB
    assert use.host_bytes <= 16 * GIB
    check_ring(plan.policy, num_experts=1)
    second, *_ = plan.runners_up
    assert (second.policy.schedule, second.choice.kv_every) == ("cgopipe", 1)
    assert second.tokens_per_s < 0.95 * plan.tokens_per_s
    problem = problem_of(*given, work)
    first, *_ = alternatives(problem, plan, rates)
    assert (first.name, first.symbol) == ("all KV on the GPU", "r_c=1")
    assert first.gain == second.tokens_per_s / plan.tokens_per_s - 1
    for every, symbol in ((0, "A_g=0"), (2, "r_c=1/2")):
        other = replace(plan, runners_up=(replace(second, choice=replace(second.choice, kv_every=every)),))
        assert alternatives(problem, other, rates)[0].symbol == symbol
    assert "cross" not in alternatives(problem, replace(plan, runners_up=()), rates)[0].reason


def test_more_memory_is_no_slower_where_the_gpu_attends_to_kv_of_the_host():
    """FlexGen's choices are not CGOPipe's, which differ from one memory to the next: they once led to 13 % less."""
    spec, work, rates = registry.resolve("llama-3.1-8b"), Workload((512,), 128, 10), slow_cpu("l4", 1.0)
    plans = [
        search(spec, "bfloat16", Memory(32 * GIB, round(gpu * GIB)), rates, work)
        for gpu in (14.5, 15, 15.5, 16, 18)
    ]
    assert "flexgen" in {plan.policy.schedule for plan in plans}
    for before, now in pairwise(plans):
        assert now.tokens_per_s > 0.995 * before.tokens_per_s


def test_nothing_crosses_the_link_where_nothing_decodes():
    work = Workload((77,), 1, 30)
    plan = search(
        registry.resolve("llama-3.1-8b"), "bfloat16", Memory(32 * GIB, 16 * GIB), slow_cpu("l4", 0.2), work
    )
    assert plan.policy.schedule == "cgopipe"


@pytest.mark.parametrize(
    ("model", "gpu", "share", "memory", "work"),
    [
        ("llama-3.1-8b", "l4", 1.0, (15, 15), (512, 128, 10)),
        ("mixtral-8x7b", "h100-pcie", 1.0, (32, 70.2), (512, 32, 100)),
        ("llama-3.1-8b", "l4", 0.4, (128, 15), (1000, 128, 4)),
        ("llama-3.1-8b", "v100-16gb", 1.0, (64, 15), (4000, 32, 30)),
        ("mistral-7b", "t4", 0.7, (128, 14), (4000, 128, 4)),
        ("mixtral-8x7b", "h100-sxm", 1.0, (120, 23), (1693, 1, 10)),
        ("mixtral-8x7b", "rtx-4090", 0.4, (120, 23), (512, 32, 100)),
    ],
)  # fmt: skip
def test_no_schedule_of_the_papers_is_faster_for_small_jobs_either(model, gpu, share, memory, work):
    spec, rates = registry.resolve(model), slow_cpu(gpu, share)
    dtype = "bfloat16" if gpu in ("l4", "h100-sxm", "h100-pcie", "rtx-4090") else "float16"
    prompt, gen, num_requests = work
    given = (
        spec,
        dtype,
        Memory(*(round(size * GIB) for size in memory)),
        Workload((prompt,), gen, num_requests),
    )
    plan = search(spec, dtype, given[2], rates, given[3])
    for packed in {plan.policy.packed, False}:
        problem = replace(problem_of(*given), packed=packed)
        whole = replace(plan.choice, groups=1, parts=1, kv_every=0, cpu_every=0)
        for micro_batches, ring, prefill in product((1, 2, 4), (1.2, 2.0), (1.25, 4.0)):
            choice = replace(whole, micro_batches=micro_batches, ring=ring, prefill=prefill)
            policy = largest_policy(problem, choice)
            some = [
                replace(policy, schedule=name)
                for name in ("flexgen_cpu", "no_overlap", "whole_layer")
                if policy
            ]
            some += filter(None, [attending._sized(problem, choice)])
            for other in (problem.outlook(policy, rates).prediction for policy in some):
                assert other.job_tokens_per_s < 1.015 * plan.tokens_per_s


# Much GPU memory: there the number of sequences is a choice as well, since each takes room of experts.
@pytest.mark.parametrize(("gpu", "host"), [(64, 120), (100, 100), (200, 120)])
def test_more_memory_is_never_predicted_slower_where_the_gpu_has_much(gpu, host):
    before = planned(gpu, host, num_requests=20_000)
    is_fewer = before.policy.max_num_seqs == before.prediction.num_seqs
    assert before.policy.kv_every or is_fewer
    for more in ((gpu, 1.3 * host), (1.3 * gpu, host)):
        assert planned(*more, num_requests=20_000).tokens_per_s >= 0.98 * before.tokens_per_s


@pytest.mark.parametrize(("model", "faster"), [("mixtral-8x7b", 1.25), ("mixtral-8x22b", 1.5)])
def test_a_small_job_is_no_slower_with_a_faster_link_though_its_experts_and_kv_stay_where_they_are(
    model, faster
):
    """Three of four requests at once: with all of them this way is slower than others, and not where one looks."""
    spec, work, memory = registry.resolve(model), Workload((512,), 8, 4), Memory(300 * GIB, 15 * GIB)
    usual = PRESETS["t4"]
    plans = [
        search(spec, "float16", memory, DatasheetRates(replace(usual, h2d=h2d)), work)
        for h2d in (usual.h2d, faster * usual.h2d)
    ]
    assert all(plan.choice.kv_every == plan.choice.cpu_every == 1 for plan in plans)
    assert plans[1].tokens_per_s >= 0.998 * plans[0].tokens_per_s


@pytest.mark.parametrize(
    ("model", "gpu", "hosts", "gen"),
    [("mixtral-8x22b", 79, (300, 332, 360), 128), ("mixtral-8x7b", 23, (112, 140, 192), 32)],
)
def test_a_job_does_not_take_longer_with_memory_for_more_sequences_than_it_gains_by(model, gpu, hosts, gen):
    """With as many as fit the last of 10,000 requests would run in passes nearly empty."""
    spec, work = registry.resolve(model), Workload(MTBENCH.prompt_lens, gen, 10_000)
    reached = [
        search(spec, "bfloat16", Memory(host * GIB, gpu * GIB), DatasheetRates(H100), work).tokens_per_s
        for host in hosts
    ]
    assert all(more >= 0.99 * less for less, more in pairwise(reached))


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
def test_a_pass_of_few_simulated_layers_stands_for_all_where_some_keep_their_kv(every):
    """Those are taken as whole periods, so that the mean layer is the model's."""
    problem = replace(problem_of(MIXTRAL, "bfloat16", Memory(120 * GIB, 64 * GIB), WORK), packed=True)
    policy = largest_policy(problem, replace(planned(64).choice, kv_every=every))
    passes = Passes(MIXTRAL, "bfloat16", policy, DatasheetRates(H100), WORK.mean_context, WORK.mean_prompt)
    few, lanes_of_few = passes.steady(4000, 4000, 6)
    every_layer, lanes = passes.steady(4000, 4000, 32)
    assert few == pytest.approx(every_layer, rel=0.05)
    assert lanes_of_few == pytest.approx(lanes, rel=0.04)
    at_least = passes.lane_seconds(4000, 4000)
    assert {lane.value: at_least[lane] for lane in at_least} == pytest.approx(lanes, rel=0.02)


def test_whole_layers_with_a_ring_of_two_are_found_where_no_single_change_leads_there():
    rates = MeasuredRates(load_profile(RESULTS / "cells_7acbf6c_2" / "profile.json"))
    memory, work = Memory(120 * GIB, 23 * GIB), workload("mtbench", 32)
    found = search(MIXTRAL, "bfloat16", memory, rates, work)
    problem = replace(problem_of(MIXTRAL, "bfloat16", memory, work), packed=True)
    choice = Choice(ring=2.0, micro_batches=8, prefill=1.25, groups=2, ahead=2.0, pages=14, parts=1)
    known = Outlook(MIXTRAL, "bfloat16", largest_policy(problem, choice), rates, work).prediction
    assert found.tokens_per_s > 0.99 * known.job_tokens_per_s


# -- what does not fit -------------------------------------------------------------------------------------


def lacking(memory, **options):
    with pytest.raises(NoFeasiblePolicyError) as caught:
        search(MIXTRAL, "bfloat16", memory, DatasheetRates(H100), WORK, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "host", "ways"),
    [
        (4, 110, [{"gpu"}]),
        (0, 110, [{"gpu"}]),
        (16, 40, [{"gpu"}, {"host"}]),
        (4, 40, [{"gpu"}, {"gpu", "host"}]),
    ],
)
def test_what_cannot_fit_says_what_it_needs_and_each_way_that_is_named_is_just_enough(gpu, host, ways):
    message = lacking(Memory(host * GIB, gpu * GIB))
    assert re.search(r"needs [\d.]+ GiB of GPU memory .* [\d.]+ GiB of host memory", message)
    named = [
        {name.lower(): float(size) for size, name in re.findall(r"([\d.]+) GiB more (GPU|host)", way)}
        for way in message.split("It would fit with")[1].split(", or ")
    ]
    assert sorted(map(set, named), key=len) == ways or named == ways
    for more in named:
        for slack, fits in ((0.06, True), (-0.25, False)):
            added = {name: size + slack for name, size in more.items()}
            memory = Memory(int((host + added.get("host", 0)) * GIB), int((gpu + added.get("gpu", 0)) * GIB))
            problem = replace(problem_of(MIXTRAL, "bfloat16", memory, WORK), packed=True)
            assert bool(smallest_policy(problem)) == fits


@pytest.mark.parametrize(("gpu", "host"), [(3, 120), (-1, 120), (20, 40), (3, 40), (20, -5)])
def test_what_is_missing_is_said_to_the_byte(gpu, host):
    memory = Memory(host * GIB, gpu * GIB)
    missing = {
        kind: int(size.replace(",", ""))
        for kind, size in re.findall(r"of (GPU|host) memory \(([\d,]+) bytes\)", lacking(memory))
    }
    enough = {"host": memory.host + missing.get("host", 0), "gpu": memory.gpu + missing.get("GPU", 0)}
    assert search(MIXTRAL, "bfloat16", Memory(**enough), DatasheetRates(H100), WORK)
    for name in missing:
        lacking(Memory(**{**enough, name.lower(): enough[name.lower()] - 1}))


def test_where_a_shorter_model_length_would_do_the_message_says_which():
    memory = Memory(90 * GIB, 6 * GIB)
    message = lacking(memory, max_model_len=32768)
    length = int(re.search(r"max_model_len=(\d+) instead of 32768", message)[1])
    for longest, fits in ((length, True), (length + 1, False)):
        problem = problem_of(MIXTRAL, "bfloat16", memory, WORK, max_model_len=longest)
        problem = replace(problem, packed=True)
        assert bool(smallest_policy(problem)) == fits


def smallest_policy(problem):
    from moe_lightning.perf.choices import starts, values_of

    some = (replace(starts(problem)[-1], pages=pages) for pages in values_of(problem)["pages"])
    return next((policy for choice in some if (policy := sized(problem, choice, 1))), None)


def test_a_length_that_the_model_cannot_have_is_refused():
    with pytest.raises(ConfigError, match="max_model_len=40000"):
        search(
            MIXTRAL, "bfloat16", Memory(110 * GIB, 24 * GIB), DatasheetRates(H100), WORK, max_model_len=40000
        )


def test_the_hardware_limit_is_the_one_on_paper():
    """Mixtral-8x7B with 125 GiB of host memory: by hand, from sizes and a link of 55.2 GB/s."""
    work = Workload((77,), gen_len=32)
    for gpu, share, tokens_per_s in ((24, 0.25, 4457), (16, 0.155, 3444)):
        limit = hardware_limit(MIXTRAL, 2, gpu * GIB, 125 * GIB, 55.2e9, work)
        assert limit.resident_share == pytest.approx(share, abs=0.003)
        assert limit.tokens_per_s == pytest.approx(tokens_per_s, rel=0.01)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 20))
def test_mean_blocks_are_those_of_all_ages_counted_one_by_one(prompts, gen_len, block_size):
    work = Workload(tuple(prompts), gen_len)
    counted = [-(-(p + age) // block_size) for p in prompts for age in range(1, gen_len + 1)]
    assert work.mean_blocks(block_size) == pytest.approx(sum(counted) / len(counted))
