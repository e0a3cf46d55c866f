"""What earlier runs of a job have written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from moe_lightning.errors import JobError
from moe_lightning.jobs.files import LineFile
from moe_lightning.jobs.survey import Survey


@dataclass(frozen=True)
class Written:
    """The job's lines that a file holds: their ids in the order of the file, and the models that answered."""

    ids: tuple[str, ...] = ()
    models: frozenset[str] = frozenset()


def written(survey: Survey, file: LineFile, *, may_be_shared: bool) -> Written:
    """The lines of the job in `file`, after its torn last line is cut.

    `may_be_shared`: lines of other jobs are left alone, as in an error file.

    Raises:
        JobError: the file is of another job, or a body has changed since; nothing has been cut then.
    """
    expected = survey.valid_ids | survey.bad_ids | survey.later_ids
    ids, models = dict[str, None](), set[str]()
    for number, record in records(file):
        line_id, custom_id = record["id"], record["custom_id"]
        if line_id in expected:
            ids[line_id] = None
            models |= _model(record)
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
    return Written(tuple(ids), frozenset(models))


def records(file: LineFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and content of each whole line; `id` is a string and `custom_id` is there.

    Raises:
        JobError: a line is none that a job writes.
    """
    for number, raw in file.lines():
        try:
            record = json.loads(raw)
            yield number, {**record, "id": str(record["id"]), "custom_id": record["custom_id"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JobError(
                f"line {number} of {file.path} is not a batch answer; remove the line, choose another path, "
                "or give --no-resume to overwrite the file"
            ) from None


def _model(record: dict[str, Any]) -> set[str]:
    try:
        return {str(record["response"]["body"]["model"])}
    except (KeyError, TypeError):  # an error has no response
        return set()


def is_in_order(survey: Survey, answered: tuple[str, ...]) -> bool:
    """Whether the answers are in the order of the input, and what is not answered yet comes after all of them."""
    place = {line_id: i for i, line_id in enumerate(chain(survey.valid_ids, survey.later_ids))}
    places, seen = [place[line_id] for line_id in answered if line_id in place], set(answered)
    last = max(places, default=-1)
    is_missing = any(place[line_id] < last for line_id in survey.valid_ids if line_id not in seen)
    return places == sorted(places) and not is_missing
