"""Whether passes take what was predicted of them, told by many rather than by one."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 8  # passes: half of them must agree, so that a few hiccups mean nothing
TOLERANCE = 0.15  # of the predicted seconds: predictions are seldom better


class Drift:
    """The ratios of measured to predicted seconds of the last passes."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=WINDOW)

    def note(self, ratio: float) -> None:
        """A pass took so many times what was predicted."""
        self._ratios.append(ratio)

    def forget(self) -> None:
        """What was seen was under another plan."""
        self._ratios.clear()

    @property
    def ratio(self) -> float:
        """The median of the last passes; 1 until there are enough of them."""
        return median(self._ratios) if len(self._ratios) == WINDOW else 1.0

    @property
    def is_large(self) -> bool:
        """Passes are slower or faster than predicted, by more than predictions are usually off."""
        return not is_close(self.ratio, 1.0)


def is_close(ratio: float, other: float) -> bool:
    """Whether two ratios differ by no more than the tolerance, whichever is larger."""
    return max(ratio, other) <= (1 + TOLERANCE) * min(ratio, other)
