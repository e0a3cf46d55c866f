"""What the runners of other systems share: shapes, lengths and cap of our own measurements, the form of results.

Each runs in an environment of its own, in which this package need not be installed: it is found beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# With it larger batches fit: weights come and go in sizes that leave gaps.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from moe_lightning.bench.machine import facts
from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.engine.gpu_budget import cap_gpu_memory
from moe_lightning.models.known import KNOWN_MODELS
from moe_lightning.perf.workload import Workload
from moe_lightning.units import parse_bytes


@dataclass(frozen=True)
class Setting:
    """What a runner is asked for.

    Attributes:
        model: a known name, or a config.json.
        num_layers: of it; None for all.
        gpu_memory: bytes that the process may use; None for all.
        work: lengths of prompts and answers.
        batches: sequences at once to try, the largest first: the first that fits counts.
        passes: decode passes to measure; an answer's others take as long.
        json: where the result goes.
    """

    model: str
    num_layers: int | None
    gpu_memory: int | None
    work: Workload
    batches: tuple[int, ...]
    passes: int
    json: Path | None

    @property
    def prompt_len(self) -> int:
        """The mean: prompts of one length need no padding, which favours who would have to pad."""
        return max(1, round(self.work.mean_prompt))

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU of a machine that has none."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def config_values(self) -> dict[str, Any]:
        """Of config.json."""
        path = Path(self.model)
        values = dict(json.loads(path.read_text()) if path.is_file() else KNOWN_MODELS[self.model])
        if self.num_layers is not None:
            values["num_hidden_layers"] = self.num_layers
        return values


def setting(description: str | None, argv: list[str] | None = None) -> Setting:
    """From the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="mixtral-8x7b", help="a known name, or a config.json (default: %(default)s)")
    add("--num-layers", type=int)
    add("--gpu-memory", type=parse_bytes)
    add("--workload", default="mtbench", choices=WORKLOADS)
    add("--gen-len", type=int, default=128)
    add("--batches", default="2048,1024,512,256,128,64,32", help="sizes to try (default: %(default)s)")
    add("--passes", type=int, default=3, help="decode passes to measure (default: %(default)s)")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    batches = tuple(sorted(map(int, args.batches.split(",")), reverse=True))
    return Setting(
        args.model, args.num_layers, args.gpu_memory, workload(args.workload, args.gen_len), batches,
        args.passes, args.json,
    )  # fmt: skip


def cap(s: Setting) -> None:
    """Let the process hold no more of the GPU than ours may, its context counted too."""
    if s.device.type == "cuda":
        cap_gpu_memory(s.device, s.gpu_memory)


@dataclass(frozen=True)
class Times:
    """Seconds of a batch: its prompts, and each decode pass that was measured."""

    prefill_s: float
    decode_s: tuple[float, ...]


RunBatch = Callable[[int], Times]


def run(engine: str, s: Setting, packages: Iterable[str], run_batch: RunBatch) -> dict[str, Any]:
    """Measure the largest batch that fits; the result, in the form of ours, is written where it was asked for.

    Args:
        engine: its name in tables.
        s: what is asked for.
        packages: whose versions count.
        run_batch: runs a batch of so many sequences.
    """
    start, runs = time.perf_counter(), list[dict[str, Any]]()
    result = facts() | {
        "engine": engine, "packages": {name: _version(name) for name in packages}, "model": s.model,
        "num_layers": s.num_layers, "gpu_memory": s.gpu_memory, "workload": asdict(s.work),
        "prompt_len": s.prompt_len, "runs": runs,
    }  # fmt: skip
    for size in s.batches:
        runs.append(_run(size, s, run_batch))
        result["seconds"] = time.perf_counter() - start
        print(f"{engine}, batch {size}: {runs[-1]}", flush=True)
        _write(s.json, result)
        if "error" not in runs[-1]:
            break
    return result


def _run(size: int, s: Setting, run_batch: RunBatch) -> dict[str, Any]:
    has_gpu = s.device.type == "cuda"
    if has_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    error = ""
    try:
        times = run_batch(size)
    except (torch.OutOfMemoryError, MemoryError) as failure:
        error = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    if error:  # what failed is gone only now
        return {"batch_size": size, "error": error}
    decode_s = statistics.median(times.decode_s) if times.decode_s else 0.0
    total = times.prefill_s + (s.work.gen_len - 1) * decode_s
    return {
        "batch_size": size, "tokens_per_s": size * s.work.gen_len / total, "prefill_s": times.prefill_s,
        "decode_s": times.decode_s, "is_extrapolated": len(times.decode_s) < s.work.gen_len - 1,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved() if has_gpu else None,
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
