"""Machines that can be planned for without being there.

GPU rates are the datasheets' peaks, dense and at boost clock: bounds, not expectations. Link rates are what
large copies from pinned memory achieve. Hosts are typical ones for the GPU; `dataclasses.replace` swaps them.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.spec import DeviceSpec, HardwareSpec
from moe_lightning.units import GIB

# A kernel launch takes about 5 us, waking the thread of another lane some 10 us.
_LAUNCH_S = 15e-6

# PCIe x16, one direction: theoretical 15.8, 31.5 and 63.0 GB/s, less what packet headers take.
_PCIE3, _PCIE4, _PCIE5 = 12.5e9, 25.5e9, 55.2e9
_PCIE_SOURCE = "link: usual result of large pinned copies over PCIe {} x16"


def _host(name: str, cores: int, memory_gib: int, bandwidth: float, flops: float) -> DeviceSpec:
    """A host whose attention kernel computes in float32 whatever the KV's dtype."""
    rates = dict.fromkeys(("bfloat16", "float16", "float32"), flops)
    return DeviceSpec(name, memory_gib * GIB, bandwidth, rates, cores)


_XEON_24 = _host("Xeon, 24 cores", 24, 192, 76 * GIB, 1.6e12)
_XEON_24_SOURCE = (
    "host: size of the paper's machines (arXiv 2411.11217), rates that its artifact assumes for them"
)
# As the artifact's printed example has it: what is left of 192 GiB, it seems, in a virtual machine.
_XEON_24_PRINTED = replace(_XEON_24, memory_bytes=197_880_360_960)
_EPYC_16 = _host("EPYC, 16 cores", 16, 128, 50e9, 1.2e12)
_EPYC_16_SOURCE = "host: estimate for 16 cores of a larger EPYC (AVX2, a quarter of 8 channels DDR4-3200)"
_DESKTOP = _host("desktop, 16 cores", 16, 128, 60e9, 1.5e12)
_DESKTOP_SOURCE = "host: estimate for a desktop with two channels of DDR5 (peak 90 GB/s)"
_XEON_16 = _host("Xeon with AVX-512, 16 cores", 16, 125, 96e9, 1.5e12)
_XEON_16_SOURCE = "host: measured on 16 cores; memory rate while a copy to the GPU runs, float32 products"


def _gpu(name: str, memory_gib: int, bandwidth: float, half: float, single: float) -> DeviceSpec:
    return DeviceSpec(
        name, memory_gib * GIB, bandwidth, {"bfloat16": half, "float16": half, "float32": single}
    )


