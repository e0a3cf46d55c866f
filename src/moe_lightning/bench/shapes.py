"""Shapes of the models that kernels are measured with, and random data of these shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lightning.models.spec import AttentionSpec, RouterSpec


@dataclass(frozen=True)
class LayerShape:
    """One layer; `pages_per_expert` as a run of the model would choose it."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    pages_per_expert: int
    router: RouterSpec
    attention: AttentionSpec

    @property
    def page_rows(self) -> int:
        """Intermediate rows of a page."""
        return self.intermediate_size // self.pages_per_expert

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size


# Source: the models' config.json.
MODELS = {
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 8, RouterSpec(2), AttentionSpec(32, 8, 128)),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 1, RouterSpec(8), AttentionSpec(32, 4, 128)),
}


@dataclass(frozen=True)
class ExpertsWeights:
    """A layer's experts, twice: as contiguous matrices and as pages in shuffled frames.

    Attributes:
        gate_up: [E, 2 I, H].
        down: [E, H, I].
        frames: [E * P, 3 * rows * H].
        page_table: [E * P] int32.
    """

    gate_up: Tensor
    down: Tensor
    frames: Tensor
    page_table: Tensor

    @classmethod
    def random(cls, shape: LayerShape, dtype: torch.dtype) -> ExpertsWeights:
        """Normal weights of a size that keeps activations near one."""
        h, i, e = shape.hidden_size, shape.intermediate_size, shape.num_experts
        p, rows = shape.pages_per_expert, shape.page_rows
        gate_up = torch.empty(e, 2 * i, h, dtype=dtype, device="cuda").normal_(std=h**-0.5)
        down = torch.empty(e, h, i, dtype=dtype, device="cuda").normal_(std=i**-0.5)
        table = torch.randperm(e * p, device="cuda")
        frames = torch.empty(e * p, 3, rows * h, dtype=dtype, device="cuda")
        frames[table, :2] = gate_up.view(e, 2, p, rows * h).transpose(1, 2).reshape(e * p, 2, rows * h)
        frames[table, 2] = down.view(e, h, p, rows).transpose(1, 2).reshape(e * p, h * rows)
        return cls(gate_up, down, frames.flatten(1), table.int())


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one call go: uniformly random experts, all different for a token."""

    topk_ids: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K] float32

    @classmethod
    def random(cls, shape: LayerShape, num_tokens: int) -> Routing:
        """Routing of logits that are independent."""
        logits = torch.randn(num_tokens, shape.num_experts, device="cuda")
        weights, ids = logits.softmax(dim=-1).topk(shape.router.top_k, dim=-1)
        return cls(ids, weights / weights.sum(dim=-1, keepdim=True))

    def experts_met(self) -> int:
        """Experts with a token: those whose weights are read."""
        return int(torch.bincount(self.topk_ids.flatten()).count_nonzero())
