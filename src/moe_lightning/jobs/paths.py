"""Where a job reads and writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moe_lightning.errors import JobError


@dataclass(frozen=True)
class JobFiles:
    """Where a job reads and writes; the error file is by default `out.errors.jsonl` beside `out.jsonl`."""

    input: Path
    output: Path
    errors: Path

    @classmethod
    def at(cls, input: str | Path, output: str | Path, errors: str | Path | None = None) -> JobFiles:
        """The files of a job.

        Raises:
            JobError: two of them are one, or a directory to write to is missing or read-only.
        """
        output = Path(output)
        errors = Path(errors) if errors is not None else output.with_name(f"{output.stem}.errors.jsonl")
        files = cls(Path(input), output, errors)
        for a, b in (("input", "output"), ("input", "errors"), ("output", "errors")):
            if _is_same(getattr(files, a), getattr(files, b)):
                raise JobError(f"{a} and {b} are both {getattr(files, a)}; choose another path for {b}")
        for path in (output, errors):
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
