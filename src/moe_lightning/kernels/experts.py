"""The experts of a layer on a GPU: sort, two products through the page table, sum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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
    experts: range | None = None,
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
        experts: only the outputs of these, whose pages alone are read; None for all.
    """
    for start in range(0, len(x), workspace.max_tokens):
        part = slice(start, start + workspace.max_tokens)
        call = ExpertsCall.of(
            x[part],
            topk_ids[part],
            topk_weights[part],
            frames,
            page_table,
            pages_per_expert,
            workspace,
            config,
            experts,
        )
        num_blocks = call.sort()
        call.gate_up(num_blocks)
        call.combine(hidden[part], *call.down(num_blocks))


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for a CPU, where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class ExpertsCall:
    """The steps of one call, in the order of the methods. Fields are as in `experts_`."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    frames: Tensor
    page_table: Tensor
    pages_per_expert: int
    workspace: Workspace
    config: ExpertsConfig
    experts: range
    page_rows: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        frames: Tensor,
        page_table: Tensor,
        pages_per_expert: int,
        workspace: Workspace,
        config: ExpertsConfig | None = None,
        experts: range | None = None,
    ) -> ExpertsCall:
        """A call with the table's configuration where none is given."""
        num_tokens, top_k = topk_ids.shape
        hidden_size, num_experts = x.shape[1], len(page_table) // pages_per_expert
        page_rows = frames.shape[1] // (3 * hidden_size)
        config = config or select(
            ExpertsShape(
                num_tokens, top_k, num_experts, hidden_size, page_rows, pages_per_expert,
                x.dtype.itemsize, capability(x.device),
            )
        )  # fmt: skip
        experts = range(num_experts) if experts is None else experts
        mine = page_table[experts.start * pages_per_expert : experts.stop * pages_per_expert]
        return cls(
            x, topk_ids, topk_weights, frames, mine, pages_per_expert, workspace, config, experts, page_rows
        )

    def sort(self) -> int:
        """Order the slots by expert and, if so configured, copy their tokens; row blocks to launch."""
        w, top_k = self.workspace, self.topk_ids.shape[1]
        num_blocks = sort_slots(
            self.topk_ids, self.experts, self.config.block_m, w.counts, w.sorted_slots, w.blocks
        )
        if not self.config.gather:
            hidden_size, block = self.x.shape[1], self._copied_at_once
            grid = (self.topk_ids.numel(), triton.cdiv(hidden_size, block))
            gather_kernel[grid](
                self.x, w.sorted_slots, w.blocks, w.rows, hidden_size, TOP_K=top_k, BLOCK=block
            )
        return num_blocks

    def gate_up(self, num_blocks: int) -> None:
        """silu(gate x) * (up x) of each slot into the workspace."""
        c, w, tile = self.config, self.workspace, self.config.gate_up
        hidden_size = self.x.shape[1]
        source, pool = self.x, self.frames
        if not c.gather:
            source = TensorDescriptor.from_tensor(w.rows, [c.block_m, tile.block_k])
        if c.tma:
            pool = TensorDescriptor.from_tensor(pool.view(-1, hidden_size), [tile.block_n, tile.block_k])
        grid = (num_blocks * self.pages_per_expert * triton.cdiv(self.page_rows, tile.block_n),)
        gate_up_kernel[grid](
            source, pool, w.inter, w.sorted_slots, w.blocks, self.page_table,
            num_blocks, hidden_size, self.page_rows, self.pages_per_expert,
            TOP_K=self.topk_ids.shape[1], BLOCK_M=c.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=c.group_m, USE_TMA=c.tma, GATHER=c.gather,
            EVEN_K=hidden_size % tile.block_k == 0, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def down(self, num_blocks: int) -> tuple[Tensor, int]:
        """The weighted outputs of each slot: where they are, and in how many shares to be added."""
        c, w, tile = self.config, self.workspace, self.config.down
        hidden_size, num_slots = self.x.shape[1], self.topk_ids.numel()
        source, pool = w.inter, self.frames
        if c.tma:
            source = TensorDescriptor.from_tensor(w.inter, [c.block_m, tile.block_k])
            pool = TensorDescriptor.from_tensor(pool.view(-1, self.page_rows), [tile.block_n, tile.block_k])
        out, split_k = self._outputs()
        grid = (num_blocks * triton.cdiv(hidden_size, tile.block_n), split_k)
        down_kernel[grid](
            source, pool, out, self.topk_weights, w.sorted_slots, w.blocks, self.page_table,
            num_blocks, num_slots, hidden_size, self.page_rows, self.pages_per_expert,
            BLOCK_M=c.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=c.group_m,
            SPLIT_K=split_k, USE_TMA=c.tma, EVEN_K=self.page_rows % tile.block_k == 0,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return out, split_k

    def combine(self, hidden: Tensor, out: Tensor, split_k: int) -> None:
        """Add each token's outputs to hidden [T, H]."""
        (num_tokens, top_k), hidden_size = self.topk_ids.shape, hidden.shape[1]
        block = self._copied_at_once
        grid = (num_tokens, triton.cdiv(hidden_size, block))
        combine_kernel[grid](
            out, self.topk_ids, hidden, num_tokens * top_k, self.experts.start, len(self.experts), hidden_size,
            TOP_K=top_k, SPLIT_K=split_k, BLOCK=block,
        )  # fmt: skip

    def _outputs(self) -> tuple[Tensor, int]:
        """Several shares are kept in float32, since rounding each would add up; no more than there is room for."""
        rows = self.workspace.rows
        wide = rows.view(torch.float32)
        room = wide.numel() // (self.topk_ids.numel() * rows.shape[1])
        split_k = min(self.config.split_k, room)
        return (wide, split_k) if split_k > 1 else (rows, 1)

    @property
    def _copied_at_once(self) -> int:
        return min(_COPIED_AT_ONCE, int(triton.next_power_of_2(self.x.shape[1])))
