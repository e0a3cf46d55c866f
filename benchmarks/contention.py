"""What slows copies of pages, and attention, on a machine with a GPU: each alone, in pairs, and all lanes at once.

Mixtral's shapes over page-locked memory as passes touch it: pages from one arena, K and V of 32 layers in another.
`--regions` looks at nearly all memory part by part instead: is it equally fast everywhere, and at all times?

    python benchmarks/contention.py --json contention.json
    python benchmarks/contention.py --regions --json regions.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lightning.bench.machine import facts, require_gpu
from moe_lightning.bench.shapes import LayerShape, Routing
from moe_lightning.engine.worker import cpu_lane_threads
from moe_lightning.kernels import ops
from moe_lightning.kernels.cpu_kernels import CpuKernels
from moe_lightning.memory.arena import HostArena
from moe_lightning.memory.mapped import device_view
from moe_lightning.models.spec import AttentionSpec, RouterSpec
from moe_lightning.perf.page_size import page_bytes, segment_bytes
from moe_lightning.profiling.arena import fill
from moe_lightning.profiling.attention import block_tables, spread_lengths
from moe_lightning.profiling.load import again_and_again
from moe_lightning.units import GIB, parse_bytes

HIDDEN, INTERMEDIATE, EXPERTS, PAGES, LAYERS = 4096, 14336, 8, 7, 32
BLOCK = (2, 8, 16, 128)  # K and V, heads, tokens, elements
VALUES = INTERMEDIATE // PAGES * HIDDEN  # of a page's segment
SEQS, CALLS, EVERY_S = 512, 6, 3.6e-3  # sequences of a call, calls of a layer, seconds from one to the next
SECONDS = 1.6
Step = Callable[[], float]  # one turn; how much it did, in a unit of its own


class Machine:
    """The memory of a pass, and steps over it.

    Args:
        pages: [rows, bytes] uint8, page-locked.
        kv: [layers, blocks, *BLOCK] bfloat16.
    """

    def __init__(self, pages: Tensor, kv: Tensor) -> None:
        self.pages, self.kv = pages, kv
        self.row = pages.shape[1]
        self.rows = HostArena((8, SEQS, 6144), torch.bfloat16)
        self.rows.prepare(pin=True)
        fill(self.rows.tensor.view(-1))
        self.threads = cpu_lane_threads(torch.device("cuda"))
        self._frames = torch.empty((8, self.row), dtype=torch.uint8, device="cuda")

    @classmethod
    def of_sizes(cls, pages_size: int, kv_size: int) -> Machine:
        """With so many bytes of both."""
        row = page_bytes(HIDDEN, INTERMEDIATE // PAGES, 2, packed=True)
        blocks = kv_size // (LAYERS * torch.Size(BLOCK).numel() * 2)
        pages = HostArena((pages_size // row, row), torch.uint8)
        kv = HostArena((LAYERS, blocks, *BLOCK), torch.bfloat16)
        for arena in (pages, kv):
            arena.prepare(pin=True, num_threads=os.cpu_count() or 1)
            fill(arena.tensor.view(-1).view(torch.bfloat16))
        return cls(pages.tensor, kv.tensor)

    def copies(self, num_rows: int | None = None, streams: int = 1) -> Step:
        """Pages in any order, eight in the queue; bytes."""
        order = torch.randperm(num_rows or len(self.pages)).tolist()
        lanes = [torch.cuda.Stream() for _ in range(streams)]
        under_way, number = deque[torch.cuda.Event](), [0]

        def step() -> float:
            n, number[0] = number[0], number[0] + 1
            source = self.pages[order[n % len(order)]]
            with torch.cuda.stream(lanes[n % streams]):
                self._frames[n % 8].copy_(source, non_blocking=True)
                under_way.append(torch.cuda.Event())
                under_way[-1].record()
            if len(under_way) < 8:
                return 0.0
            under_way.popleft().synchronize()
            return self.row

        return step

    def attention(self, threads: int | None = None, mean: int = 140, work: float = 1.0) -> Step:
        """Layer by layer, resting so that it works a share of the time; bytes of K and V."""
        kernel, lengths = CpuKernels(threads or self.threads), spread_lengths(SEQS, mean)
        blocks = self.kv.shape[1]
        order = torch.randperm(blocks)
        tables = [block_tables(lengths, order.roll(n * blocks // CALLS)) for n in range(CALLS)]
        q, k, v = torch.randn(SEQS, 48, 128).bfloat16().split((32, 8, 8), dim=1)
        out = torch.empty(SEQS, 4096, dtype=torch.bfloat16)
        size, number = int(lengths.sum()) * 4096, [0]

        def step() -> float:
            start, layer, number[0] = time.perf_counter(), self.kv[number[0] % LAYERS], number[0] + 1
            for table in tables:
                kernel.attend(out, q, k, v, layer, table, lengths)
            time.sleep((time.perf_counter() - start) * (1 / work - 1))
            return CALLS * size

        return step

    def results_back(self) -> Step:
        """What a call of attention gives back, as often as in a pass; bytes."""
        stream = torch.cuda.Stream(priority=-1)
        out = torch.empty(SEQS, 4096, dtype=torch.bfloat16, device="cuda")
        host = self.rows.tensor.view(-1)[: out.numel()].view(out.shape)
        mapped = device_view(host, out.device)
        return _now_and_then(stream, out.nbytes, lambda: ops.load_host_rows(mapped, out))

    def queries(self) -> Step:
        """What a call of attention takes, as often; bytes."""
        rows = torch.randn(SEQS, 6144, device="cuda").bfloat16()
        target = self.rows.tensor[1]
        return _now_and_then(torch.cuda.Stream(), rows.nbytes, lambda: target.copy_(rows, non_blocking=True))

    def sweeps(self, num_tokens: int = 4096, work: float = 1.0) -> Step:
        """A layer's pages unpacked and its experts computed, a share of the time; sweeps."""
        page = torch.empty(3 * VALUES, dtype=torch.bfloat16, device="cuda").normal_(std=HIDDEN**-0.5)
        packed = torch.zeros(EXPERTS, self.row, dtype=torch.uint8, device="cuda")
        for part, segment in enumerate(page.split(VALUES)):
            ops.pack(segment, packed[0, part * segment_bytes(VALUES) :][: segment_bytes(VALUES)])
        packed[1:] = packed[0]
        frames = page.repeat(EXPERTS * PAGES, 1)
        table = torch.randperm(EXPERTS * PAGES, device="cuda").int()
        x = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16()
        hidden, into = torch.zeros_like(x), torch.empty_like(frames[:EXPERTS])
        shape = LayerShape(HIDDEN, INTERMEDIATE, EXPERTS, PAGES, RouterSpec(2), AttentionSpec(32, 8, 128))
        workspace = ops.experts_workspace(num_tokens, 2, EXPERTS, HIDDEN, INTERMEDIATE, x.dtype, x.device)
        routing, first = Routing.random(shape, num_tokens), torch.arange(EXPERTS, device="cuda").int()
        stream, under_way = torch.cuda.Stream(), deque[torch.cuda.Event]()

        def step() -> float:
            start = time.perf_counter()
            with torch.cuda.stream(stream):
                for _ in range(PAGES):
                    ops.unpack_pages(packed, first, 0, EXPERTS, into, VALUES)
                ops.experts_(
                    hidden, x, routing.topk_ids, routing.topk_weights, frames, table, PAGES, workspace
                )  # fmt: skip
                under_way.append(torch.cuda.Event())
                under_way[-1].record()
            if len(under_way) > 2 or work < 1:
                under_way.popleft().synchronize()
            time.sleep((time.perf_counter() - start) * (1 / work - 1))
            return 1.0

        return _compiled(step)


