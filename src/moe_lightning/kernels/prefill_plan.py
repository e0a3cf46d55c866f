"""What prefill attention needs to know of a chunk, made once for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lightning.kernels.reference import Segment

Put = Callable[[Any, torch.dtype], Tensor]  # host values to a tensor on the device
BLOCK_Q = 64  # queries of one program of the Triton kernel


@dataclass(frozen=True)
class Run:
    """Segments whose keys are consecutive rows, so that one call of a library serves them.

    Attributes:
        rows: of the queries, in the pass's buffers.
        first_key: row of the first key; the last key is that of the last query.
        cu_seqlens_q: [segments + 1] int32 (device), first query of each segment, counted from the run's first.
        cu_seqlens_k: [segments + 1] int32 (device), the same for keys.
        max_q: queries of the longest segment.
        max_k: keys of the longest segment.
    """

    rows: slice
    first_key: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class PrefillPlan:
    """The segments of a chunk in the forms that kernels read.

    Attributes:
        segments: as they are.
        runs: for library calls.
        blocks: [blocks, 4] int32 (device) for the Triton kernel: first query, end, first key, unused.
    """

    segments: tuple[Segment, ...]
    runs: tuple[Run, ...]
    blocks: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], put: Put) -> PrefillPlan:
        """The plan of segments in row order without gaps, its tensors put on the device."""
        blocks = [
            (query, end, first, 0) for first, start, end in segments for query in range(start, end, BLOCK_Q)
        ]
        return cls(
            segments=tuple(segments),
            runs=tuple(_run(run, put) for run in _split(segments)),
            blocks=put(np.array(blocks, dtype=np.int32).reshape(-1, 4), torch.int32),
        )


def _split(segments: Sequence[Segment]) -> list[list[Segment]]:
    """A prompt that goes on from earlier rows begins a run: what precedes it has keys of its own."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if not runs or segment.first < segment.start:
            runs.append([])
        runs[-1].append(segment)
    return runs


def _run(segments: Sequence[Segment], put: Put) -> Run:
    start, first = segments[0].start, segments[0].first
    queries = [0, *(s.end - start for s in segments)]
    keys = [0, *(s.end - first for s in segments)]
    return Run(
        rows=slice(start, segments[-1].end),
        first_key=first,
        cu_seqlens_q=put(queries, torch.int32),
        cu_seqlens_k=put(keys, torch.int32),
        max_q=max(s.end - s.start for s in segments),
        max_k=max(s.end - s.first for s in segments),
    )
