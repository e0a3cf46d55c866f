"""How fast pages come in passes, by what runs beside them, and in loops over the same memory in the same process.

Passes of a steady state, whole and with a part of their tasks left out (their answers mean nothing then); each
page is counted by whether the CPU attended and the GPU computed while it came. If loops and passes agree, what
slows pages is not in the passes. The loops take some 8 GiB of GPU memory beside the cell's.

    python benchmarks/page_times.py --cell 24GiB,128,steady --json page_times.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cells import CellSpec
from contention import Machine, conditions

from moe_lightning.bench.machine import facts, require_gpu
from moe_lightning.bench.models import spec_of
from moe_lightning.bench.passes import Source, begin_midway, run_passes
from moe_lightning.bench.session import Loaded, Session
from moe_lightning.bench.throughput import page_bytes
from moe_lightning.bench.workloads import workload
from moe_lightning.config import EngineConfig
from moe_lightning.errors import ConfigError
from moe_lightning.perf.workload import num_decoding
from moe_lightning.pipeline.task import Task, TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.runtime.runner import TaskRunner

GPU_KINDS = (TaskKind.PRE_ATTENTION, TaskKind.POST_ATTENTION, TaskKind.PREFILL_ATTENTION, TaskKind.EXPERTS)
COPIES = (TaskKind.OFFLOAD_QKV, TaskKind.LOAD_HIDDEN)
LEFT_OUT: dict[str, tuple[TaskKind, ...]] = {
    "passes": (),
    "without attention": (TaskKind.ATTENTION,),
    "without experts": (TaskKind.EXPERTS,),
    "without queries and results": COPIES,
    "attention, pages and little else": (*GPU_KINDS, *COPIES, TaskKind.STORE_KV),
    "passes again": (),
}
WARM_UP = 2
_ALL, _NONE = 0.95, 0.05  # shares of a page's time that count as the whole and as nothing


class Partial:
    """A runner that leaves out tasks of some kinds."""

    def __init__(self, runner: TaskRunner, left_out: tuple[TaskKind, ...]) -> None:
        self._runner, self._left_out = runner, left_out

    def run(self, task: Task) -> None:
        """Do it, or nothing."""
        if task.kind not in self._left_out:
            self._runner.run(task)


class Steady:
    """An engine in the middle of a job."""

    def __init__(self, loaded: Loaded, cell: CellSpec) -> None:
        self._worker, self._engine = loaded.worker, loaded.engine()
        work = workload(cell.workload, cell.gen_len)
        self._source = Source(work, loaded.plan.spec.vocab_size)
        self._num_seqs = num_decoding(loaded.plan.policy, work)
        self._page_bytes = page_bytes(loaded)
        begin_midway(self._engine, self._source, self._num_seqs)
        self._requests = iter(self._source)
        self._worker.records_fullest = False

    def passes(self, name: str, left_out: tuple[TaskKind, ...], count: int) -> dict[str, Any]:
        """Pages by what ran beside them in some recorded passes."""
        self._worker._wrap = lambda runner: Partial(runner, left_out)  # type: ignore[method-assign]
        self._run(WARM_UP)
        seconds, timelines = [], []
        for _ in range(count):
            self._worker.record_next = True
            seconds += self._run(1)
            assert self._worker.recorded is not None
            timelines.append(self._worker.recorded.timeline())
        lanes = {
            lane: sum(r.seconds for t in timelines for r in t.records if r.lane.value == lane) / count
            for lane in ("gpu", "h2d", "d2h", "back", "cpu")
        }
        pages = pages_beside(timelines, self._page_bytes)
        print(f"{name:30} {median(seconds):.2f} s a pass; pages, GB/s: {pages}", flush=True)
        return {"name": name, "pass_s": median(seconds), "lane_s": lanes, "pages_gb_per_s": pages}

    def _run(self, count: int) -> list[float]:
        queue = 2 * self._num_seqs
        found = run_passes(self._engine, self._requests, self._source, queue, num_passes=count)
        return [record.seconds for record in found]


def pages_beside(timelines: Iterable[Timeline], size: int) -> dict[str, list[float]]:
    """GB/s of pages while nothing, attention, the GPU's kernels or both went on: by their mean and median time."""
    rows = []
    for timeline in timelines:
        attention = _intervals(timeline, (TaskKind.ATTENTION,))
        kernels = _intervals(timeline, GPU_KINDS)
        for r in timeline.records:
            if r.kind is TaskKind.LOAD_PAGE and r.seconds:
                rows.append((r.seconds, _share(attention, r.start, r.end), _share(kernels, r.start, r.end)))
    seconds, attends, computes = np.array(rows).reshape(-1, 3).T
    which = {
        "all": attends >= 0,
        "nothing": (attends < _NONE) & (computes < _NONE),
        "attention": (attends > _ALL) & (computes < _NONE),
        "kernels": (attends < _NONE) & (computes > _ALL),
        "both": (attends > _ALL) & (computes > _ALL),
    }
    return {
        name: [round(size / float(average(seconds[some])) / 1e9, 1) for average in (np.mean, np.median)]
        for name, some in which.items()
        if some.any()
    }


def _intervals(timeline: Timeline, kinds: Sequence[TaskKind]) -> np.ndarray:
    found = sorted((r.start, r.end) for r in timeline.records if r.kind in kinds)
    return np.array(found).reshape(-1, 2)


def _share(intervals: np.ndarray, start: float, end: float) -> float:
    """Of a time that intervals, which do not overlap, cover."""
    both = np.minimum(intervals[:, 1], end) - np.maximum(intervals[:, 0], start)
    return float(both.clip(min=0).sum() / (end - start))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cell", type=CellSpec.parse, default="24GiB,128,steady", metavar="GPU,GEN,KIND[,...]"
    )
    parser.add_argument("--passes", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="of the loops (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_gpu()
    work = workload(args.cell.workload, args.cell.gen_len)
    config = EngineConfig(
        "mixtral-8x7b", load_format="dummy", gpu_memory=args.cell.gpu, host_memory=args.cell.host,
        max_num_seqs=args.cell.seqs,
    )  # fmt: skip
    session = Session(config, spec_of("mixtral-8x7b"), shares_memory=True)
    plan = session.plan(work, config)
    if not (plan.policy.packed and plan.policy.num_frames) or plan.policy.kv_every:
        raise ConfigError(
            "loops copy packed pages and attend to all layers on the CPU; this plan streams none or keeps KV on "
            "the GPU; give a cell with less memory"
        )
    loaded = session.load(plan, config.gpu_memory)
    session.fill_kv(loaded)
    steady = Steady(loaded, args.cell)
    *kinds, again = LEFT_OUT.items()
    found = [steady.passes(*kind, args.passes) for kind in kinds]
    torch.cuda.set_per_process_memory_fraction(1.0)  # the engine has taken what it was allowed
    kv = loaded.worker.kv.arena.tensor
    machine = Machine(loaded.worker.weights.pages.host, kv.view(plan.spec.num_layers, -1, *kv.shape[1:]))
    found += [row for _ in range(args.turns) for row in conditions(machine)]
    found.append(steady.passes(*again, args.passes))
    if args.json:
        args.json.write_text(json.dumps(facts() | {"conditions": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
