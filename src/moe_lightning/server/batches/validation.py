"""Whether a batch can begin: a first look at all lines of its input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_lightning.jobs.lines import BadLine, LineRules, read_envelopes
from moe_lightning.server.batches.objects import BatchError

_SHOWN_ERRORS = 20


@dataclass(frozen=True)
class Verdict:
    """Lines of an input, and why the batch cannot begin, if it cannot."""

    num_lines: int
    errors: tuple[BatchError, ...] = ()


def judge(path: Path, rules: LineRules, max_lines: int) -> Verdict:
    """Look at all lines; one that is wrong stands in the way of no other, so an input is refused only as a whole.

    Raises:
        OSError: the input cannot be read.
    """
    num_lines, num_bad, errors = 0, 0, list[BatchError]()
    with path.open("rb") as file:
        for line in read_envelopes(file, rules):
            num_lines += 1
            if num_lines > max_lines:
                message = f"the input has more than {max_lines} lines; split it into several batches"
                return Verdict(num_lines, (BatchError(code="too_many_requests", message=message),))
            if isinstance(line, BadLine):
                num_bad += 1
                if len(errors) < _SHOWN_ERRORS:
                    errors.append(BatchError(code=line.code, message=line.message, line=line.number))
    if num_lines == 0:
        message = "the input has no requests; write one JSON object per line"
        return Verdict(0, (BatchError(code="empty_file", message=message),))
    return Verdict(num_lines, tuple(errors) if num_bad == num_lines else ())
