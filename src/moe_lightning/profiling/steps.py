"""How far a profile is."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]  # what is measured now, parts done, parts in all


class Steps:
    """Counts the parts of a profile, whose number is known before.

    Attributes:
        total: parts in all.
        begun: those that have begun.
    """

    def __init__(self, total: int, report: Report) -> None:
        self.total, self.begun = total, 0
        self._report = report

    def begin(self, part: str) -> None:
        """Say what comes now; what came before is done."""
        self._report(part, self.begun, self.total)
        self.begun += 1
