"""The subject `throughput` of the verb `bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path

from moe_lightning.cli.bench_flags import add_workload_flags, setting, tell, write_json
from moe_lightning.cli.flags import add_engine_flags, positive_count

_DESCRIPTION = (
    "Runs random prompts of a workload's lengths through the whole engine and says how many tokens it generates in "
    "a second, prompts included, beside the limit that link and memory of this machine set and what the plan "
    "promised. With --load-format dummy no checkpoint is needed: a known name such as mixtral-8x7b will do."
)


def add_subject(subjects: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subject with its flags."""
    parser = subjects.add_parser(
        "throughput", help="generated tokens per second", description=_DESCRIPTION, allow_abbrev=False
    )
    add_workload_flags(parser)
    add = parser.add_argument
    add(
        "--steady-state", type=positive_count, nargs="?", const=24, metavar="PASSES",
        help="measure so many passes (default: %(const)s) that begin with sequences of evenly spread ages, instead "
        "of a whole job",
    )  # fmt: skip
    add("--job", action="store_true", help="measure a whole job too, where --steady-state is given")
    add(
        "--check", type=positive_count, nargs="?", const=4, metavar="ANSWERS",
        help="recompute so many answers of the run (default: %(const)s) alone by plain PyTorch, layer by layer",
    )  # fmt: skip
    add("--svg", type=Path, metavar="PATH", help="draw a part of a recorded pass")
    add_engine_flags(parser)
    parser.set_defaults(measure=_run)


def _run(args: Namespace) -> int:
    config, spec, work = setting(args)
    from moe_lightning.bench.cell import Effort  # imports torch
    from moe_lightning.bench.report import to_json, to_text
    from moe_lightning.bench.session import Session
    from moe_lightning.bench.throughput import measure

    effort = Effort(args.steady_state or 0, args.job or not args.steady_state, args.check or 0)
    found = measure(config, work, effort, Session(config, spec, shares_memory=False), tell)
    print(to_text(found))
    if args.json:
        write_json(args.json, to_json(found, config))
    timelines = found.measured[0].timelines
    if args.svg and timelines:
        from moe_lightning.pipeline.draw import to_svg

        # A few layers from the middle: of a whole pass nobody would see a task.
        last = timelines[-1]
        part = last.window(last.start + 0.40 * last.span, last.start + 0.52 * last.span)
        args.svg.write_text(to_svg(part), encoding="utf-8")
    return 0 if all(m.check is None or m.check.is_equal for m in found.measured) else 1
