"""The verb `trace`: draws the timeline of a pass."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_lightning.cli.beside_table import print_rows
from moe_lightning.cli.flags import positive_count
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile_cache import cache_path, load_profile
from moe_lightning.models.registry import resolve
from moe_lightning.perf.beside import Row, by_kind
from moe_lightning.perf.default_policy import Memory, default_policy
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.predict import predict
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates, Rates
from moe_lightning.perf.refit import kind_seconds
from moe_lightning.pipeline.shape import pass_shape
from moe_lightning.pipeline.task import TaskKind
from moe_lightning.pipeline.timeline import Timeline

SUMMARY = "draw when copies, GPU and CPU worked during a pass"
DESCRIPTION = (
    "Draws a trace that `run-batch --trace` recorded, or the pass that is predicted for a model on a machine "
    "(--model and --hardware; nothing needs to be downloaded), as text, as an SVG Gantt chart, or as JSON that "
    "chrome://tracing and ui.perfetto.dev open. Without a format, as text. Below the text of a recorded pass stand "
    "the seconds of each kind of task, beside those of the job's plan, or a prediction for --model and --hardware."
)


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("trace", nargs="?", type=Path, metavar="FILE", help="recorded trace (JSON)")
    parser.add_argument("--text", action="store_true", help="print a chart of letters")
    parser.add_argument(
        "--width", type=positive_count, default=100, metavar="N", help="columns of the text (default: 100)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a Gantt chart")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write Chrome and Perfetto JSON")
    group = parser.add_argument_group("predicted pass")
    add = group.add_argument
    add("--model", metavar="MODEL", help="checkpoint, config.json or a name such as mixtral-8x7b")
    machine = "machine, such as t4, l4, h100-sxm (default: l4); for a recorded pass also this: see `profile`"
    add("--hardware", default="l4", metavar="NAME", help=machine)
    add("--num-seqs", type=positive_count, default=1024, metavar="N", help="decode sequences (default: 1024)")
    add(
        "--micro-batch-size",
        type=positive_count,
        default=64,
        metavar="N",
        help="of them together (default: 64)",
    )
    add("--context", type=positive_count, default=256, metavar="N", help="tokens each holds (default: 256)")
    add("--layers", type=positive_count, metavar="N", help="only so many layers (default: all)")
    add("--schedule", default="cgopipe", metavar="NAME", help="cgopipe or a baseline (default: cgopipe)")


def run(args: Namespace) -> int:
    """Draw the trace in each format that was asked for.

    Raises:
        ConfigError: the file is no trace, or a drawing cannot be written.
    """
    from moe_lightning.pipeline.draw import from_chrome, to_chrome, to_svg, to_text

    if args.trace is None and args.model is None:
        raise ConfigError("give a recorded trace FILE, or --model for a predicted pass")
    trace = load_json(args.trace) if args.trace else None
    timeline = predicted(args) if trace is None else from_chrome(trace)
    rows = None if trace is None else beside(trace, timeline, args)
    if args.svg:
        write_text(args.svg, to_svg(timeline))
    if args.chrome:
        write_text(args.chrome, json.dumps(to_chrome(timeline, trace and trace["otherData"])))
    if args.text or not (args.svg or args.chrome):
        print(to_text(timeline, args.width))
        if rows:
            print()
            print_rows("seconds of all tasks", rows)
    for path in (args.svg, args.chrome):
        if path:
            print(f"wrote {path}", file=sys.stderr)
    return 0


def beside(trace: dict[str, Any], measured: Timeline, args: Namespace) -> list[Row] | None:
    """What was predicted beside what was measured; None for a trace that is not of a pass that ran.

    Raises:
        ConfigError: a prediction is asked for, and the trace does not say what its pass was.
    """
    extra = trace["otherData"]
    if args.model:
        facts = PassFacts.from_json(extra.get("pass", {}), resolve(args.model))
        return by_kind(kind_seconds(facts.predict(_rates(args.hardware))), measured)
    if "pass" not in extra:
        return None
    try:
        by_plan = {TaskKind(kind): float(seconds) for kind, seconds in extra.get("predicted", {}).items()}
    except (ValueError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"the trace's prediction is no seconds by kind of task ({e}); record it anew"
        ) from e
    return by_kind(by_plan, measured)


def _rates(name: str) -> Rates:
    """Of a machine by name, or of this one as `profile` measured it."""
    if name == "this":
        return MeasuredRates(load_profile(cache_path()))
    return DatasheetRates(preset(name))


def predicted(args: Namespace) -> Timeline:
    """The decode pass that is predicted under the default policy, with the next pass's first pages loaded.

    Raises:
        MoELightningError: unknown names, or the model does not fit the machine.
    """
    hardware, spec = preset(args.hardware), resolve(args.model)
    dtype = "float16" if "bfloat16" not in hardware.gpu.flops else spec.dtype
    memory = Memory(hardware.cpu.memory_bytes, int(0.9 * hardware.gpu.memory_bytes))
    try:
        policy, _ = default_policy(spec, 2, memory, max_num_seqs=args.num_seqs)
    except NoFeasiblePolicyError as e:
        raise NoFeasiblePolicyError(
            e.problem, "Lower --num-seqs or name a larger machine as --hardware"
        ) from e
    if args.layers:  # under the policy of the whole model: a few layers alone would all be resident
        spec = replace(spec, num_layers=min(args.layers, spec.num_layers))
    full, rest = divmod(args.num_seqs, args.micro_batch_size)
    tokens = [args.micro_batch_size] * full + [rest] * (rest > 0)
    shape = pass_shape(policy, spec.experts.num_experts, 0, len(tokens), num_layers=spec.num_layers)
    return predict(
        spec, shape, tokens, args.context, hardware,
        pages_per_expert=policy.pages_per_expert, dtype=dtype, schedule=args.schedule,
    )  # fmt: skip


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
