"""Sampling parameters of a batch as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.perf.memory import HEAD_ROWS
from moe_lightning.runtime.upload import Uploader

_ON_CPU = Uploader(torch.device("cpu"))
_GREEDY_BELOW = 1e-5  # vLLM's bound: dividing by less overflows


@dataclass(frozen=True)
class RowSampling:
    """How one row is sampled; names and values as in `SamplingParams`.

    Attributes:
        uniform: the row's random number in [0, 1); a greedy row needs none.
        forbidden_ids: tokens that must not be chosen.
        prompt_ids: the prompt; read only when there is a repetition penalty.
        output_ids: tokens generated so far; read only when there is a penalty.
        allowed: [ceil(V / 32)] int32, a bit for each token that may be chosen, lowest first; None for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    uniform: float = 0.0
    forbidden_ids: Sequence[int] = ()
    prompt_ids: Sequence[int] = field(default=(), repr=False)
    output_ids: Sequence[int] = field(default=(), repr=False)
    num_logprobs: int | None = None
    allowed: npt.NDArray[np.int32] | None = field(default=None, repr=False)

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken; random number and filters do not matter."""
        return self.temperature < _GREEDY_BELOW

    @cached_property
    def is_plain(self) -> bool:
        """The most likely token of the unchanged logits is taken, and nothing else is wanted."""
        is_changed = self.forbidden_ids or self.num_logprobs is not None or self.has_penalty
        return self.is_greedy and not is_changed and self.allowed is None

    @property
    def has_penalty(self) -> bool:
        """Tokens said before change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class Penalties:
    """The logits that penalties change: E different pairs of row and token, all tensors [E].

    `counts` (float32) is how often the token was generated; 0 for one that is in the prompt only.
    `repetition`, `frequency` and `presence` (float32) are the row's factors.
    """

    rows: Tensor
    token_ids: Tensor
    counts: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of R rows. What no row uses is None and costs nothing.

    Attributes:
        num_rows: R.
        random_rows: [r] int64, the rows that are not greedy; without any, what follows is None.
        temperature: [R] float32.
        uniforms: [R] float64.
        top_k: [R] int64, the vocabulary's size for all tokens.
        top_p: [R] float64, infinity for all tokens.
        min_p: [R] float32.
        penalties: changes to single logits.
        masked_rows: [M] int64; with masked_ids, logits that become -inf.
        masked_ids: [M] int64.
        formed_rows: [F] int64, rows that may choose only some tokens.
        allowed: [F, ceil(V / 32) or more] int32, a bit for each token that they may choose; in host memory as the
            device sees it, since those of thousands of rows have no place in the device's.
        num_logprobs: most likely tokens to give for each row: the largest number any row wants.
    """

    num_rows: int
    random_rows: Tensor | None = None
    temperature: Tensor | None = None
    uniforms: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    penalties: Penalties | None = None
    masked_rows: Tensor | None = None
    masked_ids: Tensor | None = None
    formed_rows: Tensor | None = None
    allowed: Tensor | None = None
    num_logprobs: int | None = None


def build_sampling_batches(
    rows: Sequence[RowSampling], vocab_size: int, uploader: Uploader
) -> tuple[SamplingBatch, ...]:
    """The parameters of the rows, `HEAD_ROWS` at a time; all give as many log-probabilities, or none."""
    parts = [rows[start : start + HEAD_ROWS] for start in range(0, len(rows), HEAD_ROWS)]
    most = max((row.num_logprobs for row in rows if row.num_logprobs is not None), default=None)
    return tuple(
        replace(build_sampling_batch(part, vocab_size, uploader), num_logprobs=most) for part in parts
    )


def build_sampling_batch(
    rows: Sequence[RowSampling], vocab_size: int, uploader: Uploader = _ON_CPU
) -> SamplingBatch:
    """The parameters of the rows as tensors on the uploader's device.

    All that depends on the data is decided here, on the host: the sampler then launches without waiting for
    the GPU. Token ids outside the vocabulary, such as a stop id that the model cannot produce, are left out.
    """
    if all(row.is_plain for row in rows):  # most batches
        return SamplingBatch(len(rows))
    column = uploader.put
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    has_top_k = any(0 < rows[i].top_k < vocab_size for i in random)
    has_top_p = any(rows[i].top_p < 1.0 for i in random)
    has_min_p = any(rows[i].min_p > 0.0 for i in random)
    temperature = [1.0 if row.is_greedy else row.temperature for row in rows]
    # Rounded sums may reach 1 before the last token: infinity never cuts.
    top_p = [row.top_p if row.top_p < 1.0 else float("inf") for row in rows]
    wanted = [row.num_logprobs for row in rows if row.num_logprobs is not None]
    masked_rows, masked_ids = _masked(rows, vocab_size, uploader)
    formed = [(i, row.allowed) for i, row in enumerate(rows) if row.allowed is not None]
    return SamplingBatch(
        num_rows=len(rows),
        random_rows=column(random, torch.int64) if random else None,
        temperature=column(temperature, torch.float32) if random else None,
        uniforms=column([row.uniform for row in rows], torch.float64) if random else None,
        top_k=column([_top_k(row, vocab_size) for row in rows], torch.int64) if has_top_k else None,
        top_p=column(top_p, torch.float64) if has_top_p else None,
        min_p=column([row.min_p for row in rows], torch.float32) if has_min_p else None,
        penalties=_penalties(rows, vocab_size, uploader),
        masked_rows=masked_rows,
        masked_ids=masked_ids,
        formed_rows=column([i for i, _ in formed], torch.int64) if formed else None,
        allowed=uploader.lend(np.stack([bits for _, bits in formed])) if formed else None,
        num_logprobs=max(wanted, default=None),
    )


def _top_k(row: RowSampling, vocab_size: int) -> int:
    return min(row.top_k, vocab_size) if row.top_k > 0 else vocab_size


def _masked(
    rows: Sequence[RowSampling], vocab_size: int, uploader: Uploader
) -> tuple[Tensor | None, Tensor | None]:
    pairs = [(i, t) for i, row in enumerate(rows) for t in row.forbidden_ids if 0 <= t < vocab_size]
    if not pairs:
        return None, None
    masked_rows, masked_ids = zip(*pairs, strict=True)
    return uploader.put(masked_rows, torch.int64), uploader.put(masked_ids, torch.int64)


def _penalties(rows: Sequence[RowSampling], vocab_size: int, uploader: Uploader) -> Penalties | None:
    penalized = [i for i, row in enumerate(rows) if row.has_penalty]
    said = _pairs({i: rows[i].output_ids for i in penalized}, vocab_size)
    read = _pairs({i: rows[i].prompt_ids for i in penalized if rows[i].repetition_penalty != 1.0}, vocab_size)
    pairs, inverse = np.unique(np.concatenate([said, read]), return_inverse=True)
    if not len(pairs):
        return None
    counts = np.bincount(inverse[: len(said)], minlength=len(pairs))
    of_pair = pairs // vocab_size

    def factor(values: list[float]) -> Tensor:
        return uploader.put(np.array(values, dtype=np.float32)[of_pair], torch.float32)

    return Penalties(
        rows=uploader.put(of_pair, torch.int64),
        token_ids=uploader.put(pairs % vocab_size, torch.int64),
        counts=uploader.put(counts, torch.float32),
        repetition=factor([row.repetition_penalty for row in rows]),
        frequency=factor([row.frequency_penalty for row in rows]),
        presence=factor([row.presence_penalty for row in rows]),
    )


def _pairs(ids_of_row: dict[int, Sequence[int]], vocab_size: int) -> npt.NDArray[np.int64]:
    """Row and token of each occurrence as one number: row * vocab_size + token."""
    parts = [np.empty(0, dtype=np.int64)]
    for row, ids in ids_of_row.items():
        tokens = np.asarray(ids, dtype=np.int64)
        parts.append(row * vocab_size + tokens[(tokens >= 0) & (tokens < vocab_size)])
    return np.concatenate(parts)
