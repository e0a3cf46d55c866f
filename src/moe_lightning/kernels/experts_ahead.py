"""The experts' kernels, compiled before passes need them: each that one is the first to meet holds it up."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, select
from moe_lightning.kernels.experts import Workspace, capability, experts_

# Tokens of a call: what is compiled does not depend on how many there are, but that the workspace has room for many
# more of them, since sums are cut into shares where they fit.
_FEW, _ROOM = 1, 64


def compile_experts(
    frames: Tensor, page_table: Tensor, pages_per_expert: int, hidden_size: int, top_k: int, num_tokens: int
) -> int:
    """Run every configuration once that calls of up to `num_tokens` tokens choose; how many there are.

    What frames hold does not matter, nor that it changes meanwhile: outputs are dropped.

    Args:
        frames: [rows, page elements], as `experts_` is going to be given them.
        page_table: [E * pages_per_expert] int32, of a layer.
        pages_per_expert: slices of each expert.
        hidden_size: H.
        top_k: experts per token.
        num_tokens: of the largest call.
    """
    num_experts, rows = len(page_table) // pages_per_expert, frames.shape[1] // (3 * hidden_size)
    dtype, device = frames.dtype, frames.device
    shape = ExpertsShape(
        num_tokens,
        top_k,
        num_experts,
        hidden_size,
        rows,
        pages_per_expert,
        dtype.itemsize,
        capability(device),
    )
    workspace = Workspace.allocate(
        _ROOM, top_k, num_experts, hidden_size, rows * pages_per_expert, dtype, device
    )
    x = torch.zeros((_FEW, hidden_size), dtype=dtype, device=device)
    ids = torch.arange(_FEW * top_k, device=device).view(_FEW, top_k) % num_experts
    weights = torch.zeros((_FEW, top_k), device=device)
    configs = configurations(shape)
    for config in configs:
        experts_(
            torch.zeros_like(x), x, ids, weights, frames, page_table, pages_per_expert, workspace, config
        )
    return len(configs)


def configurations(shape: ExpertsShape) -> list[ExpertsConfig]:
    """Those that calls of 1 to `shape.num_tokens` tokens choose. They change where tokens double, or nearly."""
    counts = {1 << i for i in range(shape.num_tokens.bit_length())} | {shape.num_tokens}
    return list(dict.fromkeys(select(replace(shape, num_tokens=count)) for count in sorted(counts)))
