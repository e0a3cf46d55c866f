"""A forward pass over the checkpoint's own tensors in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.kernels import reference as ops
from moe_lightning.memory import checkpoint
from moe_lightning.models.spec import ModelSpec, Role


class PlainModel:
    """A forward pass straight from the files: no pages, no cache, no schedule, one layer in memory.

    Args:
        spec: the model.
        directory: its checkpoint.
        dtype: the engine's; weights are rounded to it.
        computes_in: the precision of everything else.

    Raises:
        CheckpointError: the files are not the model's.
    """

    def __init__(
        self, spec: ModelSpec, directory: Path, dtype: torch.dtype, computes_in: torch.dtype = torch.float32
    ) -> None:
        self._spec = spec
        self._dtype = dtype
        self._computes_in = computes_in
        self._stored = {
            (tensor.role, tensor.layer, tensor.expert): stored
            for tensor, stored in checkpoint.open_model(directory, spec)
        }

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, V] float32 after each token."""
        spec = self._spec
        embed = self._weight(Role.EMBED)
        hidden = embed[torch.tensor(token_ids)]
        inv_freq = ops.inverse_frequencies(spec.rope, spec.attention.head_dim)
        rotary = ops.rotary(torch.arange(len(token_ids)), inv_freq, self._computes_in)
        for layer in range(spec.num_layers):
            normed = ops.rms_norm(hidden, self._weight(Role.INPUT_NORM, layer), spec.norm_eps)
            hidden = hidden + self._attention(normed, layer, rotary)
            normed = ops.rms_norm(hidden, self._weight(Role.POST_NORM, layer), spec.norm_eps)
            hidden = hidden + self._feed_forward(normed, layer)
        normed = ops.rms_norm(hidden, self._weight(Role.FINAL_NORM), spec.norm_eps)
        return F.linear(normed, embed if spec.tie_word_embeddings else self._weight(Role.LM_HEAD)).float()

    def _attention(self, x: Tensor, layer: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        a = self._spec.attention
        q, k, v = (
            F.linear(x, self._weight(role, layer)).view(len(x), -1, a.head_dim)
            for role in (Role.Q, Role.K, Role.V)
        )
        q, k = ops.rotate(q, *rotary), ops.rotate(k, *rotary)
        group = a.num_heads // a.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / a.head_dim**0.5
        positions = torch.arange(len(x))
        hidden = positions[None, :] > positions[:, None]
        if a.sliding_window is not None:
            hidden |= positions[None, :] <= positions[:, None] - a.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return F.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), self._weight(Role.O, layer))

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        experts, total = self._spec.experts, torch.zeros_like(x)
        if experts.router is None:
            return self._expert(x, layer, 0)
        ids, weights = ops.route(F.linear(x, self._weight(Role.ROUTER, layer)), experts.router)
        for expert in range(experts.num_experts):
            share = (weights * (ids == expert)).sum(dim=1).to(x.dtype)
            if share.any():
                total += share[:, None] * self._expert(x, layer, expert)
        return total

    def _expert(self, x: Tensor, layer: int, expert: int) -> Tensor:
        gate = F.linear(x, self._weight(Role.GATE, layer, expert))
        up = F.linear(x, self._weight(Role.UP, layer, expert))
        return F.linear(F.silu(gate) * up, self._weight(Role.DOWN, layer, expert))

    def _weight(self, role: Role, layer: int = -1, expert: int = -1) -> Tensor:
        stored = self._stored[role, layer, expert]
        return checkpoint.read_tensor(stored).to(self._dtype).to(self._computes_in)
