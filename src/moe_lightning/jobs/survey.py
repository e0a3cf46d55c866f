"""What a job is about, before a model is loaded: the lines of its input."""

from __future__ import annotations

import os
import stat
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe_lightning.errors import JobError
from moe_lightning.jobs.lengths import Lengths
from moe_lightning.jobs.lines import BadLine, read_batch


@dataclass(frozen=True)
class Survey:
    """All lines of an input file.

    `valid_ids` and `bad_ids` are those of the lines that the job covers, `later_ids` those past its limit, each in
    the order of the input. The job ends with line `last_line`, the input with byte `size`. `models` are some of the
    names in bodies; `lengths` tells how long the valid lines are.
    """

    valid_ids: Set[str]
    bad_ids: Set[str]
    later_ids: Set[str]
    custom_ids: frozenset[str]
    last_line: int
    size: int
    models: tuple[str, ...]
    lengths: Lengths

    @property
    def num_lines(self) -> int:
        """Lines that the job covers."""
        return len(self.valid_ids) + len(self.bad_ids)


def open_input(path: Path) -> BinaryIO:
    """The input file, open for reading.

    Raises:
        JobError: it is missing, unreadable or no regular file.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as e:
        raise JobError(f"cannot read {path}: {e.strerror}; give a JSONL file of requests") from e
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise JobError(f"{path} is not a regular file; a job reads its input twice, so save it to a file first")


def survey_input(file: BinaryIO, limit: int | None = None) -> Survey:
    """All lines of the input; the job covers them up to the `limit`-th valid one.

    Raises:
        JobError: there is no line in it.
    """
    size = os.fstat(file.fileno()).st_size
    custom_ids: set[str] = set()
    valid, bad, later, models = (dict[str, None]() for _ in range(4))  # as sets that keep an order
    last_line, lengths = 0, Lengths()
    for line in read_batch(file, size):
        if line.custom_id is not None:
            custom_ids.add(line.custom_id)
        if limit is not None and len(valid) == limit:
            later[line.line_id] = None
            continue
        last_line = line.number
        if isinstance(line, BadLine):
            bad[line.line_id] = None
            continue
        valid[line.line_id] = None
        lengths.add(line)
        if line.call.model is not None and len(models) < 4:
            models[line.call.model] = None
    if not valid and not bad:
        raise JobError(f"{file.name} has no requests; write one JSON object per line")
    return Survey(
        valid.keys(), bad.keys(), later.keys(), frozenset(custom_ids), last_line, size, tuple(models), lengths
    )
