"""GPU memory that passes need beside weights and frames."""

from __future__ import annotations

from moe_lightning.models.spec import ModelSpec
from moe_lightning.pipeline.baselines import STAGING_SLOTS
from moe_lightning.policy import Policy
from moe_lightning.units import MIB

EXPERTS_AT_ONCE = 8192  # tokens: enough that reading the weights costs nothing beside the arithmetic
HEAD_ROWS = 512  # rows of logits that exist at once: of a vocabulary of 128 k, 256 MiB in float32
_ENGINE = 512 * MIB  # requests, step arrays, readers of a checkpoint
_UNEVEN = 1.5  # KV of a micro-batch, as a multiple of an even share: few sequences may be long ones
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


def staging_slots(policy: Policy) -> int:
    """Places on the GPU for the KV of a decode micro-batch in one layer; none where the CPU attends."""
    return STAGING_SLOTS.get(policy.schedule, 0)


def staging_blocks(policy: Policy) -> int:
    """KV blocks that one such place holds: more than an even share, and any one sequence."""
    longest = -(-policy.prefill_tokens // policy.block_size)
    share = _UNEVEN * policy.num_blocks * policy.micro_batch_size / policy.max_num_seqs
    return min(policy.num_blocks, policy.micro_batch_size * longest, max(longest, round(share)))


def staging_bytes(spec: ModelSpec, dtype_bytes: int, policy: Policy) -> int:
    """Bytes of GPU memory for all of them."""
    block = spec.kv_bytes_per_token(dtype_bytes) // spec.num_layers * policy.block_size
    return staging_slots(policy) * staging_blocks(policy) * block
