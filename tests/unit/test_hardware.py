from __future__ import annotations

import pytest

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import PRESETS, preset
from moe_lightning.units import GIB


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("L4", "l4"),
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("H100", "h100-sxm"),
        ("NVIDIA T4", "t4"),
        ("S1", "t4"),
        ("S2", "l4"),
        ("rtx5090", "rtx-5090"),
        ("V100", "v100-16gb"),
    ],
)
def test_a_preset_is_found_however_it_is_spelled(name: str, key: str) -> None:
    assert preset(name) is PRESETS[key]


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"'a100-40g'.*a100-40gb"):
        preset("a100-40g")


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        preset("zzzzzz")


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_has_a_source(name: str) -> None:
    sources = PRESETS[name].sources
    assert [source.split(":")[0] for source in sources] == ["GPU", "host", "link"]


@pytest.mark.parametrize("name", PRESETS)
def test_memory_is_faster_the_nearer_it_is_to_the_gpu(name: str) -> None:
    hardware = PRESETS[name]
    assert hardware.gpu.bandwidth > hardware.cpu.bandwidth > max(hardware.h2d, hardware.d2h)


@pytest.mark.parametrize(
    ("name", "theoretical"),
    [("t4", 15.754e9), ("v100-16gb", 15.754e9), ("l4", 31.508e9), ("a10", 31.508e9), ("a10g", 31.508e9),
     ("rtx-3090", 31.508e9), ("rtx-4080", 31.508e9), ("rtx-4090", 31.508e9), ("rtx-a6000", 31.508e9),
     ("l40s", 31.508e9), ("a100-40gb", 31.508e9), ("a100-80gb", 31.508e9), ("rtx-5090", 63.015e9),
     ("h100-pcie", 63.015e9), ("h100-sxm", 63.015e9),
     ("h200", 63.015e9)],
)  # fmt: skip
def test_links_are_given_as_achieved_not_as_theoretical(name: str, theoretical: float) -> None:
    for rate in (PRESETS[name].h2d, PRESETS[name].d2h):
        assert 0.75 * theoretical < rate < 0.9 * theoretical


def test_memory_sizes_are_those_on_the_box() -> None:
    sizes = {name: hardware.gpu.memory_bytes // GIB for name, hardware in PRESETS.items()}
    assert sizes == {
        "t4": 16, "l4": 24, "paper-s2": 24, "v100-16gb": 16, "a10": 24, "a10g": 24, "rtx-3090": 24, "rtx-4080": 16,
        "rtx-4090": 24, "rtx-5090": 32, "rtx-a6000": 48, "l40s": 48, "a100-40gb": 40, "a100-80gb": 80,
        "h100-pcie": 80, "h100-sxm": 80, "h200": 141,
    }  # fmt: skip


def test_a_dtype_without_a_rate_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"T4.*'bfloat16'.*float16 or float32"):
        preset("t4").gpu.peak_flops("bfloat16")


@pytest.mark.parametrize("name", PRESETS)
def test_only_cards_before_ampere_lack_bfloat16_and_all_have_float16(name: str) -> None:
    rates = PRESETS[name].gpu.flops
    assert ("bfloat16" in rates) == (name not in ("t4", "v100-16gb"))
    assert rates["float16"] > 1.9 * rates["float32"] > 0
