"""Measures the experts' kernels beside torch._grouped_mm on contiguous weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.bench.result import Measurement
from moe_lightning.bench.shapes import ExpertsWeights, LayerShape, Routing
from moe_lightning.bench.timing import relative_error, seconds_of
from moe_lightning.errors import MoELightningError
from moe_lightning.kernels.expert_config import ExpertsConfig
from moe_lightning.kernels.experts import ExpertsCall, Workspace, experts_

_NUM_ROUTINGS = 4  # rotated, so that few tokens do not find their experts in the cache
_CHECKED = 512  # tokens compared with float32
_MAX_ERROR = 2e-2  # of bf16 and fp16; anything wrong is far above


class WrongResultError(MoELightningError):
    """A kernel's result is not the reference's: its speed means nothing."""


@dataclass(frozen=True)
class ExpertsBench:
    """One layer's weights and what is computed with them."""

    model: str
    shape: LayerShape
    weights: ExpertsWeights
    dtype: torch.dtype

    @classmethod
    def of(cls, model: str, shape: LayerShape, dtype: torch.dtype) -> ExpertsBench:
        """With random weights."""
        return cls(model, shape, ExpertsWeights.random(shape, dtype), dtype)

    def workspace(self, num_tokens: int) -> Workspace:
        """For that many tokens at once."""
        s = self.shape
        return Workspace.allocate(
            num_tokens, s.router.top_k, s.num_experts, s.hidden_size, s.intermediate_size, self.dtype,
            torch.device("cuda"),
        )  # fmt: skip

    def call(
        self, x: Tensor, routing: Routing, workspace: Workspace, config: ExpertsConfig | None = None
    ) -> ExpertsCall:
        """One call's steps."""
        w = self.weights
        return ExpertsCall.of(
            x, routing.topk_ids, routing.topk_weights, w.frames, w.page_table, self.shape.pages_per_expert,
            workspace, config,
        )  # fmt: skip

    def run(self, hidden: Tensor, x: Tensor, routing: Routing, workspace: Workspace) -> None:
        """One call."""
        w = self.weights
        experts_(
            hidden, x, routing.topk_ids, routing.topk_weights, w.frames, w.page_table,
            self.shape.pages_per_expert, workspace,
        )  # fmt: skip

    def tokens(self, num_tokens: int) -> Tensor:
        """Random inputs [T, H]."""
        return torch.randn(num_tokens, self.shape.hidden_size, device="cuda", dtype=self.dtype)

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The result in float32, expert by expert from the contiguous weights."""
        out = torch.zeros_like(x, dtype=torch.float32)
        wide = x.float()
        for expert in range(self.shape.num_experts):
            tokens, k = (routing.topk_ids == expert).nonzero(as_tuple=True)
            if len(tokens):
                gate, up = (wide[tokens] @ self.weights.gate_up[expert].float().t()).chunk(2, dim=-1)
                found = (F.silu(gate) * up) @ self.weights.down[expert].float().t()
                out.index_add_(0, tokens, found * routing.topk_weights[tokens, k][:, None])
        return out

    def measure(self, num_tokens: int) -> Iterator[Measurement]:
        """The whole operation, and its two products alone.

        Raises:
            WrongResultError: the result is not the reference's.
        """
        s, workspace, x = self.shape, self.workspace(num_tokens), self.tokens(num_tokens)
        routings = [Routing.random(s, num_tokens) for _ in range(_NUM_ROUTINGS)]
        error = self._check(num_tokens, workspace, x, routings[0])
        met = sum(r.experts_met() for r in routings) / len(routings)
        flops = 2.0 * num_tokens * s.router.top_k * s.expert_elements
        weight_bytes = met * s.expert_elements * self.dtype.itemsize
        hidden = torch.zeros_like(x)
        seconds = seconds_of([_bind(self.run, hidden, x, r, workspace) for r in routings])
        peers = self._peers(x, routings)
        yield Measurement(
            "experts", self.model, num_tokens, seconds, flops, weight_bytes, error,
            {"torch": peers["whole"]} if "whole" in peers else {},
        )  # fmt: skip
        products = seconds_of([self._products(x, r, workspace) for r in routings[:1]])
        yield Measurement(
            "experts products", self.model, num_tokens, products, flops,
            routings[0].experts_met() * s.expert_elements * self.dtype.itemsize, None,
            {"_grouped_mm": peers["products"]} if "products" in peers else {},
        )  # fmt: skip

    def _products(self, x: Tensor, routing: Routing, workspace: Workspace) -> Callable[[], object]:
        """The two products of tokens that are sorted already."""
        call = self.call(x, routing, workspace)
        num_blocks = call.sort()

        def work() -> None:
            # The outputs may lie where the sorted tokens were: what is read changes, the time does not.
            call.gate_up(num_blocks)
            call.down(num_blocks)

        return work

    def _check(self, num_tokens: int, workspace: Workspace, x: Tensor, routing: Routing) -> float:
        workspace.rows.fill_(float("nan"))
        workspace.inter.fill_(float("nan"))
        hidden = torch.zeros_like(x)
        self.run(hidden, x, routing, workspace)
        rows = torch.randperm(num_tokens, device="cuda")[:_CHECKED]
        some = Routing(routing.topk_ids[rows], routing.topk_weights[rows])
        error = relative_error(hidden[rows], self.reference(x[rows], some))
        if not error < _MAX_ERROR or not bool(hidden.isfinite().all()):
            raise WrongResultError(
                f"experts of {self.model} at {num_tokens} tokens: relative error {error:.1e}, "
                f"allowed {_MAX_ERROR:.0e}"
            )
        return error

    def _peers(self, x: Tensor, routings: list[Routing]) -> dict[str, float]:
        """Seconds of PyTorch's grouped product: alone, and with what is needed around it."""
        if not hasattr(torch, "_grouped_mm") or torch.cuda.get_device_capability() < (9, 0):
            return {}
        whole = seconds_of([_bind(self._torch_experts, x, r) for r in routings])
        order, offsets = self._torch_sort(routings[0])
        rows = x[order // self.shape.router.top_k]
        inter = torch.randn(len(rows), self.shape.intermediate_size, device="cuda", dtype=self.dtype)
        gate_up, down = self.weights.gate_up.transpose(1, 2), self.weights.down.transpose(1, 2)

        def products() -> None:
            torch._grouped_mm(rows, gate_up, offs=offsets)
            torch._grouped_mm(inter, down, offs=offsets)

        return {"whole": whole, "products": seconds_of([products])}

    def _torch_sort(self, routing: Routing) -> tuple[Tensor, Tensor]:
        ids, order = routing.topk_ids.flatten().sort(stable=True)
        experts = torch.arange(self.shape.num_experts, device="cuda")
        return order, torch.searchsorted(ids, experts, right=True).int()

    def _torch_experts(self, x: Tensor, routing: Routing) -> Tensor:
        order, offsets = self._torch_sort(routing)
        k = self.shape.router.top_k
        rows = x[order // k]
        gate, up = torch._grouped_mm(rows, self.weights.gate_up.transpose(1, 2), offs=offsets).chunk(
            2, dim=-1
        )
        found = torch._grouped_mm(F.silu(gate) * up, self.weights.down.transpose(1, 2), offs=offsets)
        outputs = torch.empty_like(found)
        outputs[order] = found * routing.topk_weights.flatten()[order, None].to(found.dtype)
        return outputs.view(len(x), k, -1).sum(dim=1)


def _bind(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)