def _now_and_then(stream: torch.cuda.Stream, size: int, launch: Callable[[], object]) -> Step:
    def step() -> float:
        start = time.perf_counter()
        with torch.cuda.stream(stream):
            launch()
            stream.synchronize()
        time.sleep(max(0.0, EVERY_S - (time.perf_counter() - start)))
        return size

    return _compiled(step)


def _compiled(step: Step) -> Step:
    """The step, which has been made once: the first time its kernels are compiled."""
    step()
    return step


def together(name: str, **steps: Step) -> dict[str, Any]:
    """What each does in a second while all run; bytes as GB. An error of one of them is raised."""
    done = dict.fromkeys(steps, 0.0)

    def add(key: str) -> None:
        done[key] += steps[key]()

    with ExitStack() as running:
        for key in steps:
            running.enter_context(again_and_again(partial(add, key)))
        time.sleep(0.3)
        before, start = dict(done), time.perf_counter()
        time.sleep(SECONDS)
        after, seconds = dict(done), time.perf_counter() - start
    rates = {key: (after[key] - before[key]) / seconds for key in steps}
    found = {key: rate / (1 if key == "sweeps" else 1e9) for key, rate in rates.items()}
    print(f"{name:44} " + "  ".join(f"{key} {rate:.2f}" for key, rate in found.items()), flush=True)
    return {"name": name, **found}


