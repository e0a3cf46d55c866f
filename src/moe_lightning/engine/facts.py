"""What a step is to the planner."""

from __future__ import annotations

from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.predict import first_swept
from moe_lightning.pipeline.shape import layers_keeping_kv, layers_on_cpu
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import DecodeRow, PrefillPiece, Step


def pass_work(
    spec: ModelSpec,
    dtype: str,
    policy: Policy,
    step: Step,
    expert_parts: int = 1,
    streamed_pages: int | None = None,
) -> PassWork:
    """What the tasks of a step's pass work on; sequences are counted, not looked into."""
    window = spec.attention.sliding_window or spec.max_position
    chunks, groups = step.prefill, step.decode
    tokens = [sum(len(piece.token_ids) for piece in chunk) for chunk in chunks]
    keys = [sum(_keys(piece, window) for piece in chunk) for chunk in chunks]
    rows = [sum(len(piece.next_ids) + (piece.sampling is not None) for piece in chunk) for chunk in chunks]
    sizes = [len(members) for members in groups]
    keys += [_context(members, window) for members in groups]
    return PassWork(
        spec, dtype, policy.pages_per_expert, tuple(tokens + sizes), tuple(keys), tuple(rows + sizes), expert_parts,
        first_swept(len(chunks), len(chunks) + len(groups)) if policy.packed else None,
        policy.first_part_at_once, len(chunks), streamed_pages,
        len(layers_keeping_kv(policy)) / spec.num_layers, len(layers_on_cpu(policy)) / spec.num_layers,
    )  # fmt: skip


def mean_context(step: Step) -> float:
    """Tokens that a decoding sequence holds on average, the new one among them; 1 where none decodes."""
    positions = [row.position for members in step.decode for row in members]
    return 1 + sum(positions) / len(positions) if positions else 1.0


def _keys(piece: PrefillPiece, window: int) -> int:
    """Keys that a piece's tokens attend to: the i-th of a prompt to i, and to no more than the window."""
    start, count = piece.start, len(piece.token_ids)
    inside = min(max(0, window - start), count)  # tokens that attend to all of their past
    return inside * (2 * start + inside + 1) // 2 + (count - inside) * window


def _context(members: tuple[DecodeRow, ...], window: int) -> int:
    return sum(min(row.position + 1, window) for row in members)
