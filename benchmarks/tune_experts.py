"""Finds the fastest tiles of the experts' kernels on this machine's GPU and writes them into the package's table.

Candidates are compiled by several threads, checked against float32 and timed, each product apart; then the best of
both products for each number of rows per block are timed together, and the fastest call wins.

    python benchmarks/tune_experts.py --write            the models of `moe-lightning bench kernels`
    python benchmarks/tune_experts.py --model qwen3-30b-a3b --tokens 128
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from moe_lightning.bench.experts import ExpertsBench
from moe_lightning.bench.machine import require_gpu
from moe_lightning.bench.shapes import MODELS, Routing
from moe_lightning.bench.timing import relative_error, seconds_of
from moe_lightning.errors import ConfigError
from moe_lightning.kernels.expert_config import ExpertsConfig, ExpertsShape, Tile, fit
from moe_lightning.kernels.experts import ExpertsCall, Workspace

TOKENS = (1, 64, 128, 512, 2048, 8192)
TABLE = Path(__file__).parents[1] / "src" / "moe_lightning" / "kernels" / "expert_configs.json"
TIMED_S = 0.02  # of GPU time for each candidate


def candidates(shape: ExpertsShape) -> list[ExpertsConfig]:
    """Configurations worth a trial for that many rows per expert; each varies both products at once."""
    m, hopper = shape.tokens_per_expert, shape.capability >= (9, 0)
    found = []
    if m <= 96:  # memory-bound: narrow tiles, many loads in flight
        blocks = sorted({b for b in (16, 32, 64, 128) if 0.5 * m <= b <= 4 * max(m, 16)})
        for block_m in blocks:
            for gate_up, down, split in (
                (Tile(32, 64, 4, 5), Tile(32, 128, 4, 4), 1),
                (Tile(32, 128, 4, 4), Tile(64, 128, 4, 4), 1),
                (Tile(64, 64, 4, 4), Tile(64, 64, 4, 5), 1),
                (Tile(64, 128, 4, 3), Tile(128, 64, 4, 4), 1),
                (Tile(32, 256, 4, 3), Tile(32, 256, 4, 3), 1),
                (Tile(128, 64, 8, 3), Tile(64, 128, 4, 3), 2),
                (Tile(64, 128, 8, 3), Tile(64, 64, 4, 5), 4),
            ):
                found.append(ExpertsConfig(block_m, 16, gate_up, down, split, gather=True, tma=hopper))
    if m >= 24:
        for block_m, gate_up, down in (
            (64, Tile(128, 64, 4, 4), Tile(256, 64, 4, 4)),
            (64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
            (128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 3)),
            (128, Tile(128, 64, 8, 4), Tile(256, 64, 8, 4)),
            (128, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
            (128, Tile(64, 64, 8, 4), Tile(128, 64, 8, 4)),
            (128, Tile(128, 32, 8, 5), Tile(128, 128, 8, 3)),
        ):
            for group_m, gather in ((8, False), (16, False), (16, True)):
                found.append(
                    ExpertsConfig(block_m, group_m, gate_up, down, gather=gather or not hopper, tma=hopper)
                )
    return list(dict.fromkeys(fit(config, shape) for config in found))


class Trial:
    """All candidates for one shape."""

    def __init__(self, bench: ExpertsBench, num_tokens: int) -> None:
        s = bench.shape
        self.bench = bench
        self.key = ExpertsShape(
            num_tokens, s.router.top_k, s.num_experts, s.hidden_size, s.page_rows, s.pages_per_expert,
            bench.dtype.itemsize, torch.cuda.get_device_capability(),
        )  # fmt: skip
        self.workspace: Workspace = bench.workspace(num_tokens)
        # Threads that compile share the workspace: whatever a launch finds there must be a block that exists.
        self.workspace.blocks.fill_(-1)
        self.x = bench.tokens(num_tokens)
        self.routings = [Routing.random(s, num_tokens) for _ in range(3)]
        rows = torch.randperm(num_tokens, device="cuda")[:64]
        self.rows = rows
        some = Routing(self.routings[0].topk_ids[rows], self.routings[0].topk_weights[rows])
        self.expected = bench.reference(self.x[rows], some)
        self.configs = candidates(self.key)

    def call(self, config: ExpertsConfig, routing: Routing) -> ExpertsCall:
        """The steps of one call."""
        return self.bench.call(self.x, routing, self.workspace, config)

    def whole(self, config: ExpertsConfig, routing: Routing, hidden: torch.Tensor) -> None:
        """One call from sort to sum."""
        call = self.call(config, routing)
        num_blocks = call.sort()
        call.gate_up(num_blocks)
        call.combine(hidden, *call.down(num_blocks))

    def compile(self, config: ExpertsConfig) -> ExpertsConfig | None:
        """Launch once, whatever the result; None if the card refuses it."""
        try:
            self.whole(config, self.routings[0], torch.zeros_like(self.x))
        except Exception as error:
            print(f"  {describe(config)}: {type(error).__name__} {str(error)[:80]}")
            return None
        return config

    def time(self, config: ExpertsConfig) -> dict[str, float]:
        """Seconds of each product and of the whole; raises if the result is wrong."""
        hidden = torch.zeros_like(self.x)
        self.whole(config, self.routings[0], hidden)
        error = relative_error(hidden[self.rows], self.expected)
        if not error < 2e-2:
            raise SystemExit(f"{describe(config)}: relative error {error:.1e}")
        call = self.call(config, self.routings[0])
        num_blocks = call.sort()
        return {
            "gate_up": seconds_of([lambda: call.gate_up(num_blocks)], TIMED_S, 15),
            "down": seconds_of([lambda: call.down(num_blocks)], TIMED_S, 15),
            "whole": seconds_of(
                [lambda r=r: self.whole(config, r, hidden) for r in self.routings], TIMED_S, 15
            ),
        }


def tune(trial: Trial, threads: int) -> dict[str, Any]:
    """The table's entry for one shape."""
    with ThreadPoolExecutor(threads) as pool:
        configs = [c for c in pool.map(trial.compile, trial.configs) if c]
    torch.cuda.synchronize()
    times = {config: trial.time(config) for config in configs}
    # Each product with the other's best: what they share is how rows are blocked.
    mixed = []
    for block_m in {c.block_m for c in configs}:
        same = [c for c in configs if c.block_m == block_m]
        gate_up = min(same, key=lambda c: times[c]["gate_up"])
        down = min(same, key=lambda c: times[c]["down"])
        mixed.append(dataclasses.replace(gate_up, down=down.down, split_k=down.split_k))
    times |= {config: trial.time(config) for config in mixed if config not in times}
    for config in sorted(times, key=lambda c: times[c]["whole"])[:3]:
        parts = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in times[config].items())
        print(f"  {describe(config)}: {parts}")
    best = min(times, key=lambda c: times[c]["whole"])
    return {
        "key": list(trial.key.key),
        "tokens_per_expert": trial.key.tokens_per_expert,
        "config": best.to_json(),
        "microseconds": round(times[best]["whole"] * 1e6, 1),
    }


