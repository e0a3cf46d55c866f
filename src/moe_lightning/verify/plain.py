"""A forward pass in plain PyTorch: no pages, no cache, no schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.kernels import reference as ops
from moe_lightning.models.spec import ModelSpec, Role
from moe_lightning.verify.sources import Source


class PlainModel:
    """Sequences through the layers, one layer after the other; a matrix is in memory only while it is used.

    Args:
        spec: the model.
        source: of its weights.
        dtype: the engine's; weights are rounded to it.
        computes_in: the precision of everything else.
        device: where it computes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: Source,
        dtype: torch.dtype,
        computes_in: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._spec = spec
        self._source = source
        self._dtype = dtype
        self._computes_in = computes_in
        self._device = device or torch.device("cpu")

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, V] float32 after each token."""
        return self.last_logits([token_ids], [len(token_ids)])[0]

    @torch.inference_mode()
    def last_logits(self, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
        """Logits [count, V] float32 after the last tokens of each sequence; none sees another."""
        spec, device = self._spec, self._device
        tokens = [token for sequence in sequences for token in sequence]
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        hidden = self._weight(Role.EMBED)[ids]
        positions = torch.cat([torch.arange(len(tokens)) for tokens in sequences]).to(device)
        inv_freq = ops.inverse_frequencies(spec.rope, spec.attention.head_dim).to(device)
        rotary = ops.rotary(positions, inv_freq, self._computes_in)
        lengths = [len(tokens) for tokens in sequences]
        for layer in range(spec.num_layers):
            normed = ops.rms_norm(hidden, self._weight(Role.INPUT_NORM, layer), spec.norm_eps)
            hidden = hidden + self._attention(normed, layer, rotary, lengths)
            normed = ops.rms_norm(hidden, self._weight(Role.POST_NORM, layer), spec.norm_eps)
            hidden = hidden + self._feed_forward(normed, layer)
        normed = ops.rms_norm(hidden, self._weight(Role.FINAL_NORM), spec.norm_eps)
        head = self._weight(Role.EMBED if spec.tie_word_embeddings else Role.LM_HEAD)
        parts = zip(normed.split(lengths), counts, strict=True)
        return [F.linear(part[len(part) - count :], head).float() for part, count in parts]

    def _attention(
        self, x: Tensor, layer: int, rotary: tuple[Tensor, Tensor], lengths: Sequence[int]
    ) -> Tensor:
        a = self._spec.attention
        q, k, v = (
            F.linear(x, self._weight(role, layer)).view(len(x), -1, a.head_dim)
            for role in (Role.Q, Role.K, Role.V)
        )
        q, k = ops.rotate(q, *rotary), ops.rotate(k, *rotary)
        group = a.num_heads // a.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        attended = torch.cat([self._attend(*part) for part in parts])
        return F.linear(attended.flatten(1), self._weight(Role.O, layer))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence: [T, heads, D] each."""
        a = self._spec.attention
        scores = torch.einsum("qhd,khd->hqk", q, k) / a.head_dim**0.5
        positions = torch.arange(len(q), device=q.device)
        hidden = positions[None, :] > positions[:, None]
        if a.sliding_window is not None:
            hidden |= positions[None, :] <= positions[:, None] - a.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

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
        found = self._source(role, layer, expert).to(self._device)
        return found.to(self._dtype).to(self._computes_in)
