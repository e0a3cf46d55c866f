"""Where a job reads and writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from moe_lightning.errors import JobError


@dataclass(frozen=True)
class JobFiles:
    """Where a job reads and writes; the error file is by default `out.errors.jsonl` beside `out.jsonl`.

    `trace` is written once, when the job is done; None for no trace.
    """

    input: Path
    output: Path
    errors: Path
    trace: Path | None = None

    @classmethod
    def at(
        cls,
        input: str | Path,
        output: str | Path,
        errors: str | Path | None = None,
        trace: str | Path | None = None,
    ) -> JobFiles:
        """The files of a job.

        Raises:
            JobError: two of them are one, or one to write is a directory, read-only or in no directory.
        """
        output = Path(output)
        errors = Path(errors) if errors is not None else output.with_name(f"{output.stem}.errors.jsonl")
        files = cls(Path(input), output, errors, Path(trace) if trace is not None else None)
        given = {name: path for name, path in vars(files).items() if path is not None}
        for (a, path), (b, other) in combinations(given.items(), 2):
            if _is_same(path, other):
                raise JobError(f"{a} and {b} are both {path}; choose another path for {b}")
        for name, path in given.items():
            if name != "input":
                _require_writable(path)
        return files


def _is_same(a: Path, b: Path) -> bool:
    if a.exists() and b.exists():
        return os.path.samefile(a, b)
    return a.resolve() == b.resolve()


def _require_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise JobError(f"cannot write {path}: there is no directory {path.parent}; create it")
    if path.is_dir():
        raise JobError(f"cannot write {path}: it is a directory; give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise JobError(f"cannot write {path}: permission denied; choose another path or change its mode")
