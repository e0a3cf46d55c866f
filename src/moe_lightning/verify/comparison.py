"""How far the engine's answers are from plain PyTorch's, and how far they may be.

In float32 nothing but the order of additions differs: every token must be the one that plain PyTorch prefers, and
no log-probability may be further off than rounding explains.

In half precision that would fail a sound pipeline. Every operation rounds, and where two experts' router logits are
nearly equal, rounding sends a token to another expert: its logits, and those of tokens that attend to it, are then
off by whole units, in any implementation. How often that happens depends on the model. So the yardstick is plain
PyTorch in the same precision: both are compared with plain PyTorch in float32, and the engine's median difference
may be twice that of the other. A median does not see few large differences, so tokens that float32 clearly
disagrees with are counted too: the engine may have twice as many as plain PyTorch in the same precision would
choose there, up to a quarter, and a small share in any case. Swapped pages of two experts fail both.

What is not a finite number is never equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from moe_lightning.engine.prompts import Prompt
from moe_lightning.engine.request import CompletionOutput, RequestOutput, SamplingParams
from moe_lightning.llm import LLM
from moe_lightning.models.spec import ModelSpec
from moe_lightning.verify.plain import PlainModel
from moe_lightning.verify.sources import Source, from_checkpoint

# Largest difference of a log-probability that rounding alone explains, with logits of order 10.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}
_ALLOWED_WRONG = 0.1  # share of tokens, in half precision: near ties of routers
_ALLOWED_RATIO = 2.0  # of medians and of wrong tokens, in half precision
_MOST_WRONG = 0.25  # share of tokens, whatever plain PyTorch has
TOP = 20  # most likely tokens compared at each position


@dataclass(frozen=True)
class PromptCheck:
    """One answer against plain PyTorch in float32.

    Attributes:
        num_tokens: generated.
        num_wrong: tokens that plain PyTorch would not choose: it prefers another by more than the tolerance.
        num_not_finite: tokens where either side has a NaN or an infinity that the other has not.
        num_rounded_wrong: tokens where plain PyTorch in the engine's precision would choose such a one.
        differences: of each finite log-probability that was compared.
        rounding: the same differences of plain PyTorch in the engine's precision; none in float32.
    """

    num_tokens: int
    num_wrong: int
    num_not_finite: int = 0
    num_rounded_wrong: int = 0
    differences: tuple[float, ...] = field(default=(), repr=False)
    rounding: tuple[float, ...] = field(default=(), repr=False)

    @property
    def max_difference(self) -> float:
        """The largest difference; 0 if nothing could be compared."""
        return max(self.differences, default=0.0)

    @property
    def median_difference(self) -> float:
        """The median difference; 0 if nothing could be compared."""
        return median(self.differences or (0.0,))


@dataclass(frozen=True)
class Verification:
    """All prompts together, judged as the module's docstring says."""

    checks: tuple[PromptCheck, ...]
    dtype: torch.dtype

    @property
    def all(self) -> PromptCheck:
        """All answers as one."""
        return PromptCheck(
            num_tokens=sum(check.num_tokens for check in self.checks),
            num_wrong=sum(check.num_wrong for check in self.checks),
            num_not_finite=sum(check.num_not_finite for check in self.checks),
            num_rounded_wrong=sum(check.num_rounded_wrong for check in self.checks),
            differences=tuple(d for check in self.checks for d in check.differences),
            rounding=tuple(d for check in self.checks for d in check.rounding),
        )

    @property
    def is_strict(self) -> bool:
        """Whether the largest difference and every token count."""
        return self.dtype is torch.float32

    @property
    def tolerance(self) -> float:
        """What a log-probability may be off, and by how much a token may be the second choice."""
        return TOLERANCES[self.dtype]

    @property
    def max_median(self) -> float:
        """What the median difference may be in half precision."""
        return max(_ALLOWED_RATIO * median(self.all.rounding or (0.0,)), TOLERANCES[torch.float32])

    @property
    def max_wrong(self) -> int:
        """How many tokens may be wrong."""
        if self.is_strict:
            return 0
        found = self.all
        like_plain = min(_ALLOWED_RATIO * found.num_rounded_wrong, _MOST_WRONG * found.num_tokens)
        return int(max(_ALLOWED_WRONG * found.num_tokens, like_plain))

    @property
    def is_equal(self) -> bool:
        """The engine computes the model."""
        found = self.all
        if found.num_not_finite or found.num_wrong > self.max_wrong or not found.num_tokens:
            return False
        if self.is_strict:
            return found.max_difference <= self.tolerance
        return found.median_difference <= self.max_median


