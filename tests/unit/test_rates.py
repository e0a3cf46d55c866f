"""Seconds of tasks by a profile made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_lightning.hardware.kernel_times import PartTimes
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile import Profile
from moe_lightning.models.registry import resolve
from moe_lightning.perf.cost import PassWork, streamed_page_bytes
from moe_lightning.perf.memory import CPU_EXPERTS_AT_ONCE, EXPERTS_AT_ONCE
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates
from moe_lightning.pipeline.task import Lane, Task, TaskKind
from profiles import LANES, LINK, MIXTRAL, PROFILE

SPEC = resolve("mixtral-8x7b")
# A chunk of 64 tokens and a micro-batch of 512.
WORK = PassWork(SPEC, "bfloat16", 14, (64, 512), (64 * 40, 512 * 100), (1, 512))
BOTH = replace(WORK, num_prefill=1)
GPU = PROFILE.gpu
IN_PASSES = 1.09  # times as long as profiles have it
LANE = {
    TaskKind.OFFLOAD_QKV: Lane.D2H, TaskKind.STORE_KV: Lane.D2H, TaskKind.LOAD_HIDDEN: Lane.BACK,
    TaskKind.LOAD_PAGE: Lane.H2D,
}  # fmt: skip


def seconds(
    kind: TaskKind, j: int, profile: Profile = PROFILE, work: PassWork = WORK, lane: Lane | None = None
) -> float:
    return MeasuredRates(profile).seconds(work)(Task(kind, lane or LANE.get(kind, Lane.GPU), 0, (j,), (), ()))


def with_gpu(**values: object) -> Profile:
    return replace(PROFILE, gpu=replace(GPU, **values))


def experts(parts: int, tokens: int = 8192) -> float:
    return seconds(TaskKind.EXPERTS, 1, work=replace(WORK, tokens=(64, tokens), expert_parts=parts))


def test_unpacking_reads_and_writes_at_the_rate_of_a_copy_and_comes_to_the_sweep() -> None:
    plain, packed = (seconds(TaskKind.EXPERTS, 1, work=replace(WORK, unpacked_for=j)) for j in (0, 1))
    weights = 3 * SPEC.hidden_size * SPEC.experts.intermediate_size * SPEC.experts.num_experts * 2
    assert packed - plain == pytest.approx(1.75 * weights / GPU.memory + LANES.gpu_gap_s, rel=0.01)


def by_datasheet(kind: TaskKind, work: PassWork, *shares: float) -> float:
    rates = DatasheetRates(preset("h100-sxm"), *shares)
    return rates.seconds(work)(Task(kind, LANE[kind], 0, (1,), (), ()))


def test_by_a_datasheet_pages_are_slower_for_as_long_as_the_cpu_reads_host_memory() -> None:
    machine, shares = preset("h100-sxm"), DatasheetRates(preset("h100-sxm"))
    alone = streamed_page_bytes(BOTH) / machine.h2d + machine.launch_s
    beside = streamed_page_bytes(BOTH) / (shares.to_gpu * machine.h2d) + machine.launch_s
    reads = SPEC.num_layers * shares.seconds(BOTH)(Task(TaskKind.ATTENTION, Lane.CPU, 0, (1,), (), ()))
    everyone = Task(TaskKind.CPU_EXPERTS, Lane.CPU, 0, (0, 1), (), ())
    reads_of_experts = SPEC.num_layers * shares.seconds(BOTH)(everyone)
    assert by_datasheet(TaskKind.LOAD_PAGE, BOTH) == pytest.approx(beside), "nobody says how many come"
    for pages in (1, round(2 * reads / beside), 10**6):
        share = min(1.0, reads / (pages * beside))
        found = by_datasheet(TaskKind.LOAD_PAGE, replace(BOTH, streamed_pages=pages))
        assert found == pytest.approx(1 / (share / beside + (1 - share) / alone))
    for work, share in (
        (replace(BOTH, kv_share=0.25), 0.75 * reads),
        (replace(BOTH, kv_share=1.0, cpu_share=0.5), 0.5 * reads_of_experts),
    ):
        pages = round(3 * share / beside)
        found = by_datasheet(TaskKind.LOAD_PAGE, replace(work, streamed_pages=pages))
        assert found == pytest.approx(1 / (1 / 3 / beside + 2 / 3 / alone), rel=1e-3)
    for nothing_to_read in (
        replace(BOTH, streamed_pages=8, kv_share=1.0),
        replace(WORK, streamed_pages=8, num_prefill=2),
    ):
        assert by_datasheet(TaskKind.LOAD_PAGE, nothing_to_read) == pytest.approx(alone)
    assert by_datasheet(TaskKind.LOAD_PAGE, BOTH, 1, 1, 1, 1, 1) == pytest.approx(alone)


def test_by_a_datasheet_copies_back_share_the_link() -> None:
    slower, peak = (by_datasheet(TaskKind.OFFLOAD_QKV, WORK, *shares) for shares in ((), (1, 1, 1, 1, 1)))
    launch = preset("h100-sxm").launch_s
    assert slower - launch == pytest.approx((peak - launch) / DatasheetRates(preset("h100-sxm")).to_host)


def test_a_part_of_the_experts_that_was_measured_takes_what_was_measured() -> None:
    assert experts(1) == pytest.approx(8.6e-3 + LANES.gpu_gap_s)
    assert experts(8) == pytest.approx(1.2e-3 + LANES.gpu_gap_s)


def test_between_a_measured_part_and_the_whole_the_fixed_seconds_shrink_in_proportion() -> None:
    fixed = (1.2e-3 - 8.6e-3 / 8) / (1 - 1 / 8)
    for parts in (2, 4):
        share = 1 / parts
        assert experts(parts) == pytest.approx(fixed + share * (8.6e-3 - fixed) + LANES.gpu_gap_s)


def test_more_parts_never_take_less_time_and_no_part_less_than_its_share() -> None:
    sums = [parts * experts(parts) for parts in (1, 2, 4, 8)]
    assert sums == sorted(sums)
    # One that was disturbed, so that it seems to be faster than its share.
    quick = PartTimes(0.125, replace(GPU.experts[0].parts[0].times, seconds=(1e-5, 1e-5)))
    found = replace(GPU.experts[0], parts=(quick,))
    assert found.seconds(MIXTRAL, 8192, 0.125) == pytest.approx(8.6e-3 / 8)
    slow = PartTimes(0.125, replace(quick.times, seconds=(1.0, 1.0)))
    assert replace(found, parts=(slow,)).seconds(MIXTRAL, 8192, 0.125) == pytest.approx(8.6e-3)


def test_of_two_measured_parts_each_takes_what_was_measured_and_a_smaller_one_as_much_that_is_fixed() -> None:
    times = GPU.experts[0].times
    parts = tuple(
        PartTimes(share, replace(times, seconds=(s, s))) for share, s in ((0.125, 3e-3), (0.25, 4e-3))
    )
    found = replace(GPU.experts[0], parts=parts)
    assert found.seconds(MIXTRAL, 8192, 0.25) == pytest.approx(4e-3)
    assert found.seconds(MIXTRAL, 8192, 0.125) == pytest.approx(3e-3)
    assert found.seconds(MIXTRAL, 8192, 1 / 16) == pytest.approx(3e-3 - 8.6e-3 / 16)
    assert found.seconds(MIXTRAL, 8192) == pytest.approx(8.6e-3)


@pytest.mark.parametrize("parts", [1, 8])
def test_more_tokens_than_are_computed_at_once_take_a_sweep_for_each_turn(parts) -> None:
    at_once, rest = experts(parts, EXPERTS_AT_ONCE), experts(parts, 404)
    gap = LANES.gpu_gap_s
    assert experts(parts, 2 * EXPERTS_AT_ONCE) == pytest.approx(2 * at_once - gap)
    assert experts(parts, EXPERTS_AT_ONCE + 404) == pytest.approx(at_once + rest - gap)
    assert rest > 1.5 * at_once * 404 / EXPERTS_AT_ONCE, "few tokens take more than their share"


def test_small_kernels_of_earlier_profiles_come_to_the_products() -> None:
    old = with_gpu(small=(replace(GPU.small[0], is_whole=False),))
    qkv = GPU.dense[0].times.seconds_at(512)
    assert seconds(TaskKind.PRE_ATTENTION, 1, old) == pytest.approx(qkv + 6.4e-5 + LANES.gpu_gap_s)
    output = qkv * 4096 / 6144
    assert seconds(TaskKind.POST_ATTENTION, 1, old) == pytest.approx(output + 6.3e-5 + LANES.gpu_gap_s)


def test_measured_tasks_take_what_was_measured_and_of_other_models_what_comes_to_their_products() -> None:
    gap, qkv = LANES.gpu_gap_s, GPU.dense[0].times
    assert seconds(TaskKind.PRE_ATTENTION, 1) == pytest.approx(6.4e-5 + gap)
    assert seconds(TaskKind.POST_ATTENTION, 1) == pytest.approx(6.3e-5 + gap)
    wide = replace(WORK, spec=replace(SPEC, hidden_size=8192), tokens=(64, 256))
    found = seconds(TaskKind.PRE_ATTENTION, 1, work=wide)
    assert found == pytest.approx(2 * qkv.seconds_at(256) + 6.4e-5 - qkv.seconds_at(512) + gap)
    quick = replace(GPU.small[0].pre_attention, seconds=(1e-5, 1e-5))
    disturbed = with_gpu(small=(replace(GPU.small[0], pre_attention=quick),))
    assert seconds(TaskKind.PRE_ATTENTION, 1, disturbed) == pytest.approx(qkv.seconds_at(512) + gap)


def test_a_wider_model_has_more_elements_in_a_row() -> None:
    small = GPU.small_like(8192, 8)
    assert small is not None
    assert small.rows_of(8192, 100) == 200


def test_without_measured_small_kernels_their_bytes_count() -> None:
    found = seconds(TaskKind.POST_ATTENTION, 1, with_gpu(small=()))
    moved = 512 * 4 * 4096 * 2 / GPU.memory
    assert found == pytest.approx(GPU.dense[0].times.seconds_at(512) * 2 / 3 + moved + LANES.gpu_gap_s)


def test_embedding_takes_no_less_than_its_launches() -> None:
    launches = LANES.gpu_launch_s + 7 * LANES.gpu_kernel_launch_s
    assert seconds(TaskKind.EMBED, 1) == pytest.approx(launches)


def test_keys_and_values_are_stored_at_the_rate_of_kernels_that_store_them() -> None:
    size = 64 * 2 * 1024 * 2
    store = GPU.prefill[0].store
    assert store
    assert seconds(TaskKind.STORE_KV, 0) == pytest.approx(store.seconds_at(size))
    unmeasured = with_gpu(prefill=(replace(GPU.prefill[0], store=None),))
    assert seconds(TaskKind.STORE_KV, 0, unmeasured) == pytest.approx(size / 46e9)
    old = replace(unmeasured, gpu=replace(unmeasured.gpu, link=replace(LINK, kv_store=21e9)))
    assert seconds(TaskKind.STORE_KV, 0, old) == pytest.approx(size / 21e9)


def test_copies_to_the_host_are_as_slow_as_beside_copies_to_the_gpu_and_attention() -> None:
    alone = LINK.d2h.seconds_at(512 * 6144 * 2)
    slowed = (2**26 / 1.23e-3) / 46e9 * (2**26 / 1.22e-3) / 52e9
    assert seconds(TaskKind.OFFLOAD_QKV, 1) == pytest.approx(alone * slowed)


def test_what_comes_back_beside_pages_waits_and_shares_the_link_but_not_where_it_queues_with_them() -> None:
    queued = seconds(TaskKind.LOAD_HIDDEN, 1, lane=Lane.H2D)
    assert seconds(TaskKind.LOAD_HIDDEN, 1) == pytest.approx(45e-6 + 1.45 * queued)
    slowed = (2**26 / 1.22e-3) / 52e9
    assert queued == pytest.approx(LINK.h2d.seconds_at(512 * 4096 * 2) * slowed)
    page = 3 * 4096 * 14336 // 14 * 2
    assert seconds(TaskKind.LOAD_PAGE, 0) == pytest.approx(IN_PASSES * LINK.h2d.seconds_at(page) * slowed)


def test_pages_come_as_slowly_as_beside_attention_only_for_as_long_as_it_lasts() -> None:
    page = 3 * 4096 * 14336 // 14 * 2
    alone, plain = LINK.h2d.seconds_at(page), 2**26 / 1.22e-3
    attention_s = SPEC.num_layers * seconds(TaskKind.ATTENTION, 1)
    for share in (0.25, 0.5, 1.0, 4.0):
        pages = round(attention_s / share / (IN_PASSES * alone * plain / 52e9))
        found = seconds(TaskKind.LOAD_PAGE, 0, work=replace(BOTH, streamed_pages=pages))
        attends = min(1.0, share)
        rate = attends * 52e9 + (1 - attends) * plain
        assert found == pytest.approx(IN_PASSES * alone * plain / rate, rel=1e-2)
        # What comes back shares the link while pages come, and has all of it while none do.
        back = seconds(TaskKind.LOAD_HIDDEN, 1, work=replace(BOTH, streamed_pages=pages))
        once = seconds(TaskKind.LOAD_HIDDEN, 1, lane=Lane.H2D)
        assert back == pytest.approx(once + min(1.0, 1 / share) * (45e-6 + 0.45 * once), rel=1e-2)
    assert seconds(TaskKind.LOAD_HIDDEN, 1, work=replace(BOTH, streamed_pages=0)) == pytest.approx(once)


def test_prompts_attend_on_the_gpu_whatever_is_sampled_of_them() -> None:
    page = 3 * 4096 * 14336 // 14 * 2
    scored = replace(BOTH, sampled_rows=(64, 512), num_prefill=2, streamed_pages=1)
    found = seconds(TaskKind.LOAD_PAGE, 0, work=scored)
    assert found == pytest.approx(IN_PASSES * LINK.h2d.seconds_at(page))


def test_what_was_measured_as_in_passes_counts_before_what_earlier_versions_measured() -> None:
    both = replace(LINK, h2d_beside_attention=47e9, h2d_under_attention=53e9)
    assert both.slowest_h2d == 47e9
    neither = replace(LINK, h2d_beside_attention=None, h2d_under_attention=None)
    assert neither.slowest_h2d == neither.fastest_h2d == LINK.h2d.rate_at(2**26)
    no_stores = tuple(replace(found, store=None) for found in GPU.prefill)
    assert not with_gpu(prefill=no_stores).is_complete
    # Where memory is not locked, neither is measured.
    assert with_gpu(prefill=no_stores, link=replace(neither, is_pinned=False)).is_complete


def test_profiles_of_earlier_versions_have_the_rate_with_pauses() -> None:
    old = with_gpu(link=replace(LINK, h2d_beside_attention=None, h2d_under_attention=53e9))
    page = 3 * 4096 * 14336 // 14 * 2
    slowed = (2**26 / 1.22e-3) / 53e9
    found = seconds(TaskKind.LOAD_PAGE, 0, old)
    assert found == pytest.approx(IN_PASSES * LINK.h2d.seconds_at(page) * slowed)
    assert not old.is_complete and PROFILE.is_complete


@pytest.mark.parametrize("kind", [TaskKind.RESIDENT_ATTENTION, TaskKind.GPU_ATTENTION])
def test_attention_in_gpu_memory_reads_k_and_v_at_the_rate_of_the_context(kind) -> None:
    size = 512 * 100 * 2 * 1024 * 2
    rate = GPU.decode[0].rate.rate_at(100)
    assert 1e12 < rate < 2e12
    assert seconds(kind, 1) == pytest.approx(size / rate + LANES.gpu_gap_s)
    old = with_gpu(decode=())
    assert not old.is_complete
    assert seconds(kind, 1, old) == pytest.approx(size / (0.4 * GPU.memory) + LANES.gpu_gap_s)


def test_layers_that_keep_their_kv_let_pages_come_as_if_alone_for_longer() -> None:
    pages = 3000
    none, half = (replace(BOTH, streamed_pages=pages, kv_share=share) for share in (0.0, 0.5))
    slow, faster = (seconds(TaskKind.LOAD_PAGE, 0, work=work) for work in (none, half))
    alone = IN_PASSES * LINK.h2d.seconds_at(3 * 4096 * 14336 // 14 * 2)
    assert alone < faster < slow
    assert 1 / faster == pytest.approx((1 / slow + 1 / alone) / 2)


def test_attention_of_prompts_takes_its_pairs_at_the_rate_of_a_tokens_prompt() -> None:
    flops = 4 * 64 * 40 * 4096
    rate = GPU.prefill[0].rate.rate_at(80)
    assert seconds(TaskKind.PREFILL_ATTENTION, 0) == pytest.approx(flops / rate + 2 * LANES.gpu_gap_s)


def test_experts_on_the_cpu_take_what_was_measured_and_a_hand_over() -> None:
    def on_cpu(tokens: int) -> float:
        work = replace(WORK, tokens=(64, tokens))
        return seconds(TaskKind.CPU_EXPERTS, 1, work=work, lane=Lane.CPU) - LANES.cpu_round_trip_s / 2

    assert on_cpu(64) == pytest.approx(4e-2)
    assert on_cpu(2 * CPU_EXPERTS_AT_ONCE + 64) == pytest.approx(2 * on_cpu(CPU_EXPERTS_AT_ONCE) + 4e-2)


def test_pages_are_as_slow_beside_the_cpus_experts_as_beside_its_attention() -> None:
    """Which reads as much of host memory; where it never ends, neither do slow pages."""

    def page(share: float, tokens: int) -> float:
        work = replace(WORK, tokens=(64, tokens), num_prefill=1, streamed_pages=1000, cpu_share=share)
        return seconds(TaskKind.LOAD_PAGE, 1, work=work)

    assert page(0.0, 8) < page(0.25, 8) < page(1.0, 4096)
    assert page(1.0, 4096) == pytest.approx(seconds(TaskKind.LOAD_PAGE, 1, work=WORK))


def test_a_profile_of_an_earlier_version_knows_nothing_of_experts_on_the_cpu() -> None:
    before = replace(PROFILE, host=replace(PROFILE.host, experts=()))
    assert MeasuredRates(PROFILE).knows_cpu_experts and PROFILE.is_complete
    assert not MeasuredRates(before).knows_cpu_experts and not before.is_complete
