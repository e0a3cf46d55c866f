"""Profiles as values: JSON, what is refused, what a cost model asks."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.profile import PROFILE_VERSION, Profile
from moe_lightning.models.registry import resolve
from moe_lightning.perf.shape import shape_of
from profiles import CPU_PROFILE, LINK, MIXTRAL, PROFILE, QWEN, attention


def as_json(profile: Profile) -> dict[str, Any]:
    """Values as a file would give them back."""
    return json.loads(json.dumps(profile.to_json(), allow_nan=False))


def changed(path: str, value: Any) -> dict[str, Any]:
    """The profile's values with one replaced, or removed where the value is `...`."""
    values = as_json(PROFILE)
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner: Any = values
    for part in parts:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return values


@pytest.mark.parametrize("profile", [PROFILE, CPU_PROFILE], ids=["gpu", "cpu"])
def test_json_gives_the_same_profile_back(profile: Profile) -> None:
    assert Profile.from_json(as_json(profile)) == profile


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_is_no_object_is_refused(values: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"my\.json holds no JSON object; give a file that `moe-lightning profile"
    ):
        Profile.from_json(values, "my.json")


@pytest.mark.parametrize("version", [0, PROFILE_VERSION + 1, "1", True, None])
def test_another_version_is_refused_with_both(version: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"my\.json: version is {version!r}, not {PROFILE_VERSION}; give a file"
    ):
        Profile.from_json(changed("version", version), "my.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("more", 1, "more is not known; known are machine, created"),
        ("gpu.link.speed", 1, r"gpu\.link\.speed is not known; known are is_pinned"),
        ("gpu.lanes.gpu_gap_s", ..., r"gpu\.lanes\.gpu_gap_s is missing"),
        ("host", ..., "host is missing"),
        ("host", 5, "host is 5; it must be an object"),
        ("host.read", -1.0, r"host\.read is -1\.0; it must be a number above 0"),
        ("host.read", 0, r"host\.read is 0; it must be a number above 0"),
        ("host.read", math.nan, r"host\.read is nan; it must be a number above 0"),
        ("host.read", math.inf, r"host\.read is inf; it must be a number above 0"),
        ("host.read", True, r"host\.read is True; it must be a number above 0"),
        ("host.read", "fast", r"host\.read is 'fast'; it must be a number above 0"),
        ("host.read", None, r"host\.read is None; it must be a number above 0"),
        ("host.flops.bfloat16", -2.0, r"host\.flops\.bfloat16 is -2\.0; it must be a number above 0"),
        ("host.flops.float32", ..., r"host\.flops has bfloat16; it must have float32"),
        ("host.attention.1.rate.rates.0", 0.0, r"host\.attention\[1\]\.rate\.rates\[0\] is 0\.0"),
        ("host.attention", {}, r"host\.attention is {}; it must be a list"),
        ("gpu.dense.0.times.sizes.1", 1, r"gpu\.dense\[0\]\.times: sizes\[1\] is 1\.0 after 1\.0; sizes must rise"),
        ("gpu.dense.0.times.seconds", [1.0], r"gpu\.dense\[0\]\.times: 2 sizes and 1 seconds"),
        ("gpu.dense.0.inputs", 2.5, r"gpu\.dense\[0\]\.inputs is 2\.5; it must be an integer above 0"),
        ("gpu.experts.0.shape.top_k", 0, r"gpu\.experts\[0\]\.shape\.top_k is 0; it must be an integer above 0"),
        ("gpu.link.is_pinned", 1, r"gpu\.link\.is_pinned is 1; it must be true or false"),
        ("machine.cpu", 7, r"machine\.cpu is 7; it must be a text"),
        ("machine.gpu", None, r"gpu and machine\.gpu must be there both or neither"),
        ("gpu", None, r"gpu and machine\.gpu must be there both or neither"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_path_with_the_remedy(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"my\.json: {message}.*; give a file that `moe-lightning profile"):
        Profile.from_json(changed(path, value), "my.json")


def test_the_values_that_are_changed_above_are_those_of_a_profile_that_is_accepted() -> None:
    values = as_json(PROFILE)
    assert Profile.from_json(copy.deepcopy(values)) == PROFILE


def test_the_machine_as_a_datasheet_has_what_was_measured() -> None:
    spec = PROFILE.hardware_spec()
    assert spec.gpu.name == "A GPU"
    assert spec.gpu.bandwidth == 3e12
    assert spec.gpu.peak_flops("bfloat16") == 7.9e14
    assert spec.cpu.bandwidth == 96e9, "what is left beside copies"
    assert spec.cpu.peak_flops("bfloat16") == 1.5e12, "attention computes in float32"
    assert (spec.h2d, spec.d2h) == (2**26 / 1.22e-3, 2**26 / 1.23e-3)
    assert spec.launch_s == pytest.approx((2 * 6e-6 + 4e-5) / 4)
    assert all("2026-01-02" in source for source in spec.sources)


def test_a_machine_without_a_gpu_has_no_datasheet_of_one() -> None:
    with pytest.raises(
        ConfigError, match=r"without a GPU \(A CPU\); profile one that has a GPU, or name a preset"
    ):
        CPU_PROFILE.hardware_spec()


def test_copies_beside_attention_are_no_part_of_the_rates_alone() -> None:
    a = attention(32, 8)
    kv_bytes = 1e9
    alone = a.seconds(1024, 512, kv_bytes, num_kv_heads=8, under_copies=False)
    beside = a.seconds(1024, 512, kv_bytes, num_kv_heads=8, under_copies=True)
    assert alone == pytest.approx(4e-4 + kv_bytes / 80e9)
    assert beside == pytest.approx(4e-4 + kv_bytes / 72e9)
    unknown = replace(a, rate_under_copies=None)
    assert unknown.seconds(1024, 512, kv_bytes, num_kv_heads=8, under_copies=True) == alone


def test_a_sequence_costs_in_proportion_to_its_kv_heads() -> None:
    a = attention(32, 4)
    more = a.seconds(1024, 512, 1e9, num_kv_heads=16, under_copies=False)
    assert more == pytest.approx(4 * 4e-4 + 1e9 / 80e9)


def test_attention_of_another_model_takes_the_numbers_of_as_many_queries_for_each_kv_head() -> None:
    assert PROFILE.host.attention_like(64, 8, 128, "bfloat16").num_kv_heads == 4
    assert PROFILE.host.attention_like(24, 8, 128, "bfloat16").num_kv_heads == 8
    assert PROFILE.host.attention_like(12, 12, 64, "float16").num_kv_heads == 32


def test_measured_experts_take_what_was_measured() -> None:
    found = PROFILE.gpu.experts_like(QWEN, "bfloat16")
    assert found.shape == QWEN
    assert found.seconds(QWEN, 8192) == pytest.approx(1.4e-3)


@settings(deadline=None)
@given(st.sampled_from([64, 300, 8192, 20000]), st.sampled_from([2, 4]))
def test_experts_that_are_larger_take_longer_in_proportion_to_their_flops(tokens: int, factor: int) -> None:
    wide = replace(MIXTRAL, intermediate_size=MIXTRAL.intermediate_size * factor)
    found = PROFILE.gpu.experts_like(wide, "bfloat16")
    assert found.shape == MIXTRAL
    assert found.seconds(wide, tokens) == pytest.approx(factor * found.seconds(MIXTRAL, tokens))


def test_twice_as_many_experts_with_as_many_rows_each_take_twice_as_long() -> None:
    many = replace(MIXTRAL, num_experts=16)
    found = PROFILE.gpu.experts_like(many, "bfloat16")
    assert found.seconds(many, 1024) == pytest.approx(2 * found.seconds(MIXTRAL, 512))


def test_a_product_takes_the_rates_of_the_one_nearest_in_size() -> None:
    found = PROFILE.gpu.dense_like(4096, 30000, "bfloat16")
    assert found.name.startswith("head")
    assert found.seconds(4096, 16000, 512) == pytest.approx(3e-4 / 2)


def test_a_large_copy_that_was_disturbed_is_as_fast_as_a_smaller_one() -> None:
    """Else pages would be predicted faster beside attention than alone."""
    assert PROFILE.gpu
    link = PROFILE.gpu.link
    slow = replace(link.h2d, seconds=(*link.h2d.seconds[:-1], 2 * link.h2d.seconds[-1]))
    found = replace(link, h2d=slow)
    last, before = link.h2d.sizes[-1], link.h2d.sizes[-2]
    assert found.fastest_h2d == pytest.approx(link.h2d.rate_at(before))
    assert found.to_gpu.seconds_at(last) == pytest.approx(last / link.h2d.rate_at(before))
    assert found.to_gpu.seconds[:-1] == pytest.approx(link.h2d.seconds[:-1])
    assert link.to_gpu.seconds == pytest.approx(link.h2d.seconds), "nothing was disturbed there"


def test_attention_over_kv_on_the_gpu_is_that_of_the_nearest_geometry() -> None:
    assert PROFILE.gpu
    (one,) = PROFILE.gpu.decode
    other = replace(one, num_kv_heads=4)
    gpu = replace(PROFILE.gpu, decode=(one, other))
    assert gpu.decode_like(32, 4, 128, "bfloat16") == other
    assert gpu.decode_like(32, 8, 128, "bfloat16") == one


def test_prefill_attention_takes_its_flops_at_the_rate_of_the_prompts_length() -> None:
    found = PROFILE.gpu.prefill_like(32, 8, 128, "bfloat16")
    assert found.seconds(4096, 4e14) == pytest.approx(1.0)


def test_what_was_not_measured_at_all_is_an_error_and_no_guess() -> None:
    with pytest.raises(ConfigError, match="no measurement of experts; measure again"):
        replace(PROFILE.host, experts=()).experts_like(MIXTRAL, "bfloat16")


def test_a_models_shape_is_found_whatever_its_name_and_pages() -> None:
    shape = shape_of(resolve("mixtral-8x7b"), "mine")
    assert replace(shape, name=MIXTRAL.name) == MIXTRAL
    assert PROFILE.has(shape)
    assert CPU_PROFILE.has(shape)
    assert not CPU_PROFILE.has(QWEN)
    assert not PROFILE.has(shape_of(resolve("mixtral-8x22b"), "mixtral-8x7b"))


def test_tokens_that_choose_at_random_meet_at_most_all_experts() -> None:
    assert MIXTRAL.experts_met(1) == pytest.approx(2)
    assert QWEN.experts_met(1) == pytest.approx(8)
    assert QWEN.experts_met(10**6) == pytest.approx(128)


def test_a_link_has_the_rates_of_its_largest_copies() -> None:
    assert LINK.h2d.rate_at(2**28) == pytest.approx(2**26 / 1.22e-3)