def describe(config: ExpertsConfig) -> str:
    tiles = [f"{t.block_n}x{t.block_k} w{t.num_warps} s{t.num_stages}" for t in (config.gate_up, config.down)]
    how = "gather" if config.gather else "sorted"
    return f"m{config.block_m} g{config.group_m} {how} [{tiles[0]}] [{tiles[1]}] split {config.split_k}"


def write(entries: list[dict[str, Any]]) -> None:
    """Put the entries into the table in place of older ones for the same shapes."""
    new = {(tuple(e["key"]), e["tokens_per_expert"]): e for e in entries}
    old = {
        (tuple(e["key"]), e["tokens_per_expert"]): e for e in json.loads(TABLE.read_text(encoding="utf-8"))
    }
    lines = [json.dumps(entry) for _, entry in sorted((old | new).items(), key=lambda item: item[0])]
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--tokens", action="append", type=int)
    parser.add_argument("--threads", type=int, default=12, help="that compile")
    parser.add_argument("--write", action="store_true", help=f"update {TABLE.name}")
    parser.add_argument("--json", type=Path, help="where to write the entries")
    args = parser.parse_args()
    try:
        dtype = require_gpu()
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    start, entries = time.perf_counter(), []
    torch.manual_seed(0)
    for model in args.model or MODELS:
        bench = ExpertsBench.of(model, MODELS[model], dtype)
        for num_tokens in args.tokens or TOKENS:
            trial = Trial(bench, num_tokens)
            print(f"{model}, {num_tokens} tokens: {len(trial.configs)} candidates", flush=True)
            entries.append(tune(trial, args.threads))
            print(f"  after {time.perf_counter() - start:.0f} s", flush=True)
            if args.json:  # at once, so that an interrupted run has told what it found
                args.json.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        del bench, trial
        torch.cuda.empty_cache()
    if args.write:
        write(entries)


if __name__ == "__main__":
    main()
