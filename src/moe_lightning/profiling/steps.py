"""How far a profile is, and where it was when it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moe_lightning.errors import DeviceError

Report = Callable[[str, int, int], None]  # what is measured now, parts done, parts in all


class Steps:
    """Counts the parts of a profile, whose number is known before.

    Attributes:
        total: parts in all.
        begun: those that have begun.
    """

    def __init__(self, total: int, report: Report) -> None:
        self.total, self.begun = total, 0
        self._report, self._part = report, ""
        self._start = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first part could begin."""
        return time.perf_counter() - self._start

    def begin(self, part: str) -> None:
        """Say what comes now; what came before is done."""
        self._report(part, self.begun, self.total)
        self._part = part
        self.begun += 1

    @contextmanager
    def named(self) -> Iterator[None]:
        """Failures of the GPU inside say what was measured."""
        try:
            yield
        except DeviceError as error:
            raise DeviceError(f"while measuring {self._part}: {error}") from error
