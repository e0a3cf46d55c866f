"""The verb `bench`: measures this machine."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction
from pathlib import Path

from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.cli.flags import add_engine_flags, engine_config, positive_count

SUMMARY = "measure the GPU kernels on this machine"
DESCRIPTION = (
    "Measures parts of the system on this machine, beside what its hardware and other software reach."
)
_KERNELS = (
    "Measures each GPU kernel at the shapes of real models: FLOP/s and bytes/s, their share of what a large matrix "
    "product and a copy reach in the same run, and the time that PyTorch needs for the same work. Every result is "
    "compared with float32 before it is timed."
)
_THROUGHPUT = (
    "Runs random prompts of a workload's lengths through the whole engine and says how many tokens it generates in "
    "a second, prompts included, beside the limit that link and memory of this machine set. With --load-format "
    "dummy no checkpoint is needed: a known name such as mixtral-8x7b will do."
)
_MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
_TOKENS = (1, 64, 128, 512, 2048, 8192)


def add_flags(parser: ArgumentParser) -> None:
    """Add what can be measured, each with its flags."""
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", required=True)
    kernels = subjects.add_parser("kernels", help="each GPU kernel", description=_KERNELS, allow_abbrev=False)
    kernels.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    kernels.add_argument(
        "--model",
        action="append",
        choices=_MODELS,
        help="shapes to measure with; may be repeated (default: all)",
    )
    kernels.add_argument(
        "--tokens", action="append", type=int, metavar="N", help=f"may be repeated (default: {_TOKENS})"
    )
    kernels.set_defaults(measure=_run_kernels)
    _add_throughput(subjects)


def _add_throughput(subjects: _SubParsersAction[ArgumentParser]) -> None:
    parser = subjects.add_parser(
        "throughput", help="generated tokens per second", description=_THROUGHPUT, allow_abbrev=False
    )
    add = parser.add_argument
    add("--workload", default="mtbench", choices=WORKLOADS, help="whose lengths (default: %(default)s)")
    add("--gen-len", type=positive_count, metavar="N", help="tokens of each answer (default: the workload's)")
    add(
        "--num-requests",
        type=positive_count,
        metavar="N",
        help="of the job (default: what fills KV memory twice)",
    )
    add(
        "--steady-state", type=positive_count, nargs="?", const=24, metavar="PASSES",
        help="measure so many passes (default: %(const)s) that begin with sequences of evenly spread ages, instead "
        "of a whole job",
    )  # fmt: skip
    add("--json", type=Path, metavar="PATH", help="write the result there")
    add_engine_flags(parser)
    parser.set_defaults(measure=_run_throughput)


def _run_throughput(args: Namespace) -> int:
    from moe_lightning.bench.machine import require_gpu  # imports torch

    require_gpu()
    from moe_lightning.bench.throughput import measure, to_text

    config = engine_config(args)
    work = workload(args.workload, args.gen_len, args.num_requests)
    found = measure(
        config,
        work,
        steady_passes=args.steady_state,
        show=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(to_text(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found.to_json(config), indent=1) + "\n", encoding="utf-8")
    return 0


def run(args: Namespace) -> int:
    """Measure, print, write; the exit status.

    Raises:
        MoELightningError: the machine lacks what is to be measured, or a result is wrong.
    """
    status: int = args.measure(args)
    return status


def _run_kernels(args: Namespace) -> int:
    from moe_lightning.bench.machine import require_gpu  # imports torch

    require_gpu()
    from moe_lightning.bench.kernels import measure_kernels, to_json  # imports Triton
    from moe_lightning.bench.result import to_table

    roofs, found = measure_kernels(
        args.model or _MODELS, args.tokens or _TOKENS, lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(f"roofs: {roofs.flops / 1e12:.0f} TFLOP/s, {roofs.bandwidth / 1e9:.0f} GB/s")
    print(to_table(found, roofs))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(to_json(roofs, found), indent=1) + "\n", encoding="utf-8")
    return 0
