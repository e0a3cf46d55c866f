"""The activations of a pass, allocated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lightning.kernels import ops
from moe_lightning.memory.arena import HostArena, device_tensor
from moe_lightning.memory.mapped import device_view
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.memory import staging_blocks, staging_slots
from moe_lightning.pipeline.shape import layers_on_cpu
from moe_lightning.policy import Policy

if TYPE_CHECKING:
    from moe_lightning.kernels.experts import Workspace


@dataclass(frozen=True)
class PassBuffers:
    """One row per token of the pass on the device, one per decoding sequence on the host.

    Attributes:
        hidden: [T, H], the residual stream.
        qkv: [T, q_size + 2 kv_size].
        attention_out: [T, q_size].
        experts_in: [T, H].
        topk_ids: [T, K] int64.
        topk_weights: [T, K] float32.
        host_qkv: [N, q_size + 2 kv_size].
        host_out: [N, q_size].
        host_out_on_device: the same memory as kernels on the device read it; None where they cannot.
        host_experts: [T, H], what the CPU's experts work on, then what they make of it; no row where it has none.
        host_topk_ids: [T, K] int64, of these rows.
        host_topk_weights: [T, K] float32.
        host_experts_on_device: as `host_out_on_device`.
        router_logits: [T, E].
        experts: workspace of the experts' kernels; None on a CPU.
        kv_stage: staging slots, each [blocks, 2, num_kv_heads, block_size, D] on the device; none where the CPU
            attends.
    """

    hidden: Tensor
    qkv: Tensor
    attention_out: Tensor
    experts_in: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    host_qkv: Tensor
    host_out: Tensor
    host_out_on_device: Tensor | None
    host_experts: Tensor
    host_topk_ids: Tensor
    host_topk_weights: Tensor
    host_experts_on_device: Tensor | None
    router_logits: Tensor
    experts: Workspace | None
    kv_stage: tuple[Tensor, ...] = ()

    @classmethod
    def allocate(
        cls, spec: ModelSpec, policy: Policy, dtype: torch.dtype, device: torch.device
    ) -> PassBuffers:
        """Buffers for the largest pass of a policy."""
        a, e, k = spec.attention, spec.experts, spec.experts.top_k
        num_seqs, num_tokens = policy.max_num_seqs, policy.max_num_seqs + policy.prefill_tokens
        stage = (staging_blocks(policy), 2, a.num_kv_heads, policy.block_size, a.head_dim)
        host_out, is_mapped = _pinned((num_seqs, a.q_size), dtype, device)
        num_on_cpu = num_tokens if layers_on_cpu(policy) else 0
        host_experts, is_experts_mapped = _pinned((num_on_cpu, spec.hidden_size), dtype, device)
        return cls(
            hidden=device_tensor((num_tokens, spec.hidden_size), dtype, device),
            qkv=device_tensor((num_tokens, a.qkv_size), dtype, device),
            attention_out=device_tensor((num_tokens, a.q_size), dtype, device),
            experts_in=device_tensor((num_tokens, spec.hidden_size), dtype, device),
            topk_ids=device_tensor((num_tokens, k), torch.int64, device),
            topk_weights=device_tensor((num_tokens, k), torch.float32, device),
            host_qkv=_pinned((num_seqs, a.qkv_size), dtype, device)[0],
            host_out=host_out,
            host_out_on_device=device_view(host_out, device) if is_mapped else None,
            host_experts=host_experts,
            host_topk_ids=_pinned((num_on_cpu, k), torch.int64, device)[0],
            host_topk_weights=_pinned((num_on_cpu, k), torch.float32, device)[0],
            host_experts_on_device=device_view(host_experts, device) if is_experts_mapped else None,
            router_logits=device_tensor((num_tokens, e.num_experts), dtype, device),
            experts=ops.experts_workspace(
                num_tokens, k, e.num_experts, spec.hidden_size, e.intermediate_size, dtype, device
            ),
            kv_stage=tuple(device_tensor(stage, dtype, device) for _ in range(staging_slots(policy))),
        )


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
    """Host memory that the device copies from and to while others go on; whether its kernels reach it too."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype), False
    arena = HostArena((1, *shape), dtype)  # one row, so that it is locked as one piece
    if device.type == "cpu":
        return arena.tensor[0], False
    arena.prepare(pin=True)
    if arena.refusal:
        return torch.empty(shape, dtype=dtype, pin_memory=True), False
    return arena.tensor[0], True
