"""A machine as data: what its GPU, its host and the link between them can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moe_lightning.errors import ConfigError


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU, or the CPUs of a host.

    Attributes:
        name: what its maker calls it.
        memory_bytes: all of its memory; drivers and ECC take a part of a GPU's.
        bandwidth: bytes/s of that memory.
        flops: FLOP/s of dense matrix products by dtype, accumulated in float32.
        num_cores: CPU cores; 0 for a GPU.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    num_cores: int = 0

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s in a dtype.

        Raises:
            ConfigError: the device has no rate for it.
        """
        if dtype not in self.flops:
            raise ConfigError(f"{self.name} has no rate for dtype {dtype!r}; use {' or '.join(self.flops)}")
        return self.flops[dtype]


@dataclass(frozen=True)
class HardwareSpec:
    """A machine with one GPU.

    Attributes:
        gpu: the GPU.
        cpu: cores and memory that its host gives to the job.
        h2d: bytes/s from pinned host memory to the GPU, as achieved by large copies.
        d2h: bytes/s the other way.
        launch_s: seconds that a task takes beside its work: launch, and handing over between lanes.
        sources: where the numbers are from.
    """

    gpu: DeviceSpec
    cpu: DeviceSpec
    h2d: float
    d2h: float
    launch_s: float
    sources: tuple[str, ...]

    def scaled(self, host_memory: float, flops: float, memory: float) -> HardwareSpec:
        """The machine with shares of its host memory's, its GPU's FLOP/s and its GPU memory's rates."""
        products = {dtype: flops * rate for dtype, rate in self.gpu.flops.items()}
        gpu = replace(self.gpu, bandwidth=memory * self.gpu.bandwidth, flops=products)
        return replace(self, gpu=gpu, cpu=replace(self.cpu, bandwidth=host_memory * self.cpu.bandwidth))
