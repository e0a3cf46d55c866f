"""The verb `profile`: measures what a planner has to know of this machine."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lightning.errors import ConfigError
from moe_lightning.units import format_duration, parse_bytes

if TYPE_CHECKING:
    from moe_lightning.hardware.kernel_times import ModelShape
    from moe_lightning.hardware.profile import Profile

SUMMARY = "measure this machine for planning, its lanes at work at once"
DESCRIPTION = (
    "Measures copies between host and GPU, attention on the CPU alone and beside copies, the GPU's kernels at the "
    "shapes of models, and what launching and handing over take; on a machine without a GPU, what its CPU does. It "
    "takes less than a minute. The result is kept in the user's cache directory and used until the machine, its "
    "driver, torch or the kernels change."
)
_MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="MODEL",
        help="shapes to measure with: a known name, a checkpoint or a config.json; may be repeated "
        f"(default: {' and '.join(_MODELS)})",
    )
    add("--json", type=Path, metavar="PATH", help="write the profile there too")
    add("--refresh", action="store_true", help="measure again, whatever is in the cache")
    add("--disk", type=Path, metavar="DIR", help="measure how fast the disk of this directory reads")
    add(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="GPU memory that the process may use, such as 2GiB (default: what 4 GiB of tensors take)",
    )


def run(args: Namespace) -> int:
    """Measure or read the cache, print, write; the exit status.

    Raises:
        ConfigError: a model is not known, or there is too little memory.
    """
    from moe_lightning.hardware.profile_cache import cache_path, save_profile
    from moe_lightning.profiling.shapes import shape_named

    shapes = [shape_named(model) for model in args.model or _MODELS]
    path = cache_path()
    profile = _cached_or_measured(args, shapes, path)
    print_profile(profile)
    print(f"measured {profile.created} in {format_duration(profile.took_s)}; cache: {path}")
    if args.json:
        save_profile(profile, args.json)
        print(f"wrote {args.json}")
    return 0


def _cached_or_measured(args: Namespace, shapes: list[ModelShape], path: Path) -> Profile:
    from moe_lightning.engine.identity import this_machine
    from moe_lightning.hardware.profile_cache import read_cache
    from moe_lightning.profiling.measure import measure_disk

    cached, reason = read_cache(path, this_machine())
    found = cached
    missing = [s for s in shapes if cached is None or not cached.has(s)]
    if args.refresh or missing:
        if cached is not None:
            names = ", ".join(s.name for s in missing)
            reason = "--refresh" if args.refresh else f"{path} has no numbers of {names}"
            if not args.refresh:  # what was there stays there
                shapes = [*cached.shapes, *missing]
        _say(f"measuring: {reason}")
        found = _measure(shapes, args.gpu_memory)
        if cached is not None:
            found = replace(found, disk=cached.disk)
        _keep(found, path)
    assert found is not None
    if args.disk and (args.refresh or found.disk is None or found.disk.path != str(args.disk.resolve())):
        _say(f"measuring the disk of {args.disk}")
        found = replace(found, disk=measure_disk(args.disk))
        _keep(found, path)
    return found


def _measure(shapes: list[ModelShape], gpu_memory: int | None) -> Profile:
    from moe_lightning.profiling import effort
    from moe_lightning.profiling.measure import measure

    with show_parts() as report:
        return measure(shapes, effort.FULL, gpu_memory=gpu_memory, report=report)


def _keep(profile: Profile, path: Path) -> None:
    from moe_lightning.hardware.profile_cache import save_profile

    try:
        save_profile(profile, path)
    except ConfigError as error:  # the numbers are there all the same
        _say(f"the profile is not kept: {error}")


def print_profile(profile: Profile) -> None:
    """Print tables, with rich where it is installed."""
    from moe_lightning.cli.profile_table import grids, to_text

    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("\n\n".join(to_text(grid) for grid in grids(profile)))
        return
    console = Console()
    for grid in grids(profile):
        console.print(
            Text(grid.title, "bold")
        )  # as the table's title it would be wrapped to the table's width
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(grid.header):
            table.add_column(name, justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*(Text(text) for text in row))
        console.print(table, "")


@contextmanager
def show_parts() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows on stderr what is measured: a bar on a terminal, else a line as each part begins."""
    if not sys.stderr.isatty():
        start = time.perf_counter()
        yield lambda part, done, total: _say(
            f"{time.perf_counter() - start:5.1f} s {done + 1}/{total} {part}"
        )
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda part, done, total: progress.update(task, total=total, completed=done, description=part)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error
