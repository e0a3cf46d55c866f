"""Many cells of the throughput table in one process, as many as fit into a time limit.

Weights are random and brought into memory once; from cell to cell only what stays on the GPU, and memory where KV
was, is filled anew. Each result is written as soon as it is there, and a cell whose file is there is not measured
again: so the same command, run again, goes on where it stopped.

    python benchmarks/throughput_table.py --out benchmarks/results/table --time-limit 560
    python benchmarks/throughput_table.py --out benchmarks/results/table --cell 24GiB,128,steady --repeat 3
    python benchmarks/make_tables.py --results benchmarks/results/table
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from cells import CURVES, TABLE, CellSpec

from moe_lightning.bench.machine import seconds_since_start
from moe_lightning.bench.models import spec_of
from moe_lightning.bench.report import to_json, to_text
from moe_lightning.bench.session import Session
from moe_lightning.bench.throughput import measure
from moe_lightning.config import EngineConfig
from moe_lightning.errors import MoELightningError
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.units import parse_bytes

_LOAD_S, _NEXT_LOAD_S, _CHECK_S = 60.0, 20.0, 15.0  # guesses, for what fits into the time that is left
_PASS_S = 2.0  # where no plan says
_SLOWER = 1.2  # than the plan promises
_OTHER_PASSES = 6  # before and after those that a steady state counts


def main() -> int:
    args = _arguments()
    is_one = args.cell is not None
    texts = args.cell or (*TABLE, *CURVES)
    # One after the other, as the same plan finds its pages in place.
    todo = [(CellSpec.parse(text), repetition) for text in texts for repetition in range(args.repeat)]
    todo = [c for c in todo if not (args.out / c[0].file_name(_name(args), c[1])).exists()]
    print(f"{len(todo)} results to measure" + ("" if is_one else " of the default cells"), flush=True)
    config = EngineConfig(
        args.model, load_format="dummy", device=args.device, host_memory=args.host_memory,
        executor=args.executor,
    )  # fmt: skip
    session = Session(config, spec_of(args.model, args.num_layers), shares_memory=True)
    is_first, failures = True, 0
    for cell, repetition in todo:
        setting, work = _setting(config, cell), cell.work
        num_checked = args.check if repetition == 0 else 0
        try:
            if args.time_limit - seconds_since_start() < _NEXT_LOAD_S:
                print("no time is left", flush=True)
                break
            needed = _seconds(session, setting, cell, work, args, is_first, num_checked)
            left = args.time_limit - seconds_since_start()
            if needed > left:
                print(f"{cell}: skipped, {needed:.0f} s needed and {left:.0f} s left", flush=True)
                continue
            failures += not _measure(args, session, setting, cell, work, repetition, num_checked)
            is_first = False
        except MoELightningError as error:
            print(f"{cell}: {error}", file=sys.stderr, flush=True)
            failures += 1
        session.unload()
    return 1 if failures else 0


def _measure(
    args: argparse.Namespace,
    session: Session,
    setting: EngineConfig,
    cell: CellSpec,
    work: Workload,
    repetition: int,
    num_checked: int,
) -> bool:
    """Measure and write a cell; whether the answers that were checked are right."""
    start = time.perf_counter()
    print(f"== {cell}", flush=True)
    effort = cell.effort(args.steady_passes, num_checked)
    show = (lambda line: print(line, flush=True)) if args.verbose else (lambda line: None)
    found = measure(setting, work, effort, session, show)
    values = to_json(found, setting) | {"cell": str(cell), "repetition": repetition}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / cell.file_name(_name(args), repetition)
    part = path.with_suffix(".part")  # a file that is there is whole
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.rename(path)
    print(to_text(found))
    print(f"-- {path.name}, {time.perf_counter() - start:.0f} s", flush=True)
    return all(m.check is None or m.check.is_equal for m in found.measured)


def _setting(config: EngineConfig, cell: CellSpec) -> EngineConfig:
    changes = {"gpu_memory": cell.gpu, "max_num_seqs": cell.seqs}
    if cell.host is not None:
        changes["host_memory"] = cell.host
    return replace(config, **changes)


def _seconds(
    session: Session,
    setting: EngineConfig,
    cell: CellSpec,
    work: Workload,
    args: argparse.Namespace,
    is_first: bool,
    num_checked: int,
) -> float:
    """What the cell will probably take, by its plan."""
    plan = session.plan(work, setting)
    seconds = _LOAD_S if is_first else _NEXT_LOAD_S
    pass_s = plan.prediction.pass_s if plan.prediction else _PASS_S
    if cell.kind != "job":
        seconds += _SLOWER * pass_s * (args.steady_passes + _OTHER_PASSES) + (_CHECK_S if num_checked else 0)
    if cell.kind != "steady":
        num_seqs = num_decoding(plan.policy, work)
        n = work.num_requests or 2 * num_seqs
        rate = plan.prediction.job_tokens_per_s if plan.prediction else num_seqs / pass_s
        seconds += _SLOWER * n * work.gen_len / rate + (_CHECK_S if num_checked else 0)
    return seconds


def _name(args: argparse.Namespace) -> str:
    """Of the model, in file names."""
    name = Path(args.model).name
    return name if args.num_layers is None else f"{name}-{args.num_layers}-layers"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="mixtral-8x7b", help="a known name or a config (default: %(default)s)")
    add("--num-layers", type=int)
    add(
        "--cell", action="append", metavar="GPU,GEN,KIND[,...]", help="may be repeated (default: the table's)"
    )
    add("--out", type=Path, required=True, help="directory of results")
    add("--repeat", type=int, default=1, help="results of each cell (default: %(default)s)")
    add("--steady-passes", type=int, default=20)
    add("--check", type=int, default=2, help="answers to recompute in a cell's first repetition")
    add("--time-limit", type=float, default=560.0, help="seconds of the whole process (default: %(default)s)")
    add("--host-memory", type=parse_bytes)
    add("--device", default="auto")
    add("--executor", default="auto")
    add("--verbose", action="store_true", help="a line for each pass")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
