"""How far a batch job is, on the terminal or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moe_lightning.jobs import JobStatus
from moe_lightning.units import format_duration

Update = Callable[[JobStatus], None]
_LOG_SECONDS = 10.0


@contextmanager
def show_progress() -> Iterator[Update]:
    """A function that shows a status on stderr: a bar on a terminal, else a line about every ten seconds."""
    if not sys.stderr.isatty():
        yield log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("")

    def update(status: JobStatus) -> None:
        progress.start()  # not before the first status: loading the model draws a bar of its own
        progress.update(task, total=status.num_total, completed=status.num_done, description=describe(status))

    try:
        yield update
    finally:
        progress.stop()


def log_lines(seconds: float = _LOG_SECONDS) -> Update:
    """A function that writes a status to stderr unless it did so less than `seconds` ago."""
    shown_at = time.monotonic()

    def update(status: JobStatus) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= seconds:
            shown_at = time.monotonic()
            print(
                f"{status.num_done}/{status.num_total} done, {describe(status)}", file=sys.stderr, flush=True
            )

    return update


def describe(status: JobStatus) -> str:
    """Rate, remaining time and load in a few words."""
    parts = [f"{tokens_per_second(status):.1f} tokens/s"]
    remaining = _seconds_left(status)
    if remaining is not None:
        parts.append(f"ETA {format_duration(remaining)}" if remaining >= 1 else "ETA 0 s")
    return ", ".join([*parts, f"{status.num_running} running", f"{status.num_waiting} waiting"])


def _seconds_left(status: JobStatus) -> float | None:
    """As tokens go: most answers of a job end near its end, and many are nearly done before."""
    if not status.ended_tokens or not status.generated_tokens:
        return None
    num_lines = status.num_total - status.num_resumed - status.num_failed
    expected = num_lines * status.ended_tokens / status.num_ended
    return max(0.0, expected - status.generated_tokens) * status.seconds / status.generated_tokens


def tokens_per_second(status: JobStatus) -> float:
    """Generated tokens per second of this run's passes."""
    return status.generated_tokens / status.seconds if status.seconds else 0.0


def summarize(status: JobStatus) -> str:
    """What this run did, in one clause each."""
    num_answered = status.num_done - status.num_resumed - status.num_failed
    counts = {
        "answered earlier": status.num_resumed - status.num_failed_earlier,
        "failed earlier": status.num_failed_earlier,
    }
    earlier = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return (
        f"{num_answered} answered, {status.num_failed} failed{earlier}; {status.prompt_tokens} prompt and "
        f"{status.generated_tokens} generated tokens in {format_duration(status.seconds)} "
        f"({tokens_per_second(status):.1f} tokens/s)"
    )
