"""Predicted beside measured seconds as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_lightning.perf.beside import Row

_NOTABLE = 0.15  # off by more than predictions usually are


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print a line for each row."""
    console = Console()
    console.print(Text(title, "bold"))  # as the table's title it would be wrapped to the table's width
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(("", "tasks", "predicted s", "measured s", "measured / predicted")):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(
            row.name, str(row.count), _seconds(row.predicted_s), _seconds(row.measured_s), _ratio(row)
        )
    console.print(table)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ratio(row: Row) -> Text:
    if row.ratio is None:
        return Text("-")
    return Text(f"{row.ratio:.2f}", "bold" if abs(row.ratio - 1) > _NOTABLE else "")
