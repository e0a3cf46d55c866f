"""What a job is about, before a model is loaded: its input's lines, and which of them are done."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe_lightning.errors import JobError
from moe_lightning.jobs.files import LineFile
from moe_lightning.jobs.lines import BadLine, read_batch


@dataclass(frozen=True)
class Survey:
    """All lines of an input file.

    `valid_ids` and `bad_ids` are those of the lines that the job covers, `later_ids` those past its limit.
    The job ends with line `last_line`, the input with byte `size`. `models` are some of the names in bodies.
    """

    valid_ids: frozenset[str]
    bad_ids: frozenset[str]
    later_ids: frozenset[str]
    custom_ids: frozenset[str]
    last_line: int
    size: int
    models: tuple[str, ...]

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
    valid, bad, later, custom_ids = (set[str]() for _ in range(4))
    models: dict[str, None] = {}
    last_line = 0
    for line in read_batch(file, size):
        if line.custom_id is not None:
            custom_ids.add(line.custom_id)
        if limit is not None and len(valid) == limit:
            later.add(line.line_id)
            continue
        last_line = line.number
        if isinstance(line, BadLine):
            bad.add(line.line_id)
            continue
        valid.add(line.line_id)
        if line.call.model is not None and len(models) < 4:
            models[line.call.model] = None
    if not valid and not bad:
        raise JobError(f"{file.name} has no requests; write one JSON object per line")
    ids = (frozenset(valid), frozenset(bad), frozenset(later), frozenset(custom_ids))
    return Survey(*ids, last_line, size, tuple(models))


def done_ids(survey: Survey, file: LineFile, *, may_be_shared: bool) -> set[str]:
    """Ids of the lines that `file` answers, after its torn last line is cut.

    `may_be_shared`: lines of other jobs are left alone, as in an error file.

    Raises:
        JobError: the file is of another job, or a body has changed since; nothing has been cut then.
    """
    expected = survey.valid_ids | survey.bad_ids | survey.later_ids
    done = set()
    for number, line_id, custom_id in _answers(file):
        if line_id in expected:
            done.add(line_id)
        elif custom_id in survey.custom_ids:
            raise JobError(
                f"the request {custom_id!r} has changed since line {number} of {file.path} answered it; "
                "give it a new custom_id, or remove that line, or give --no-resume to discard all answers"
            )
        elif not may_be_shared:
            raise JobError(
                f"{file.path} answers {custom_id!r} (line {number}), which is not in the input: it is of "
                "another job; choose another -o, or give --no-resume to overwrite it"
            )
    file.cut_torn_line()
    return done


def _answers(file: LineFile) -> Iterator[tuple[int, str, str | None]]:
    for number, raw in file.lines():
        try:
            record = json.loads(raw)
            yield number, str(record["id"]), record["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JobError(
                f"line {number} of {file.path} is not a batch answer; remove the line, choose another path, "
                "or give --no-resume to overwrite the file"
            ) from None
