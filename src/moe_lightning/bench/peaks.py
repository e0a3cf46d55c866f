"""The most memory that the process has held, as driver and system count it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lightning.engine.gpu_budget import context_bytes
from moe_lightning.hardware.gpu_memory import device_bytes, pci_bus_id, process_bytes

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Peaks:
    """Bytes.

    Attributes:
        gpu: that the driver reports of the process, context and kernels included; None without a GPU.
        gpu_allowed: by the user; None for all there is.
        host: resident at most.
        host_before: resident before weights and KV: the interpreter, libraries and the GPU's context.
        host_planned: that the plan says weights, KV and the engine take.
    """

    gpu: int | None
    gpu_allowed: int | None
    host: int
    host_before: int
    host_planned: int

    @property
    def is_gpu_within(self) -> bool:
        """The GPU's is no more than allowed."""
        return self.gpu is None or self.gpu_allowed is None or self.gpu <= self.gpu_allowed

    @property
    def is_host_within(self) -> bool:
        """What came to the host's is no more than planned."""
        return self.host - self.host_before <= self.host_planned


class PeakWatch:
    """Looks at what the process holds; torch keeps what it took on the GPU: a look at each pass misses nothing.

    Args:
        host_before: bytes resident before weights and KV; default: now.
    """

    def __init__(self, host_before: int | None = None) -> None:
        with suppress(OSError):  # without this the peak is that since the process began
            (_PROC / "clear_refs").write_text("5")
        self.host_before = resident_bytes() if host_before is None else host_before
        self._gpu = 0
        has_gpu = torch.cuda.is_available()
        self._address = pci_bus_id(torch.cuda.current_device()) if has_gpu else ""
        self._others = self._held_by_others() if has_gpu else 0

    def look(self) -> None:
        """Remember what the process holds on the GPU, if that is more than before."""
        if self._address:
            self._gpu = max(self._gpu, self._held())

    def peaks(self, gpu_allowed: int | None, host_planned: int) -> Peaks:
        """What was seen."""
        self.look()
        gpu = self._gpu if self._address else None
        return Peaks(gpu, gpu_allowed, _status("VmHWM"), self.host_before, host_planned)

    def _held(self) -> int:
        held = process_bytes(self._address)
        if held is not None:
            return held
        used = device_bytes(self._address)
        if used is None:
            return torch.cuda.memory_reserved() + context_bytes(torch.device("cuda", 0))
        return used[0] - self._others

    def _held_by_others(self) -> int:
        """On the whole GPU, where the driver does not tell processes apart."""
        used = device_bytes(self._address)
        if used is None:
            return 0
        own = torch.cuda.memory_reserved() + context_bytes(torch.device("cuda", 0))
        return max(0, used[0] - own) if torch.cuda.is_initialized() else used[0]


def resident_bytes() -> int:
    """Of this process, now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