def verify(llm: LLM, prompts: Sequence[Prompt], max_tokens: int = 16) -> Iterator[PromptCheck]:
    """Greedy answers of the engine, all prompts in one batch, each then recomputed alone without a cache."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=TOP)
    outputs = llm.generate(list(prompts), params)
    source = from_checkpoint(llm.spec, Path(llm.config.model))
    for output in outputs:
        yield from check([output], llm.spec, source, llm.dtype)


def check(
    outputs: Sequence[RequestOutput],
    spec: ModelSpec,
    source: Source,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> list[PromptCheck]:
    """Answers with the log-probabilities of `TOP` tokens at each position, recomputed with weights of a source.

    Args:
        outputs: of greedy requests.
        spec: the model.
        source: of its weights.
        dtype: the engine's.
        device: where to compute; all answers at once, a layer at a time.
    """
    answers = [output.outputs[0] for output in outputs]
    sequences = [
        [*output.prompt_token_ids, *answer.token_ids][:-1]
        for output, answer in zip(outputs, answers, strict=True)
    ]
    counts = [len(answer.token_ids) for answer in answers]

    def logprobs(computes_in: torch.dtype) -> list[Tensor]:
        found = PlainModel(spec, source, dtype, computes_in, device).last_logits(sequences, counts)
        return [logits.log_softmax(-1).cpu() for logits in found]

    exact = logprobs(torch.float32)
    rounded = [None] * len(exact) if dtype is torch.float32 else logprobs(dtype)
    return [_compare(*compared, TOLERANCES[dtype]) for compared in zip(answers, exact, rounded, strict=True)]


def _compare(
    answer: CompletionOutput, wanted: Tensor, same_precision: Tensor | None, tolerance: float
) -> PromptCheck:
    """An answer against log-probabilities [tokens, V], exact ones and those of the engine's precision."""
    num_missing = int(answer.finish_reason == "error")  # the engine itself met logits that are not finite
    wrong, rounded_wrong, not_finite = 0, 0, num_missing
    differences, rounding = list[float](), list[float]()
    for position, (token, found) in enumerate(zip(answer.token_ids, answer.logprobs or [], strict=True)):
        row, ids = wanted[position], list(found)
        wrong += _is_wrong(row, token, tolerance)
        off = _differences(torch.tensor([found[i].logprob for i in ids]), row[ids])
        not_finite += not bool(off.isfinite().all())
        differences += off[off.isfinite()].tolist()
        if same_precision is not None:
            rounded = same_precision[position]
            if not rounded.isnan().any():  # what overflowed says nothing about what rounding does
                rounded_wrong += _is_wrong(row, int(rounded.argmax()), tolerance)
            off = _differences(rounded[ids], row[ids])
            rounding += off[off.isfinite()].tolist()
    return PromptCheck(
        len(answer.token_ids), wrong, not_finite, rounded_wrong, tuple(differences), tuple(rounding)
    )


def _is_wrong(wanted: Tensor, token: int, tolerance: float) -> bool:
    """Whether exact log-probabilities [V] clearly prefer another token."""
    return not bool(wanted.max() - wanted[token] <= tolerance)  # a NaN compares false


def _differences(found: Tensor, wanted: Tensor) -> Tensor:
    """Absolute differences; 0 where both are the same infinity: a model may forbid tokens."""
    return torch.where(found == wanted, 0.0, (found - wanted).abs())
