"""The Hierarchical Roofline Model: what a processor attains on data at its own memory level or at one below.

Source: "MoE-Lightning" (arXiv 2411.11217), section 3, equations 4 to 11. Its symbols: level i executes, level j
holds the data; P_peak FLOP/s and B_peak bytes/s of a level, B_peak^{j,i} bytes/s of the link between the two; I_x^i
FLOPs of computation x for each byte of level i that it touches. Any two levels will do: GPU over host, host over
disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.spec import HardwareSpec


class Roof(StrEnum):
    """What bounds a computation."""

    COMPUTE = "compute"  # equation 4
    MEMORY = "memory"  # equation 5
    LINK = "link"  # equation 6


@dataclass(frozen=True)
class Level:
    """A memory and the processor that computes from it.

    Attributes:
        name: for people.
        flops: P_peak, FLOP/s; 0 where nothing computes, as on a disk.
        bandwidth: B_peak, bytes/s.

    Raises:
        ConfigError: a rate is no finite positive number.
    """

    name: str
    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        _check_rate(f"{self.name} bandwidth", self.bandwidth)
        if self.flops != 0:
            _check_rate(f"{self.name} flops", self.flops)

    def attainable(self, intensity: float) -> float:
        """FLOP/s of a computation on data of this level: min(P_peak^i, B_peak^i I_x^i), equation 8."""
        return min(self.flops, self.bandwidth * intensity)

    @property
    def ridge(self) -> float:
        """FLOP/byte from which on the processor is the bound, not its memory."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class HierarchicalRoofline:
    """Two levels and the link from the lower to the upper one.

    Attributes:
        upper: level i, where a computation runs if its data is fetched.
        lower: level j, where the data lies.
        link: B_peak^{j,i}, bytes/s.

    Raises:
        ConfigError: a rate is no finite positive number.
    """

    upper: Level
    lower: Level
    link: float

    def __post_init__(self) -> None:
        _check_rate("link bandwidth", self.link)

    def roofs(self, intensity_i: float, intensity_j: float) -> dict[Roof, float]:
        """FLOP/s that each roof allows a computation at level i on data of level j: equations 4 to 6."""
        return {
            Roof.COMPUTE: self.upper.flops,  # (4) P_peak^i
            Roof.MEMORY: self.upper.bandwidth * intensity_i,  # (5) B_peak^i I_x^i
            Roof.LINK: self.link * intensity_j,  # (6) B_peak^{j,i} I_x^j
        }

    def attainable(self, intensity_i: float, intensity_j: float) -> float:
        """FLOP/s at level i with the data fetched from level j, the least of the three roofs: equation 7.

        Without a fetch it is `upper.attainable` or `lower.attainable`: equation 8.
        """
        return min(self.roofs(intensity_i, intensity_j).values())

    def bound(self, intensity_i: float, intensity_j: float) -> Roof:
        """The lowest roof over a computation with a fetch; of equal ones the first in `Roof`."""
        roofs = self.roofs(intensity_i, intensity_j)
        return min(roofs, key=roofs.__getitem__)

    def is_fetch_worthwhile(self, intensity_i: float, intensity_j: float) -> bool:
        """Whether level i, with a fetch, is faster than level j, where the data lies."""
        return self.attainable(intensity_i, intensity_j) > self.lower.attainable(intensity_j)

    @property
    def turning_point_1(self) -> float:
        """P1: the I_x^j, FLOP/byte, below which data is not worth moving: compute where it lies.

        Equation 9, I_x^j = min(P_peak^j, B_peak^j I_x^j) / B_peak^{j,i}, solved for I_x^j: there the link roof
        meets level j's roofline. That is on its compute roof, as a link is slower than the memory it reads; over a
        link that is faster, data is worth moving at any intensity, and P1 is 0.
        """
        return self.lower.flops / self.link if self.link <= self.lower.bandwidth else 0.0

    def turning_point_2(self, intensity_i: float) -> float:
        """P2: the I_x^j, FLOP/byte, below which the link is the bound and not level i.

        Equation 10: I_x^j = min(P_peak^i, B_peak^i I_x^i) / B_peak^{j,i}. It depends on the computation's I_x^i;
        with `math.inf` it is that of computations which level i's memory does not slow down.
        """
        return self.upper.attainable(intensity_i) / self.link

    def balance_point(self, intensity_i: float) -> float:
        """The I_x^j, FLOP/byte, at which fetching takes as long as level i's own memory.

        Equation 11: B_peak^i I_x^i = B_peak^{j,i} I_x^j. The planner raises I_x^j, by larger batches, until it is
        there or memory is full. It is P2 as long as the computation is no bound.
        """
        return self.upper.bandwidth * intensity_i / self.link


def gpu_over_host(hardware: HardwareSpec, dtype: str) -> HierarchicalRoofline:
    """The model of a machine's GPU memory and host memory.

    Raises:
        ConfigError: a device has no rate for the dtype.
    """
    gpu, cpu = hardware.gpu, hardware.cpu
    return HierarchicalRoofline(
        upper=Level(gpu.name, gpu.peak_flops(dtype), gpu.bandwidth),
        lower=Level(cpu.name, cpu.peak_flops(dtype), cpu.bandwidth),
        link=hardware.h2d,
    )


def host_over_disk(hardware: HardwareSpec, dtype: str, disk_bandwidth: float) -> HierarchicalRoofline:
    """The model of a machine's host memory and a disk, which is its own link: bytes/s.

    Raises:
        ConfigError: the CPUs have no rate for the dtype, or the disk no speed.
    """
    cpu = hardware.cpu
    return HierarchicalRoofline(
        upper=Level(cpu.name, cpu.peak_flops(dtype), cpu.bandwidth),
        lower=Level("disk", 0.0, disk_bandwidth),
        link=disk_bandwidth,
    )


def _check_rate(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; give a positive number")
