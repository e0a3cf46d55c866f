"""On which memory node a GPU hangs."""

from __future__ import annotations

from pathlib import Path

_SYS = Path("/sys")


def gpu_node(address: str, sys: Path = _SYS) -> int | None:
    """The node of a GPU's slot; None where there is one node only or the system does not say.

    Args:
        address: as `gpu_memory.pci_bus_id` gives it, such as ``00000000:65:00.0``.
        sys: where the kernel's files are.
    """
    if len(list((sys / "devices/system/node").glob("node[0-9]*"))) < 2:
        return None
    domain, _, rest = address.lower().partition(":")
    file = sys / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node"
    try:
        node = int(file.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
