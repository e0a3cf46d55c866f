"""The experts of a layer on a GPU: sort, two products through the page table, sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, select
from moe_lightning.kernels.expert_gemm import combine_kernel, down_kernel, gate_up_kernel, gather_kernel
from moe_lightning.kernels.expert_sort import CHUNK, max_blocks, sort_slots

_SMALLEST_BLOCK_M = 16
_COPIED_AT_ONCE = 2048  # elements of a row that one program copies or sums


@dataclass(frozen=True)
class Workspace:
    """What `experts_` needs beside its arguments, allocated once. S: slots = max_tokens * top_k.

    Attributes:
        max_tokens: tokens computed at once; more are done in turns, each of which reads the weights.
        rows: [S, H], the sorted tokens, later the outputs of the slots.
        inter: [S, I].
        sorted_slots: [S] int32.
        counts: int32.
        blocks: [row blocks, 4] int32.
    """

    max_tokens: int
    rows: Tensor
    inter: Tensor
    sorted_slots: Tensor
    counts: Tensor
    blocks: Tensor

    @classmethod
    def allocate(
        cls,
        max_tokens: int,
        top_k: int,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Workspace:
        """Memory for `max_tokens` tokens at once: max_tokens * top_k * (H + I) elements and little else."""
        slots = max_tokens * top_k
        chunks, experts = triton.cdiv(slots, CHUNK), max(16, triton.next_power_of_2(num_experts))

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            max_tokens=max_tokens,
            rows=torch.empty((slots, hidden_size), dtype=dtype, device=device),
            inter=torch.empty((slots, intermediate_size), dtype=dtype, device=device),
            sorted_slots=ints(slots),
            counts=ints(chunks * experts),
            blocks=ints(max_blocks(slots, num_experts, _SMALLEST_BLOCK_M), 4),
        )


def experts_(
    hidden: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    frames: Tensor,
    page_table: Tensor,
    pages_per_expert: int,
    workspace: Workspace,
    config: ExpertsConfig | None = None,
) -> None:
    """Add to each token the weighted outputs of its experts; launches only, nothing is allocated or awaited.

    Args:
        hidden: [T, H], added to in place.
        x: [T, H], the experts' input.
        topk_ids: [T, K], any integer type.
        topk_weights: [T, K] float32.
        frames: [num_frames, 3 * rows * H], the whole pool.
        page_table: [E * pages_per_expert] int32: frame of each page of the layer, expert by expert.
        pages_per_expert: slices of each expert.
        workspace: of the same shapes.
        config: tiles; None for the table's.
    """
    for start in range(0, len(x), workspace.max_tokens):
        part = slice(start, start + workspace.max_tokens)
        _experts_(
            hidden[part], x[part], topk_ids[part], topk_weights[part],
            frames, page_table, pages_per_expert, workspace, config,
        )  # fmt: skip


def _experts_(
    hidden: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    frames: Tensor,
    page_table: Tensor,
    pages_per_expert: int,
    workspace: Workspace,
    config: ExpertsConfig | None,
) -> None:
    num_tokens, top_k = topk_ids.shape
    hidden_size = x.shape[1]
    num_experts = len(page_table) // pages_per_expert
    num_slots, page_rows = num_tokens * top_k, frames.shape[1] // (3 * hidden_size)
    if config is None:
        config = select(
            ExpertsShape(
                num_tokens, top_k, num_experts, hidden_size, page_rows, pages_per_expert,
                x.dtype.itemsize, capability(x.device),
            )
        )  # fmt: skip
    sorted_slots, blocks = workspace.sorted_slots, workspace.blocks
    num_blocks = sort_slots(topk_ids, num_experts, config.block_m, workspace.counts, sorted_slots, blocks)
    if not config.gather:
        _gather(x, sorted_slots, workspace.rows, num_slots, top_k)
    _gate_up(x, frames, page_table, num_blocks, top_k, pages_per_expert, page_rows, workspace, config)
    split_k, out = _outputs(workspace, config, num_slots)
    _down(
        out, topk_weights, frames, page_table, num_blocks, num_slots, pages_per_expert, page_rows,
        workspace, config, split_k,
    )  # fmt: skip
    grid = (num_tokens, triton.cdiv(hidden_size, _COPIED_AT_ONCE))
    block = min(_COPIED_AT_ONCE, triton.next_power_of_2(hidden_size))
    combine_kernel[grid](out, hidden, num_slots, hidden_size, TOP_K=top_k, SPLIT_K=split_k, BLOCK=block)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for a CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _gather(x: Tensor, sorted_slots: Tensor, out: Tensor, num_slots: int, top_k: int) -> None:
    hidden_size = x.shape[1]
    block = min(_COPIED_AT_ONCE, triton.next_power_of_2(hidden_size))
    grid = (num_slots, triton.cdiv(hidden_size, block))
    gather_kernel[grid](x, sorted_slots, out, hidden_size, TOP_K=top_k, BLOCK=block)


def _gate_up(
    x: Tensor,
    frames: Tensor,
    page_table: Tensor,
    num_blocks: int,
    top_k: int,
    pages_per_expert: int,
    page_rows: int,
    workspace: Workspace,
    config: ExpertsConfig,
) -> None:
    hidden_size, tile = x.shape[1], config.gate_up
    source, pool = x, frames
    if not config.gather:
        source = TensorDescriptor.from_tensor(workspace.rows, [config.block_m, tile.block_k])
    if config.tma:
        matrix = frames.view(-1, hidden_size)
        pool = TensorDescriptor.from_tensor(matrix, [tile.block_n, tile.block_k])
    grid = (num_blocks * pages_per_expert * triton.cdiv(page_rows, tile.block_n),)
    gate_up_kernel[grid](
        source, pool, workspace.inter, workspace.sorted_slots, workspace.blocks, page_table,
        num_blocks, hidden_size, page_rows, pages_per_expert,
        TOP_K=top_k, BLOCK_M=config.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP_M=config.group_m, USE_TMA=config.tma, GATHER=config.gather,
        EVEN_K=hidden_size % tile.block_k == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _outputs(workspace: Workspace, config: ExpertsConfig, num_slots: int) -> tuple[int, Tensor]:
    """Shares of the sum and where they go: float32 for several, since rounding each would add up."""
    if config.split_k == 1:
        return 1, workspace.rows
    out = workspace.rows.view(torch.float32)
    fitting = out.numel() // (num_slots * workspace.rows.shape[1])
    split_k = min(config.split_k, fitting)
    return (split_k, out) if split_k > 1 else (1, workspace.rows)


def _down(
    out: Tensor,
    topk_weights: Tensor,
    frames: Tensor,
    page_table: Tensor,
    num_blocks: int,
    num_slots: int,
    pages_per_expert: int,
    page_rows: int,
    workspace: Workspace,
    config: ExpertsConfig,
    split_k: int,
) -> None:
    hidden_size, tile = workspace.rows.shape[1], config.down
    source, pool = workspace.inter, frames
    if config.tma:
        source = TensorDescriptor.from_tensor(workspace.inter, [config.block_m, tile.block_k])
        pool = TensorDescriptor.from_tensor(frames.view(-1, page_rows), [tile.block_n, tile.block_k])
    grid = (num_blocks * triton.cdiv(hidden_size, tile.block_n), split_k)
    down_kernel[grid](
        source, pool, out, topk_weights, workspace.sorted_slots, workspace.blocks, page_table,
        num_blocks, num_slots, hidden_size, page_rows, pages_per_expert,
        BLOCK_M=config.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=config.group_m,
        SPLIT_K=split_k, USE_TMA=config.tma, EVEN_K=page_rows % tile.block_k == 0,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
