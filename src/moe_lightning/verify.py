"""The offloaded pipeline against a plain forward pass over the checkpoint's own tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.engine.prompts import Prompt
from moe_lightning.engine.request import RequestOutput, SamplingParams
from moe_lightning.kernels import reference as ops
from moe_lightning.llm import LLM
from moe_lightning.memory import checkpoint
from moe_lightning.models.spec import ModelSpec, Role

# Largest difference of a log-probability that rounding explains, with logits of order 10.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
_TOP = 20  # most likely tokens compared at each position


@dataclass(frozen=True)
class PromptCheck:
    """One prompt: generated tokens, those that plain PyTorch would not choose, the largest difference found."""

    num_tokens: int
    num_wrong: int
    max_difference: float


@dataclass(frozen=True)
class Verification:
    """All prompts, and the difference that the dtype allows."""

    checks: tuple[PromptCheck, ...]
    tolerance: float

    @property
    def max_difference(self) -> float:
        """The largest over all prompts."""
        return max(check.max_difference for check in self.checks)

    @property
    def is_equal(self) -> bool:
        """Every token is right and every log-probability within the tolerance."""
        return self.max_difference <= self.tolerance and not any(check.num_wrong for check in self.checks)


def verify(llm: LLM, prompts: Sequence[Prompt], max_tokens: int = 16) -> Iterator[PromptCheck]:
    """Greedy answers of the engine, all prompts in one batch, each then recomputed alone without a cache.

    A token counts as wrong when plain PyTorch prefers another one by more than the tolerance.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=_TOP)
    outputs = llm.generate(list(prompts), params)
    plain = PlainModel(llm.spec, Path(llm.config.model), llm.dtype)
    for output in outputs:
        yield _check(output, plain, TOLERANCES[llm.dtype])


def _check(output: RequestOutput, plain: PlainModel, tolerance: float) -> PromptCheck:
    answer = output.outputs[0]
    assert answer.logprobs is not None
    sequence = [*output.prompt_token_ids, *answer.token_ids]
    logprobs = plain.logits(sequence[:-1])[-len(answer.token_ids) :].log_softmax(-1)
    wrong, largest = 0, 0.0
    for row, token, found in zip(logprobs, answer.token_ids, answer.logprobs, strict=True):
        wrong += bool(row.max() - row[token] > tolerance)
        ids = list(found)
        engine = torch.tensor([found[i].logprob for i in ids])
        largest = max(largest, float((engine - row[ids]).abs().max()))
    return PromptCheck(len(answer.token_ids), wrong, largest)


class PlainModel:
    """A forward pass in float32 straight from the files: no pages, no cache, no schedule, one layer in memory.

    Weights are rounded to the engine's dtype first.
    """

    def __init__(self, spec: ModelSpec, directory: Path, dtype: torch.dtype) -> None:
        self._spec = spec
        self._dtype = dtype
        self._stored = {
            (tensor.role, tensor.layer, tensor.expert): stored
            for tensor, stored in checkpoint.open_model(directory, spec)
        }

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, V] after each token."""
        spec = self._spec
        embed = self._weight(Role.EMBED)
        hidden = embed[torch.tensor(token_ids)]
        inv_freq = ops.inverse_frequencies(spec.rope, spec.attention.head_dim)
        rotary = ops.rotary(torch.arange(len(token_ids)), inv_freq, torch.float32)
        for layer in range(spec.num_layers):
            normed = ops.rms_norm(hidden, self._weight(Role.INPUT_NORM, layer), spec.norm_eps)
            hidden = hidden + self._attention(normed, layer, rotary)
            normed = ops.rms_norm(hidden, self._weight(Role.POST_NORM, layer), spec.norm_eps)
            hidden = hidden + self._feed_forward(normed, layer)
        normed = ops.rms_norm(hidden, self._weight(Role.FINAL_NORM), spec.norm_eps)
        return F.linear(normed, embed if spec.tie_word_embeddings else self._weight(Role.LM_HEAD))

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
            share = (weights * (ids == expert)).sum(dim=1)
            if share.any():
                total += share[:, None] * self._expert(x, layer, expert)
        return total

    def _expert(self, x: Tensor, layer: int, expert: int) -> Tensor:
        gate = F.linear(x, self._weight(Role.GATE, layer, expert))
        up = F.linear(x, self._weight(Role.UP, layer, expert))
        return F.linear(F.silu(gate) * up, self._weight(Role.DOWN, layer, expert))

    def _weight(self, role: Role, layer: int = -1, expert: int = -1) -> Tensor:
        stored = self._stored[role, layer, expert]
        return checkpoint.read_tensor(stored).to(self._dtype).float()
