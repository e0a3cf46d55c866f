"""The verb `bench`: measures this machine."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from moe_lightning.cli import bench_schedules, bench_throughput
from moe_lightning.cli.bench_flags import write_json

SUMMARY = "measure throughput, schedules and kernels on this machine"
DESCRIPTION = (
    "Measures parts of the system on this machine, beside what its hardware and other software reach."
)
_KERNELS = (
    "Measures each GPU kernel at the shapes of real models: FLOP/s and bytes/s, their share of what a large matrix "
    "product and a copy reach in the same run, and the time that PyTorch needs for the same work. Every result is "
    "compared with float32 before it is timed."
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
    bench_throughput.add_subject(subjects)
    bench_schedules.add_subject(subjects)


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
        write_json(args.json, to_json(roofs, found))
    return 0
