"""Decode attention on this machine's CPU: KV bytes/s beside a plain read of the same memory and PyTorch's SDPA.

Attention, read and SDPA take turns over the same arena, each time in another part of it, so that no cache serves
them. `share` is the median over these turns of attention's rate over the rate of the read next to it.

    python benchmarks/cpu_attention.py --gib 4 --json benchmarks/results/cpu_attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moe_lightning.hardware.host import cpu_name
from moe_lightning.kernels.cpu_kernels import ISA_VARIABLE, CpuKernels, available_isas
from moe_lightning.memory.arena import host_tensor

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 16
SDPA_TURNS = 2  # besides the one that warms up; it takes most of the time
GEOMETRIES = {  # query heads, KV heads, head dimension, sliding window
    "mixtral-8x7b": (32, 8, 128, None),
    "qwen3-30b-a3b": (32, 4, 128, None),
    "gpt-oss-20b": (64, 8, 64, None),
    "gpt-oss-20b, window": (64, 8, 64, 128),
    "olmoe-1b-7b": (16, 16, 128, None),
}
SINGLE = "olmoe-1b-7b"  # one query head per KV head


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    model: str
    dtype: str
    context: int
    num_seqs: int
    isa: str


def workloads(contexts: list[int], seqs: list[int], isas: list[str]) -> Iterator[Workload]:
    """Geometries in bf16, Mixtral in every dtype and by every instruction set."""
    for model, (*_, window) in GEOMETRIES.items():
        if model == SINGLE:
            continue
        for context in contexts:
            if context <= (window or 0):
                continue
            for num_seqs in seqs:
                yield Workload(model, "bfloat16", context, num_seqs, isas[-1])
    yield Workload(SINGLE, "bfloat16", 512, 256, isas[-1])
    for isa in isas[:-1]:
        yield Workload("mixtral-8x7b", "bfloat16", 512, 256, isa)
    for dtype in ("float16", "float32"):
        yield Workload("mixtral-8x7b", dtype, 512, 256, isas[-1])


class Bench:
    """Runs workloads over one arena."""

    def __init__(self, gib: float, threads: int, turns: int, with_sdpa: bool) -> None:
        self.arena = host_tensor((int(gib * 2**30),), torch.uint8)
        self.threads, self.turns, self.with_sdpa = threads, turns, with_sdpa
        self.filled: torch.dtype | None = None
        torch.set_num_threads(threads)

    def fitted(self, work: Workload) -> Workload:
        """It, or with as many sequences as half of the arena holds."""
        _, num_kv_heads, head_dim, _ = GEOMETRIES[work.model]
        seq_blocks = -(-work.context // BLOCK_SIZE)
        seq_bytes = (
            seq_blocks * 2 * num_kv_heads * BLOCK_SIZE * head_dim * getattr(torch, work.dtype).itemsize
        )
        return replace(work, num_seqs=min(work.num_seqs, self.arena.nbytes // 2 // seq_bytes))

    def run(self, work: Workload) -> dict[str, Any]:
        """Rates of one workload, as they go into the JSON file."""
        num_heads, num_kv_heads, head_dim, window = GEOMETRIES[work.model]
        dtype = getattr(torch, work.dtype)
        self.fill(dtype)
        blocks_per_seq, num_seqs = -(-work.context // BLOCK_SIZE), work.num_seqs
        seq_bytes = blocks_per_seq * 2 * num_kv_heads * BLOCK_SIZE * head_dim * dtype.itemsize
        layer_bytes = num_seqs * seq_bytes
        layers = self.arena[: self.arena.nbytes // layer_bytes * layer_bytes].view(dtype)
        layers = layers.view(-1, num_seqs * blocks_per_seq, 2, num_kv_heads, BLOCK_SIZE, head_dim)

        qkv = torch.randn(num_seqs, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        q, k, v = qkv.view(num_seqs, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        out = torch.empty(num_seqs, num_heads * head_dim, dtype=dtype)
        tables = torch.randperm(num_seqs * blocks_per_seq).view(num_seqs, -1)
        lengths = torch.full((num_seqs,), work.context)
        sinks = torch.zeros(num_heads) if work.model.startswith("gpt-oss") else None
        seen = min(work.context, window or work.context)
        os.environ[ISA_VARIABLE] = work.isa
        attention = CpuKernels(self.threads)

        def attend(layer: Tensor) -> None:
            attention.attend(out, q, k, v, layer, tables, lengths, sliding_window=window, sinks=sinks)

        def sdpa(layer: Tensor) -> None:
            keys, values = layer.view(2, num_seqs, num_kv_heads, -1, head_dim)[..., -seen:, :]
            F.scaled_dot_product_attention(q.unflatten(1, (num_kv_heads, -1)), keys, values)

        seen_bytes = num_seqs * seen * 2 * num_kv_heads * head_dim * dtype.itemsize
        rates = self.take_turns(layers, seen_bytes, attend, attention.read, sdpa)
        shares = [a / r for a, r in zip(rates["attention"], rates["read"], strict=True)]
        median = {name: statistics.median(found) for name, found in rates.items()}
        return {
            **asdict(work),
            "threads": self.threads,
            "kv_bytes": seen_bytes,
            "attention_bytes_per_s": median["attention"],
            "read_bytes_per_s": median["read"],
            "sdpa_bytes_per_s": median.get("sdpa"),
            "share": statistics.median(shares),
            "share_of_best": max(rates["attention"]) / max(rates["read"]),
            "ratio_to_sdpa": median["attention"] / median["sdpa"] if "sdpa" in median else None,
        }

    def take_turns(
        self,
        layers: Tensor,
        seen_bytes: int,
        attend: Callable[[Tensor], None],
        read: Callable[[Tensor], int],
        sdpa: Callable[[Tensor], None],
    ) -> dict[str, list[float]]:
        """Rates in bytes/s of each; all work at most a third of the arena apart from what the others touched."""
        rates: dict[str, list[float]] = {"attention": [], "read": []}
        layer_bytes = layers[0].nbytes
        for turn in range(-1, max(self.turns, min(4 * self.turns, len(layers)))):  # the first one warms up
            at = [(turn + i * len(layers) // 3) % len(layers) for i in range(3)]
            found = {
                "attention": seen_bytes / timed(attend, layers[at[0]]),
                "read": layer_bytes / timed(read, layers[at[1]]),
            }
            if self.with_sdpa and turn < SDPA_TURNS:
                found["sdpa"] = seen_bytes / timed(sdpa, layers[at[2]])
            if turn >= 0:
                for name, rate in found.items():
                    rates.setdefault(name, []).append(rate)
        return rates

    def fill(self, dtype: torch.dtype) -> None:
        """Numbers of about 1 in the whole arena, which faults it in too."""
        if self.filled is dtype:
            return
        some = torch.randn(2**22).to(dtype).view(torch.uint8)
        for start in range(0, len(self.arena), len(some)):
            piece = self.arena[start : start + len(some)]
            piece.copy_(some[: len(piece)])
        self.filled = dtype


def timed(action: Callable[[Tensor], Any], layer: Tensor) -> float:
    """Seconds."""
    start = time.perf_counter()
    action(layer)
    return time.perf_counter() - start


def describe(found: dict[str, Any]) -> str:
    sdpa = f"{found['ratio_to_sdpa']:6.1f}" if found["ratio_to_sdpa"] else "     -"
    return (
        f"{found['model']:20} {found['dtype']:8} {found['isa']:11} {found['context']:5} {found['num_seqs']:5} "
        f"{found['attention_bytes_per_s'] / 1e9:7.2f} {found['read_bytes_per_s'] / 1e9:7.2f} "
        f"{found['share']:6.1%} {sdpa}"
    )


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gib", type=float, default=4, help="size of the arena (default %(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each workload (default %(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 200, 256, 512, 2048])
    parser.add_argument("--seqs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--no-sdpa", action="store_true", help="leave out PyTorch")
    args = parser.parse_args()

    load_before = os.getloadavg()[0]
    bench = Bench(args.gib, args.threads, args.turns, not args.no_sdpa)
    print(
        f"{'model':20} {'dtype':8} {'isa':11} {'ctx':>5} {'seqs':>5} {'GB/s':>7} {'read':>7} {'share':>6} x SDPA"
    )
    results = []
    for work in dict.fromkeys(map(bench.fitted, workloads(args.contexts, args.seqs, available_isas()))):
        results.append(bench.run(work))
        print(describe(results[-1]), flush=True)
    print(f"{args.threads} threads, {cpu_name()}, load average before: {load_before:.1f}")
    if args.json:
        report = {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load_average_before": load_before},
            "versions": {"torch": version("torch"), "python": platform.python_version()},
            "arena_bytes": bench.arena.nbytes,
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
