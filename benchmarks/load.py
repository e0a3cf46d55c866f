"""How fast a checkpoint loads, beside the disk's own sequential read rate.

Writes a random checkpoint of Mixtral's shapes, drops it from the page cache (as root: all of the cache), reads its
files one after the other, drops it again and loads it.

    python benchmarks/load.py --layers 4 --directory /tmp/checkpoint --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_lightning.bench.machine import facts
from moe_lightning.engine.build import build_worker
from moe_lightning.memory import checkpoint
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.known import KNOWN_MODELS
from moe_lightning.models.registry import spec_from_config
from moe_lightning.models.spec import ModelSpec
from moe_lightning.policy import Policy
from moe_lightning.units import GIB, MIB

_SHARD = 4 * GIB
_CHUNK = 16 * MIB


def write(spec: ModelSpec, directory: Path) -> list[Path]:
    """A checkpoint in shards; the files in reading order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shard: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    weight_map: dict[str, str] = {}

    def flush() -> None:
        path = directory / f"model-{len(files):05}.safetensors"
        save_file(shard, path)
        weight_map.update(dict.fromkeys(shard, path.name))
        files.append(path)
        shard.clear()

    for tensor in spec.tensors():
        shard[tensor.name] = (torch.randn(tensor.shape, dtype=torch.bfloat16, device=device) / 64).cpu()
        if sum(t.nbytes for t in shard.values()) > _SHARD:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    drop = Path("/proc/sys/vm/drop_caches")
    if os.access(drop, os.W_OK):
        drop.write_text("3")


def read_rate(files: list[Path]) -> float:
    """Bytes/s of one reader that asks for large pieces in order."""
    buffer = bytearray(_CHUNK)
    start, total = time.perf_counter(), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


def measure(layers: int, directory: Path, *, packed: bool) -> dict[str, Any]:
    config = HFConfig({**KNOWN_MODELS["mixtral-8x7b"], "num_hidden_layers": layers}, "mixtral-8x7b")
    spec = spec_from_config(config)
    files = write(spec, directory)
    size = sum(path.stat().st_size for path in files)
    rates, seconds = [], []
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    policy = Policy(
        max_num_seqs=8, micro_batch_size=8, group_size=8, look_ahead=2, prefill_tokens=64, chunk_tokens=64,
        pages_per_expert=14, resident_pages=(8,) * layers, num_frames=112, num_blocks=64,
        packed=packed,
    )  # fmt: skip
    for _ in range(2):
        forget(files)
        rates.append(read_rate(files))
        forget(files)
        start = time.perf_counter()
        tensors = checkpoint.open_model(directory, spec)
        worker = build_worker(spec, policy, torch.bfloat16, device, tensors=tensors)
        seconds.append(time.perf_counter() - start)
        del worker
    return (facts() if torch.cuda.is_available() else {}) | {
        "bytes": size,
        "packed": packed,
        "read_bytes_per_s": rates,
        "load_s": seconds,
        "share": size / min(seconds) / max(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/moe-lightning-load"))
    parser.add_argument("--packed", action="store_true", help="pack the experts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.directory.mkdir(parents=True)
    try:
        result = measure(args.layers, args.directory, packed=args.packed)
    finally:
        shutil.rmtree(args.directory)
    read = ", ".join(f"{rate / 1e9:.2f}" for rate in result["read_bytes_per_s"])
    load = ", ".join(f"{result['bytes'] / seconds / 1e9:.2f}" for seconds in result["load_s"])
    print(f"{result['bytes'] / GIB:.1f} GiB; read {read} GB/s, load {load} GB/s, {result['share']:.0%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
