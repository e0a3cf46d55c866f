from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import PRESETS, preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.operators import decode_attention, experts
from moe_lightning.perf.roofline import HierarchicalRoofline, Level, Roof, gpu_over_host, host_over_disk

# Round numbers: 100 TFLOP/s and 1 TB/s above, 1 TFLOP/s and 100 GB/s below, 20 GB/s between.
ROUND = HierarchicalRoofline(Level("gpu", 100e12, 1e12), Level("cpu", 1e12, 100e9), 20e9)
MIXTRAL = resolve("mixtral-8x7b")
H, I, E, K = 4096, 14336, 8, 2  # noqa: E741  the letters of the formulas

rates = st.floats(1e9, 1e15)
intensities = st.floats(1e-3, 1e6)
rooflines = st.builds(
    HierarchicalRoofline,
    st.builds(Level, st.just("i"), rates, rates),
    st.builds(Level, st.just("j"), rates, rates),
    rates,
)


# -- equations by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intensity_i", "intensity_j", "flops", "roof"),
    [
        (1000, 100_000, 100e12, Roof.COMPUTE),
        (10, 100_000, 10e12, Roof.MEMORY),
        (1000, 10, 200e9, Roof.LINK),
        (10, 499, 9.98e12, Roof.LINK),
        (10, 501, 10e12, Roof.MEMORY),
    ],
)
def test_a_fetched_computation_attains_the_least_of_three_roofs(
    intensity_i: float, intensity_j: float, flops: float, roof: Roof
) -> None:
    assert ROUND.attainable(intensity_i, intensity_j) == pytest.approx(flops)
    assert ROUND.bound(intensity_i, intensity_j) is roof


@pytest.mark.parametrize(("intensity", "flops"), [(0, 0.0), (1, 100e9), (10, 1e12), (50, 1e12)])
def test_without_a_fetch_memory_and_compute_are_the_roofs(intensity: float, flops: float) -> None:
    assert ROUND.lower.attainable(intensity) == flops
    assert ROUND.lower.ridge == 10


def test_turning_points_and_balance_are_where_two_roofs_meet() -> None:
    assert ROUND.turning_point_1 == 50  # 20 GB/s x 50 = 1 TFLOP/s
    assert ROUND.turning_point_2(10) == 500  # 20 GB/s x 500 = 1 TB/s x 10
    assert (
        ROUND.turning_point_2(1000) == ROUND.turning_point_2(math.inf) == 5000
    )  # 20 GB/s x 5000 = 100 TFLOP/s
    assert ROUND.balance_point(10) == 500
    assert ROUND.balance_point(1000) == 50_000  # beyond P2: the computation is the bound before


def test_a_disk_computes_nothing_and_is_its_own_link() -> None:
    model = host_over_disk(preset("h100-sxm"), "bfloat16", 5e9)
    assert model.turning_point_1 == 0
    assert model.lower.attainable(100) == 0
    assert model.is_fetch_worthwhile(4, 4)
    assert model.attainable(4, 4) == 20e9
    assert model.turning_point_2(math.inf) == 1.5e12 / 5e9


def test_the_rates_of_a_machine_are_its_presets() -> None:
    model = gpu_over_host(preset("l4"), "bfloat16")
    assert (model.upper.flops, model.upper.bandwidth) == (121e12, 300e9)
    assert (model.lower.flops, model.lower.bandwidth) == (1.6e12, 76 * 2**30)
    assert model.link == 25.5e9


# -- what must hold of any two levels ----------------------------------------------------------------------


@given(rooflines, intensities, intensities, st.floats(1, 100))
def test_nothing_attains_less_on_a_faster_machine_or_at_a_higher_intensity(
    model: HierarchicalRoofline, intensity_i: float, intensity_j: float, factor: float
) -> None:
    before = model.attainable(intensity_i, intensity_j)
    upper = model.upper
    faster = (
        replace(model, upper=replace(upper, flops=upper.flops * factor)),
        replace(model, upper=replace(upper, bandwidth=upper.bandwidth * factor)),
        replace(model, link=model.link * factor),
    )
    assert all(m.attainable(intensity_i, intensity_j) >= before for m in faster)
    assert model.attainable(intensity_i * factor, intensity_j) >= before
    assert model.attainable(intensity_i, intensity_j * factor) >= before


@given(rooflines, intensities, st.floats(0.001, 0.999))
def test_below_p1_no_fetch_pays_however_fast_the_upper_level_is(
    model: HierarchicalRoofline, intensity_i: float, share: float
) -> None:
    assert not model.is_fetch_worthwhile(intensity_i, share * model.turning_point_1)


@given(rooflines, intensities, st.floats(1.001, 1000))
def test_above_p1_a_fetch_pays_if_the_upper_level_is_the_faster(
    model: HierarchicalRoofline, intensity_i: float, factor: float
) -> None:
    intensity_j = factor * (model.turning_point_1 or 1.0)
    assume(model.upper.attainable(intensity_i) > model.lower.attainable(intensity_j))
    assert model.is_fetch_worthwhile(intensity_i, intensity_j)


@given(rooflines, intensities)
def test_p1_is_left_of_p2_where_the_upper_level_attains_more_than_the_lower_can(
    model: HierarchicalRoofline, intensity_i: float
) -> None:
    assume(model.link <= model.lower.bandwidth)
    attained = min(model.upper.flops, model.upper.bandwidth * intensity_i)
    assume(attained != pytest.approx(model.lower.flops))
    is_left = model.turning_point_1 < model.turning_point_2(intensity_i)
    assert is_left == (attained > model.lower.flops)


