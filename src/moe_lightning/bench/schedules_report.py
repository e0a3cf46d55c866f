"""The ablation as JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_lightning.bench.schedules import Row


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A dictionary for each row, with its ratios to the first one."""
    first = rows[0]
    return [
        {
            "name": row.variant.name, "what": row.variant.what, "variant": asdict(row.variant),
            "policy": asdict(row.policy), "num_seqs": row.num_seqs, "tokens_per_s": row.tokens_per_s,
            "ratio": row.tokens_per_s / first.tokens_per_s,
            "predicted_tokens_per_s": row.predicted_tokens_per_s,
            "predicted_ratio": row.predicted_tokens_per_s / first.predicted_tokens_per_s,
            "pass_s": row.pass_s, "predicted_pass_s": row.predicted_pass_s, "ramp_s": row.ramp_s,
            "lanes": asdict(row.lanes) if row.lanes else None, "memory": asdict(row.peaks),
            "passes": [asdict(p) for p in row.passes],
        }
        for row in rows
    ]  # fmt: skip


def to_text(rows: Sequence[Row]) -> str:
    """A table for people."""
    lines = [
        f"{'':12} {'tokens/s':>9} {'ratio':>6} {'predicted':>9} {'ratio':>6} {'pass s':>7} {'predicted':>9} "
        f"{'seqs':>5} experts  lanes busy"
    ]
    for row, values in zip(rows, to_json(rows), strict=True):
        use = row.lanes.use if row.lanes else {}
        busy = ", ".join(f"{lane.upper()} {lane_use.share:.0%}" for lane, lane_use in use.items())
        lines.append(
            f"{row.variant.name:12} {row.tokens_per_s:9.1f} {values['ratio']:6.2f} "
            f"{row.predicted_tokens_per_s:9.1f} {values['predicted_ratio']:6.2f} {row.pass_s:7.3f} "
            f"{row.predicted_pass_s:9.3f} {row.num_seqs:5} {'packed' if row.policy.packed else 'plain':7}  {busy}"
        )
    return "\n".join([*lines, "", *(f"{row.variant.name}: {row.variant.what}" for row in rows)])
