"""Predicted beside measured seconds as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_lightning.perf.beside import Row, by_lane
from moe_lightning.perf.rates import Rates

if TYPE_CHECKING:
    from moe_lightning.llm import LLM

_NOTABLE = 0.15  # off by more than predictions usually are


def print_fullest(llm: LLM, rates: Rates) -> None:
    """Print seconds of each lane in the fullest pass: as the rates predict just that pass, and as they were."""
    timeline, facts = llm.fullest_pass, llm.fullest_facts
    if timeline is None or facts is None:
        return
    title = f"the fullest pass: {facts.num_decode} sequences decode, {facts.num_prompt} tokens of prompts"
    print_rows(title, by_lane(facts.predict(rates), timeline))


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print a line for each row; without the columns of predictions where nothing was predicted."""
    console = Console()
    console.print(Text(title, "bold"))  # as the table's title it would be wrapped to the table's width
    columns: dict[str, Callable[[Row], str | Text]] = {
        "": lambda row: row.name,
        "tasks": lambda row: str(row.count),
        "predicted s": lambda row: _seconds(row.predicted_s),
        "measured s": lambda row: _seconds(row.measured_s),
        "measured / predicted": _ratio,
    }
    if all(row.predicted_s is None for row in rows):
        columns = {name: value for name, value in columns.items() if "predicted" not in name}
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(value(row) for value in columns.values()))
    console.print(table)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ratio(row: Row) -> Text:
    if row.ratio is None:
        return Text("-")
    return Text(f"{row.ratio:.2f}", "bold" if abs(row.ratio - 1) > _NOTABLE else "")
