"""A profile on a GPU: complete, plausible, within its bounds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.hardware.profile import Profile
from moe_lightning.pipeline.task import Lane
from moe_lightning.profiling.effort import Effort
from moe_lightning.profiling.link import Copies, Link
from moe_lightning.profiling.measure import measure
from moe_lightning.units import GIB, KIB, MIB

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]
SHAPE = ModelShape("small", 1024, 512, 8, 2, 2, 8, 2, 128, 4096)
SMALL = Effort(
    point_s=0.01, gpu_point_s=0.005, host_bytes=512 * MIB, gpu_bytes=GIB, call_bytes=16 * MIB, pool_bytes=64 * MIB,
    copy_sizes=(64 * KIB, MIB, 16 * MIB), hop_sizes=(64 * KIB, MIB), contexts=(64, 500), num_seqs=(1, 64),
    geometries=((8, 2, 128),), tokens=(1, 64, 512), part_tokens=(512,), rows=(1, 64), prompts=(64, 500),
    chunk_tokens=(128, 512), gpu_product=2048, cpu_products=(256,), chain=24,
)  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def profile(reports) -> Profile:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    found = measure([SHAPE], SMALL, report=lambda *args: reports.append(args))
    assert torch.cuda.max_memory_reserved() - before <= SMALL.gpu_bytes
    return found


def test_every_part_is_reported_and_the_number_of_parts_was_known(profile, reports):
    total = reports[0][2]
    assert [(done, of) for _, done, of in reports] == [(done, total) for done in range(total)]


def test_it_goes_through_json_and_becomes_a_datasheet(profile):
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    spec = profile.hardware_spec()
    assert spec.gpu.bandwidth > spec.h2d
    assert 1e-6 < spec.launch_s < 1e-3


def test_the_link_is_slower_than_memory_and_small_copies_than_large_ones(profile):
    link = profile.gpu.link
    for curve in (link.h2d, link.d2h):
        assert 1e9 < curve.rate_at(16 * MIB) < 1e12
        assert curve.rate_at(64 * KIB) < curve.rate_at(16 * MIB)
        assert curve.rate_at(16 * MIB) < profile.gpu.memory
    best = link.h2d.best_rate
    for rate in (link.h2d_beside_d2h, link.d2h_beside_h2d, link.h2d_beside_attention):
        assert 0.1 * best < rate < 1.2 * best
    for found in profile.gpu.prefill:
        assert len(found.store.sizes) == 2
        assert all(1e-6 < seconds < 0.1 for seconds in found.store.seconds)


def test_lanes_take_microseconds(profile):
    lanes = profile.gpu.lanes
    launches = (lanes.gpu_launch_s, lanes.h2d_launch_s, lanes.d2h_launch_s, lanes.cpu_launch_s)
    gaps = (lanes.gpu_gap_s, lanes.h2d_gap_s, lanes.d2h_gap_s)
    for seconds in (*launches, *gaps, lanes.stream_handover_s, lanes.cpu_round_trip_s):
        assert 5e-7 < seconds < 2e-3, lanes
    for curve in (lanes.h2d_hop, lanes.d2h_hop):
        assert curve.seconds_at(MIB) > curve.seconds_at(64 * KIB) > 1e-6


def test_kernels_stay_below_the_roofs(profile):
    roof = profile.gpu.flops["bfloat16" if "bfloat16" in profile.gpu.flops else "float16"]
    experts = profile.gpu.experts[0]
    assert experts.times.sizes == SMALL.tokens
    for tokens, seconds in zip(experts.times.sizes, experts.times.seconds, strict=True):
        assert SHAPE.experts_flops_per_token * tokens / seconds < 2 * roof
    assert [part.share for part in experts.parts] == [1 / 8, 1 / 4]
    for part in experts.parts:
        assert part.times.sizes == (512,)
        whole = experts.times.seconds_at(512)
        assert 0.5 * part.share * whole < part.times.seconds_at(512) < 2 * whole
    for dense in profile.gpu.dense:
        assert 2 * 64 * dense.inputs * dense.outputs / dense.times.seconds_at(64) < 2 * roof
    assert all(rate < 2 * roof for rate in profile.gpu.prefill[0].rate.rates)


def test_small_kernels_take_microseconds(profile):
    assert profile.is_complete
    for times in (profile.gpu.small[0].pre_attention, profile.gpu.small[0].post_attention):
        assert times.sizes == SMALL.rows
        assert all(1e-6 < seconds < 1e-3 for seconds in times.seconds)


def test_attention_was_measured_beside_copies(profile):
    assert profile.gpu.link.is_pinned
    assert profile.host.read_under_copies
    assert all(a.rate_under_copies is not None for a in profile.host.attention)


def test_copies_go_on_until_they_are_no_longer_wanted():
    host = torch.randint(0, 255, (8, 16 * MIB), dtype=torch.uint8).pin_memory()
    link = Link(host, SMALL)
    copies = Copies(link, 16 * MIB, 10e9)
    with copies:
        copies.watch()
        for _ in range(20):
            copies.keep_up()
            torch.cuda._sleep(1_000_000)
        torch.cuda.synchronize()
        copies.watched()
    assert copies.rate_watched() > 1e9
    assert not copies._pending
    torch.cuda.synchronize()
    assert torch.equal(link._on_gpu[3].cpu(), host[3]) or torch.equal(link._on_gpu[3].cpu(), host[7])


def test_a_limit_that_is_too_low_is_refused_with_the_flag():
    with pytest.raises(NoFeasiblePolicyError, match="raise gpu_memory"):
        measure([SHAPE], replace(SMALL, gpu_bytes=4 * GIB), gpu_memory=64 * MIB)


def test_chains_of_tasks_run_as_they_were_made():
    from moe_lightning.profiling.lanes import LanesBench

    bench = LanesBench(SMALL)
    one_way = bench._held((Lane.GPU, Lane.H2D))
    both = bench._held((Lane.GPU, Lane.H2D, Lane.GPU, Lane.D2H))
    assert both == pytest.approx(2 * one_way, rel=1.0)
