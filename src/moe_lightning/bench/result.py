"""One measured kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_lightning.bench.timing import Roofs


@dataclass(frozen=True)
class Measurement:
    """What a kernel did, how long it took and what the same work takes elsewhere.

    Attributes:
        kernel: name of the operation, with its part where it has parts.
        model: whose shapes.
        num_tokens: T.
        seconds: of one call.
        flops: floating-point operations of one call.
        num_bytes: least bytes through the GPU's memory.
        error: relative error against float32.
        peers: seconds of others' implementations of the same work.
    """

    kernel: str
    model: str
    num_tokens: int
    seconds: float
    flops: float
    num_bytes: float
    error: float | None = None
    peers: dict[str, float] = field(default_factory=dict)

    def to_json(self, roofs: Roofs) -> dict[str, Any]:
        """All fields, the rates and their shares of the roofs."""
        return asdict(self) | {
            "flops_per_s": self.flops / self.seconds,
            "bytes_per_s": self.num_bytes / self.seconds,
            "share_of_flops": self.flops / self.seconds / roofs.flops,
            "share_of_bandwidth": self.num_bytes / self.seconds / roofs.bandwidth,
        }


def to_table(measurements: Iterable[Measurement], roofs: Roofs) -> str:
    """A line for each, for people."""
    lines = [
        f"{'kernel':18} {'model':14} {'tokens':>6} {'us':>9} {'TFLOP/s':>8} {'roof':>5} {'GB/s':>6} {'roof':>5} "
        f"{'error':>8}  peers: us (ours is x times as fast)"
    ]
    for m in measurements:
        values = m.to_json(roofs)
        peers = ", ".join(f"{name} {s * 1e6:.0f} ({s / m.seconds:.2f}x)" for name, s in m.peers.items())
        error = "" if m.error is None else f"{m.error:.1e}"
        lines.append(
            f"{m.kernel:18} {m.model:14} {m.num_tokens:6} {m.seconds * 1e6:9.1f} "
            f"{values['flops_per_s'] / 1e12:8.1f} {values['share_of_flops']:5.0%} "
            f"{values['bytes_per_s'] / 1e9:6.0f} {values['share_of_bandwidth']:5.0%} {error:>8}  {peers}"
        )
    return "\n".join(lines)
