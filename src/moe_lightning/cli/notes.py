"""Remarks on stderr."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Say something that the user may want to know; nothing has to be done about it."""
    print(f"note: {text}", file=sys.stderr)
