"""What one pass works on: first as plain values, then as the tensors that tasks read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment
from moe_lightning.runtime.kv_staging import PlacedBlocks, StagedBlocks, in_turns
from moe_lightning.runtime.sampling_batch import RowSampling, SamplingBatch, build_sampling_batches
from moe_lightning.runtime.upload import Uploader


@dataclass(frozen=True)
class PrefillPiece:
    """Consecutive tokens of one prompt in a chunk.

    Attributes:
        token_ids: the piece's tokens.
        start: position of the first of them in the prompt; pieces before it are in this pass too.
        block_table: KV blocks of the sequence.
        sampling: set on the piece that ends the prompt, if a token is to be sampled after it.
        next_ids: for prompt log-probabilities, the prompt's token after each of the piece's;
            one fewer at the prompt's end.
        num_prompt_logprobs: most likely tokens to give at each of these positions; None for no scoring.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: RowSampling | None = None
    next_ids: Sequence[int] = ()
    num_prompt_logprobs: int | None = None


class DecodeRow(NamedTuple):
    """A running sequence's next token: its last one goes in at `position`."""

    token_id: int
    position: int
    block_table: Sequence[int]
    sampling: RowSampling


@dataclass(frozen=True)
class Step:
    """All micro-batches of a pass: prefill chunks in order, then decode."""

    prefill: tuple[tuple[PrefillPiece, ...], ...] = ()
    decode: tuple[tuple[DecodeRow, ...], ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as tensors. B rows of the pass belong to it.

    Attributes:
        rows: its rows in the pass's buffers on the device.
        token_ids: [B] int64.
        positions: [B] int64.
        slots: [B] int64, KV slots of the new tokens; on the host for decode, where the CPU attends.
        sample_rows: rows to sample after, relative to its first.
        sampling: their parameters, of as many rows at a time as may have logits.
        score_rows: rows whose next prompt token is scored, `score_ids` [S] that token.
        prefill: prefill only: its prompts, as attention reads them.
        host_rows: decode only: its rows in the host buffers.
        block_tables: decode only: [B, max_blocks] int64 (host).
        context_lens: decode only: [B] int64 with the new token (host).
        staged: decode only, where the GPU attends to KV that comes from the host: where its blocks go there, in as
            many turns as it takes.
        kept: decode only, where layers keep their KV on the device: its blocks there.
    """

    rows: slice
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    sampling: tuple[SamplingBatch, ...]
    score_rows: Tensor
    score_ids: Tensor
    num_prompt_logprobs: int
    prefill: PrefillPlan | None = None
    host_rows: slice = field(default_factory=lambda: slice(0, 0))
    block_tables: Tensor | None = None
    context_lens: Tensor | None = None
    staged: tuple[StagedBlocks, ...] = ()
    kept: PlacedBlocks | None = None


def build_micro_batches(
    step: Step,
    block_size: int,
    vocab_size: int,
    uploader: Uploader,
    *,
    staging_blocks: int = 0,
    keeps_kv: bool = False,
) -> list[MicroBatch]:
    """The micro-batches of a step, their tensors put on the uploader's device; rows in order, prefill first.

    Where the GPU attends to KV that comes from the host, `staging_blocks` have room there at a time. `keeps_kv`:
    some layers keep theirs on the device.
    """
    batches, row, host_row = [], 0, 0
    first_row: dict[int, int] = {}  # of each prompt, by its first KV block
    for pieces in step.prefill:
        batch = _prefill(pieces, row, first_row, block_size, vocab_size, uploader)
        batches.append(batch)
        row = batch.rows.stop
    for rows in step.decode:
        batch = _decode(
            rows, row, host_row, block_size, vocab_size, uploader,
            staging_blocks=staging_blocks, keeps_kv=keeps_kv,
        )  # fmt: skip
        batches.append(batch)
        row, host_row = row + len(rows), host_row + len(rows)
    return batches


def _prefill(
    pieces: Sequence[PrefillPiece],
    row: int,
    first_row: dict[int, int],
    block_size: int,
    vocab_size: int,
    uploader: Uploader,
) -> MicroBatch:
    start = row
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    segments, sample_rows, samplings = [], [], []
    score_rows: list[int] = []
    score_ids: list[int] = []
    for piece in pieces:
        span = range(piece.start, piece.start + len(piece.token_ids))
        first = first_row.setdefault(piece.block_table[0], row)
        segments.append(Segment(first, row, row + len(span)))
        ids.extend(piece.token_ids)
        positions.extend(span)
        slots.extend(piece.block_table[p // block_size] * block_size + p % block_size for p in span)
        if piece.num_prompt_logprobs is not None:
            score_rows.extend(range(row - start, row - start + len(piece.next_ids)))
            score_ids.extend(piece.next_ids)
        row += len(span)
        if piece.sampling is not None:
            sample_rows.append(row - 1 - start)
            samplings.append(piece.sampling)
    return MicroBatch(
        rows=slice(start, row),
        token_ids=uploader.put(ids, torch.int64),
        positions=uploader.put(positions, torch.int64),
        slots=uploader.put(slots, torch.int64),
        sample_rows=uploader.put(sample_rows, torch.int64),
        sampling=build_sampling_batches(samplings, vocab_size, uploader),
        score_rows=uploader.put(score_rows, torch.int64),
        score_ids=uploader.put(score_ids, torch.int64),
        num_prompt_logprobs=max((p.num_prompt_logprobs or 0 for p in pieces), default=0),
        prefill=PrefillPlan.of(segments, uploader.put),
    )


def _decode(
    rows: Sequence[DecodeRow],
    row: int,
    host_row: int,
    block_size: int,
    vocab_size: int,
    uploader: Uploader,
    *,
    staging_blocks: int,
    keeps_kv: bool,
) -> MicroBatch:
    tables = _tables([r.block_table for r in rows])
    positions = np.array([r.position for r in rows], dtype=np.int64)
    own_blocks = tables[np.arange(len(rows)), positions // block_size]
    slots = own_blocks * block_size + positions % block_size
    none = uploader.put([], torch.int64)
    return MicroBatch(
        rows=slice(row, row + len(rows)),
        token_ids=uploader.put([r.token_id for r in rows], torch.int64),
        positions=uploader.put(positions, torch.int64),
        slots=uploader.put(slots, torch.int64) if staging_blocks else torch.from_numpy(slots),
        sample_rows=uploader.put(range(len(rows)), torch.int64),
        sampling=build_sampling_batches([r.sampling for r in rows], vocab_size, uploader),
        score_rows=none,
        score_ids=none,
        num_prompt_logprobs=0,
        host_rows=slice(host_row, host_row + len(rows)),
        block_tables=torch.from_numpy(tables),
        context_lens=torch.from_numpy(positions + 1),
        staged=in_turns(tables, positions, block_size, staging_blocks, uploader.put)
        if staging_blocks
        else (),
        kept=PlacedBlocks.in_cache(tables, positions, block_size, uploader.put) if keeps_kv else None,
    )


def _tables(block_tables: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Block tables as rows of one array, filled up with zeros."""
    lengths = np.array([len(table) for table in block_tables], dtype=np.int64)
    tables = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    blocks = np.fromiter(chain.from_iterable(block_tables), dtype=np.int64, count=lengths.sum())
    tables[np.arange(tables.shape[1]) < lengths[:, None]] = blocks
    return tables