@given(rooflines, intensities, st.floats(0.001, 0.999), st.floats(1.001, 1000))
def test_the_link_is_the_bound_left_of_p2_and_nowhere_else(
    model: HierarchicalRoofline, intensity_i: float, share: float, factor: float
) -> None:
    p2 = model.turning_point_2(intensity_i)
    assert model.bound(intensity_i, share * p2) is Roof.LINK
    assert model.bound(intensity_i, factor * p2) is not Roof.LINK
    assert model.attainable(intensity_i, factor * p2) == model.upper.attainable(intensity_i)


@given(rooflines, intensities)
def test_the_balance_point_is_p2_unless_the_computation_is_the_bound(
    model: HierarchicalRoofline, intensity_i: float
) -> None:
    balance = model.balance_point(intensity_i)
    assert model.upper.bandwidth * intensity_i == pytest.approx(model.link * balance)
    if intensity_i < 0.999 * model.upper.ridge:
        assert balance == pytest.approx(model.turning_point_2(intensity_i))
    elif intensity_i > 1.001 * model.upper.ridge:
        assert balance > model.turning_point_2(intensity_i)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused_with_its_name_and_value(rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"link bandwidth is {rate}; give a positive number"):
        replace(ROUND, link=rate)
    with pytest.raises(ConfigError, match=rf"gpu bandwidth is {rate}"):
        replace(ROUND.upper, bandwidth=rate)
    if rate != 0:
        with pytest.raises(ConfigError, match=rf"gpu flops is {rate}"):
            replace(ROUND.upper, flops=rate)


# -- operators ---------------------------------------------------------------------------------------------


def test_attention_over_512_tokens_has_the_intensities_counted_by_hand() -> None:
    found = decode_attention(MIXTRAL, "bfloat16", 512)
    flops = 2 * (2 * 512 * 4096)  # q k and p v of 32 heads of 128
    gpu = 2 * (511 * 2 * 1024 + (4096 + 2 * 1024) + 4096)  # cached K and V; q, k, v; output
    assert found.gpu_intensity == pytest.approx(flops / gpu)
    assert found.host_intensity == pytest.approx(flops / (gpu + 2 * 2 * 1024))  # appended K and V
    assert 3.8 < found.host_intensity < 4


def test_a_batch_of_sequences_has_the_intensity_of_one_and_a_window_that_of_its_length() -> None:
    short = decode_attention(MIXTRAL, "bfloat16", 4096)
    windowed = replace(MIXTRAL, attention=replace(MIXTRAL.attention, sliding_window=4096))
    assert replace(decode_attention(windowed, "bfloat16", 30_000), size=4096) == short


def test_experts_have_the_intensities_counted_by_hand() -> None:
    found = experts(MIXTRAL, "bfloat16", 128, 1024)
    weights, per_batch = (
        2 * 3 * E * H * I,
        2 * 3 * 128 * H,
    )  # read in; of the input, and the residual stream twice
    assert found.flops == 1024 * 2 * 3 * K * H * I
    assert found.gpu_intensity == pytest.approx(found.flops / (8 * (weights + per_batch)))
    assert found.host_intensity == pytest.approx(found.flops / weights)
    assert experts(MIXTRAL, "bfloat16", 128, 1024, streamed=0.5).host_intensity == 2 * found.host_intensity


def test_micro_batches_decide_the_intensity_on_the_gpu_and_the_pass_that_on_the_host() -> None:
    one, many = experts(MIXTRAL, "bfloat16", 64), experts(MIXTRAL, "bfloat16", 64, 640)
    assert many.gpu_intensity == one.gpu_intensity
    assert many.host_intensity == pytest.approx(10 * one.host_intensity)


@pytest.mark.parametrize("name", PRESETS)
def test_decode_attention_of_mixtral_belongs_on_the_cpu_of_every_machine(name: str) -> None:
    model = gpu_over_host(PRESETS[name], "float16")
    for context in (16, 512, 8192):
        attention = decode_attention(MIXTRAL, "float16", context)
        assert attention.host_intensity < model.turning_point_1
        assert not model.is_fetch_worthwhile(attention.gpu_intensity, attention.host_intensity)


def test_the_artifacts_batch_is_as_near_to_balance_as_its_memory_lets_it() -> None:
    # Its GPU memory is 285 / 16 = 17.8 times as fast as its link: 14 micro-batches wait for the link, 18 would not.
    model = gpu_over_host(preset("paper-s2"), "float16")
    bounds = []
    for count in (14, 17, 18):
        batch = experts(MIXTRAL, "float16", 324, 324 * count)
        bounds.append(model.bound(batch.gpu_intensity, batch.host_intensity))
    assert bounds == [Roof.LINK, Roof.LINK, Roof.MEMORY]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0,), "micro_batch_size=0"),
        ((8, 4), "num_tokens=4: give a multiple of micro_batch_size=8"),
        ((8, 20), "num_tokens=20"),
        ((8, 16, 0.0), r"streamed=0\.0"),
        ((8, 16, math.nan), "streamed=nan"),
    ],
)
def test_experts_that_are_none_are_refused(values: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experts(MIXTRAL, "bfloat16", *values)


def test_a_context_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_len=0"):
        decode_attention(MIXTRAL, "bfloat16", 0)