def conditions(m: Machine) -> list[dict[str, Any]]:
    """Each once."""
    sweeps = m.sweeps()
    fewer = max(1, m.threads * 5 // 7)
    all_lanes = {"back": m.results_back(), "queries": m.queries()}
    return [
        together("copies", copies=m.copies()),
        together("attention", attention=m.attention()),
        together("both", copies=m.copies(), attention=m.attention()),
        together("both, on two streams", copies=m.copies(streams=2), attention=m.attention()),
        together("both, from 1 GiB", copies=m.copies(min(28, len(m.pages))), attention=m.attention()),
        together("both, 64 tokens", copies=m.copies(), attention=m.attention(mean=64)),
        together(f"both, {fewer} threads", copies=m.copies(), attention=m.attention(fewer)),
        together("both, attention half of the time", copies=m.copies(), attention=m.attention(work=0.5)),
        together("copies, sweeps", copies=m.copies(), sweeps=sweeps),
        together("copies, results back", copies=m.copies(), back=m.results_back()),
        together("copies, queries", copies=m.copies(), queries=m.queries()),
        together("all", copies=m.copies(), attention=m.attention(), sweeps=sweeps, **all_lanes),
        together(
            "all, attention 3/4, sweeps 1/3 of the time", copies=m.copies(), attention=m.attention(work=0.75),
            sweeps=m.sweeps(work=0.33), **all_lanes,
        ),
    ]  # fmt: skip


def regions(size: int, part: int = 6 * GIB) -> list[dict[str, Any]]:
    """Reads and copies in each part of an arena, one part after the other."""
    row = 64 * 2**20
    arena = HostArena((size // part * (part // row), row), torch.uint8)
    arena.prepare(pin=True, num_threads=os.cpu_count() or 1)
    kernel = CpuKernels(cpu_lane_threads(torch.device("cuda")))
    frames = torch.empty((8, row), dtype=torch.uint8, device="cuda")
    found = []

    def reading(rows: Tensor) -> Step:
        numbers = iter(range(2**62))

        def step() -> float:
            kernel.read(rows[next(numbers) % len(rows)])
            return row

        return step

    def copying(rows: Tensor) -> Step:
        stream, numbers = torch.cuda.Stream(), iter(range(2**62))

        def step() -> float:
            with torch.cuda.stream(stream):
                for _ in range(4):
                    n = next(numbers)
                    frames[n % 8].copy_(rows[n % len(rows)], non_blocking=True)
                stream.synchronize()
            return 4 * row

        return step

    for number, rows in enumerate(arena.tensor.split(part // row)):
        found.append(together(f"region {number}, copies", copies=copying(rows)))
        found.append(together(f"region {number}, reads", reads=reading(rows)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=parse_bytes, default=46 * GIB)
    parser.add_argument("--kv", type=parse_bytes, default=40 * GIB)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--regions", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_gpu()
    if args.regions:
        found = regions(args.pages + args.kv)
    else:
        machine = Machine.of_sizes(args.pages, args.kv)
        found = [row for _ in range(args.turns) for row in conditions(machine)]
    if args.json:
        args.json.write_text(json.dumps(facts() | {"conditions": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
