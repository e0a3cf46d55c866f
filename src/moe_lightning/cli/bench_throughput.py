"""The subject `throughput` of the verb `bench`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path
from typing import Any

from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.cli.flags import add_engine_flags, engine_config, positive_count
from moe_lightning.config import EngineConfig
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.workload import Workload

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


def add_workload_flags(parser: ArgumentParser) -> None:
    """Flags that say what is computed, and with which layers; and where the result goes."""
    add = parser.add_argument
    add("--workload", default="mtbench", choices=WORKLOADS, help="whose lengths (default: %(default)s)")
    add(
        "--input", type=Path, metavar="PATH",
        help="lengths of a batch file, or of MT-Bench's question.jsonl, instead",
    )  # fmt: skip
    add("--gen-len", type=positive_count, metavar="N", help="tokens of each answer (default: the workload's)")
    add(
        "--num-requests",
        type=positive_count,
        metavar="N",
        help="of the job (default: what fills KV memory twice)",
    )
    add("--num-layers", type=positive_count, metavar="N", help="only the first layers, with random weights")
    add("--json", type=Path, metavar="PATH", help="write the result there")


def setting(args: Namespace) -> tuple[EngineConfig, ModelSpec, Workload]:
    """What the flags ask for.

    Raises:
        MoELightningError: they ask for something that is not there.
    """
    from moe_lightning.bench.models import spec_of

    config = engine_config(args)
    spec = spec_of(config.model, args.num_layers, is_dummy=config.load_format == "dummy")
    if config.device != "cpu":
        from moe_lightning.bench.machine import require_gpu  # imports torch

        require_gpu()
    if args.input is None:
        return config, spec, workload(args.workload, args.gen_len, args.num_requests)
    from moe_lightning.bench.file_workload import workload_of_file

    tokenizer = config.tokenizer or (config.model if Path(config.model).is_dir() else None)
    return config, spec, workload_of_file(args.input, tokenizer, args.gen_len, args.num_requests)


def tell(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A result file, its directory made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
