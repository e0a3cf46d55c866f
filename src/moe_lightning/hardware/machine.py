"""What a machine is, as far as it changes how fast something runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GpuIdentity:
    """One GPU and what drives it."""

    name: str
    uuid: str
    memory_bytes: int
    driver: str
    cuda: str
    triton: str


@dataclass(frozen=True)
class Machine:
    """A machine as one process sees it.

    Attributes:
        cpu: name of the model.
        cores: that the process may use.
        threads: that torch computes with on the CPU.
        isa: instruction set of the CPU's kernels.
        host_memory_bytes: of the system or the container, used or not.
        kernels: version of this package and what its kernels' files are.
        torch: its version.
        gpu: None where there is none.
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    host_memory_bytes: int
    kernels: str
    torch: str
    gpu: GpuIdentity | None


def changes(before: Machine, now: Machine) -> list[str]:
    """What differs between two machines, as ``driver was 550.1 and is 560.2``."""
    old, new = dict(_flat(asdict(before))), dict(_flat(asdict(now)))
    names = dict.fromkeys((*old, *new))
    return [
        f"{name} was {old.get(name, 'none')} and is {new.get(name, 'none')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        elif value is not None:
            yield prefix + name.replace("_", " "), value
