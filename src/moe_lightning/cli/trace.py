"""The verb `trace`: draws the timeline of a pass."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from moe_lightning.cli.flags import positive_count
from moe_lightning.errors import ConfigError

SUMMARY = "draw when copies, GPU and CPU worked during a pass"
DESCRIPTION = (
    "Draws a trace that `run-batch --trace` recorded, as text, as an SVG Gantt chart, or as JSON that "
    "chrome://tracing and ui.perfetto.dev open. Without a format, as text."
)


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("trace", type=Path, metavar="FILE", help="recorded trace (JSON)")
    parser.add_argument("--text", action="store_true", help="print a chart of letters")
    parser.add_argument(
        "--width", type=positive_count, default=100, metavar="N", help="columns of the text (default: 100)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a Gantt chart")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write Chrome and Perfetto JSON")


def run(args: Namespace) -> int:
    """Draw the trace in each format that was asked for.

    Raises:
        ConfigError: the file is no trace, or a drawing cannot be written.
    """
    from moe_lightning.pipeline.draw import from_chrome, to_chrome, to_svg, to_text

    timeline = from_chrome(load_json(args.trace))
    if args.svg:
        write_text(args.svg, to_svg(timeline))
    if args.chrome:
        write_text(args.chrome, json.dumps(to_chrome(timeline)))
    if args.text or not (args.svg or args.chrome):
        print(to_text(timeline, args.width))
    for path in (args.svg, args.chrome):
        if path:
            print(f"wrote {path}", file=sys.stderr)
    return 0


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: there is none.
    """
    remedy = "give a file that `moe-lightning run-batch --trace FILE` wrote"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; {remedy}") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON ({e}); {remedy}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; {remedy}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another path") from e