PRESETS: dict[str, HardwareSpec] = {
    "t4": HardwareSpec(
        # Turing has no bfloat16: a plan for it must say so and not give a rate that nobody gets.
        DeviceSpec("NVIDIA T4", 16 * GIB, 300e9, {"float16": 65e12, "float32": 8.1e12}),
        _XEON_24, _PCIE3, _PCIE3, _LAUNCH_S,
        ("GPU: NVIDIA T4 datasheet (2019)", _XEON_24_SOURCE, _PCIE_SOURCE.format(3)),
    ),
    "l4": HardwareSpec(
        _gpu("NVIDIA L4", 24, 300e9, 121e12, 30.3e12),
        _XEON_24, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA L4 datasheet (2023), half of the sparse rates", _XEON_24_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    # The paper's setting S2 with the numbers of its artifact, to compare plans with those that it prints.
    "paper-s2": HardwareSpec(
        _gpu("NVIDIA L4", 24, 285 * GIB, 104e12, 30.3e12),
        _XEON_24_PRINTED, 16.0 * GIB, 16.0 * GIB, _LAUNCH_S,
        ("GPU: the artifact of arXiv 2411.11217; float32 from the NVIDIA L4 datasheet (2023)",
         "host: the artifact of arXiv 2411.11217", "link: the artifact of arXiv 2411.11217"),
    ),
    "v100-16gb": HardwareSpec(
        # Volta has no bfloat16 either.
        DeviceSpec("NVIDIA V100 SXM2 16GB", 16 * GIB, 900e9, {"float16": 125e12, "float32": 15.7e12}),
        _XEON_24, _PCIE3, _PCIE3, _LAUNCH_S,
        ("GPU: NVIDIA V100 datasheet (2020)", _XEON_24_SOURCE, _PCIE_SOURCE.format(3)),
    ),
    "a10": HardwareSpec(
        _gpu("NVIDIA A10", 24, 600e9, 125e12, 31.2e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA A10 datasheet (2021)", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "a10g": HardwareSpec(
        _gpu("NVIDIA A10G", 24, 600e9, 70e12, 35e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA A10G datasheet (2021)", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    # GeForce cards advertise 16-bit products with sums in float16; with sums in float32 they are half as fast.
    "rtx-3090": HardwareSpec(
        _gpu("NVIDIA GeForce RTX 3090", 24, 936e9, 71e12, 35.6e12),
        _DESKTOP, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA Ampere GA102 GPU architecture whitepaper", _DESKTOP_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "rtx-4080": HardwareSpec(
        _gpu("NVIDIA GeForce RTX 4080", 16, 716.8e9, 97.5e12, 48.7e12),
        _DESKTOP, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA Ada GPU architecture whitepaper, appendix A", _DESKTOP_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "rtx-4090": HardwareSpec(
        _gpu("NVIDIA GeForce RTX 4090", 24, 1008e9, 165.2e12, 82.6e12),
        _DESKTOP, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA Ada GPU architecture whitepaper, appendix A", _DESKTOP_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "rtx-5090": HardwareSpec(
        _gpu("NVIDIA GeForce RTX 5090", 32, 1792e9, 209.5e12, 104.8e12),
        _DESKTOP, _PCIE5, _PCIE5, _LAUNCH_S,
        ("GPU: NVIDIA RTX Blackwell GPU architecture whitepaper", _DESKTOP_SOURCE,
         _PCIE_SOURCE.format(5)),
    ),
    "rtx-a6000": HardwareSpec(
        _gpu("NVIDIA RTX A6000", 48, 768e9, 154.8e12, 38.7e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA Ampere GA102 GPU architecture whitepaper", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "l40s": HardwareSpec(
        _gpu("NVIDIA L40S", 48, 864e9, 362.05e12, 91.6e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA L40S datasheet (2023)", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "a100-40gb": HardwareSpec(
        _gpu("NVIDIA A100 40GB", 40, 1555e9, 312e12, 19.5e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA A100 datasheet (2020)", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "a100-80gb": HardwareSpec(
        _gpu("NVIDIA A100 80GB SXM", 80, 2039e9, 312e12, 19.5e12),
        _EPYC_16, _PCIE4, _PCIE4, _LAUNCH_S,
        ("GPU: NVIDIA A100 datasheet (2021)", _EPYC_16_SOURCE, _PCIE_SOURCE.format(4)),
    ),
    "h100-pcie": HardwareSpec(
        _gpu("NVIDIA H100 PCIe", 80, 2000e9, 756e12, 51e12),
        _XEON_16, _PCIE5, _PCIE5, _LAUNCH_S,
        ("GPU: NVIDIA H100 datasheet (2023), half of the sparse rates",
         _XEON_16_SOURCE + ", beside an H100 SXM",
         _PCIE_SOURCE.format(5)),
    ),
    "h100-sxm": HardwareSpec(
        _gpu("NVIDIA H100 SXM", 80, 3350e9, 989.4e12, 66.9e12),
        _XEON_16, _PCIE5, _PCIE5, _LAUNCH_S,
        ("GPU: NVIDIA H100 datasheet (2023), half of the sparse rates", _XEON_16_SOURCE,
         "link: measured, pinned copies of 64 MiB over PCIe 5 x16"),
    ),
    "h200": HardwareSpec(
        _gpu("NVIDIA H200", 141, 4800e9, 989.4e12, 66.9e12),
        _XEON_16, _PCIE5, _PCIE5, _LAUNCH_S,
        ("GPU: NVIDIA H200 datasheet (2024), half of the sparse rates", _XEON_16_SOURCE + ", beside an H100 SXM",
         _PCIE_SOURCE.format(5)),
    ),
}  # fmt: skip

_ALIASES = {
    "s1": "t4", "s2": "l4", "v100": "v100-16gb", "3090": "rtx-3090", "rtx3090": "rtx-3090", "4080": "rtx-4080",
    "rtx4080": "rtx-4080", "4090": "rtx-4090", "rtx4090": "rtx-4090", "5090": "rtx-5090", "rtx5090": "rtx-5090",
    "a6000": "rtx-a6000", "a100": "a100-40gb", "h100": "h100-sxm",
}  # fmt: skip


def preset_of_card(card: str) -> HardwareSpec | None:
    """The preset of the GPU that a driver calls so, such as ``NVIDIA H100 80GB HBM3``; None for an unknown one."""
    words = card.lower().replace("-", " ").split()
    joined = ["-".join(words[i : i + n]) for n in (2, 1) for i in range(len(words))]
    key = next((_ALIASES.get(w, w) for w in joined if _ALIASES.get(w, w) in PRESETS), None)
    return None if key is None else PRESETS[key]


def preset(name: str) -> HardwareSpec:
    """The machine of a name such as `l4`; case does not matter.

    Raises:
        ConfigError: there is none of that name; the message lists near ones.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    key = _ALIASES.get(key, key)
    if key not in PRESETS:
        near = difflib.get_close_matches(key, (*PRESETS, *_ALIASES), n=3)
        names = list(dict.fromkeys(_ALIASES.get(n, n) for n in near))
        hint = f"did you mean {' or '.join(names)}?" if names else f"known are {', '.join(PRESETS)}"
        raise ConfigError(f"no hardware is named {name!r}; {hint}")
    return PRESETS[key]
