"""GPU memory that passes need beside weights and frames."""

from __future__ import annotations

from moe_lightning.models.spec import ModelSpec
from moe_lightning.units import MIB

EXPERTS_AT_ONCE = 8192  # tokens: enough that reading the weights costs nothing beside the arithmetic
HEAD_ROWS = 512  # rows of logits that exist at once: of a vocabulary of 128 k, 256 MiB in float32
_ENGINE = 512 * MIB  # requests, step arrays, readers of a checkpoint
_SMALL = 64 * MIB  # token ids, positions, tables, what the allocator rounds up


def host_buffer_bytes(spec: ModelSpec, dtype_bytes: int, num_seqs: int) -> int:
    """Bytes of host memory for the rows of decoding sequences, and what the engine keeps of requests."""
    a = spec.attention
    return num_seqs * (a.qkv_size + a.q_size) * dtype_bytes + _ENGINE


def activation_bytes(spec: ModelSpec, dtype_bytes: int, num_rows: int) -> int:
    """Bytes of the activations, the experts' workspace and the logits of passes of up to `num_rows` tokens."""
    a, e = spec.attention, spec.experts
    per_row = dtype_bytes * (2 * spec.hidden_size + a.qkv_size + a.q_size + e.num_experts) + 12 * e.top_k
    workspace = (
        min(num_rows, EXPERTS_AT_ONCE) * e.top_k * dtype_bytes * (spec.hidden_size + e.intermediate_size)
    )
    logits = HEAD_ROWS * spec.vocab_size * (dtype_bytes + 8)  # as computed, in float32, and a copy to change
    return num_rows * per_row + workspace + logits + _SMALL
