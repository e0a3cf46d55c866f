"""Decode passes of a full-size model in its steady state: which lane is busy how long, at which rate.

Weights are random and of the model's true shapes; every sequence has the same context. The passes run on the
worker directly, so that what is measured is the pipeline and not the batcher.

    python benchmarks/steady_pass.py --model mixtral-8x7b --gpu-memory 24GiB --json out.json --svg out.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_lightning import LLM
from moe_lightning.bench.link import plain_copy_rate
from moe_lightning.bench.machine import facts
from moe_lightning.bench.models import SHAPES
from moe_lightning.models import registry
from moe_lightning.pipeline.draw import to_chrome, to_svg
from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import DecodeRow, Step
from moe_lightning.runtime.sampling_batch import RowSampling
from moe_lightning.units import GIB, MIB, parse_bytes

BLOCK = 16


def make_policy(args: argparse.Namespace) -> Policy:
    """A policy by hand: frames from what the cap leaves, residency even over layers, one sweep a pass."""
    spec = registry.resolve(args.model)
    expert_bytes = 3 * spec.hidden_size * spec.experts.intermediate_size * 2
    per_layer = spec.experts.num_experts * args.pages_per_expert
    page_bytes = expert_bytes // args.pages_per_expert
    rest = spec.num_parameters * 2 - expert_bytes * spec.experts.num_experts * spec.num_layers
    free = args.gpu_memory - rest - args.reserve
    frames = free // page_bytes
    resident = max(0, min(per_layer, int((frames - args.ring * per_layer) / (spec.num_layers - args.ring))))
    ring = min(frames - resident * spec.num_layers, 2 * (per_layer - resident))
    blocks = args.num_seqs * -(-(args.context + args.passes + 2) // BLOCK) + 8
    return Policy(
        max_num_seqs=args.num_seqs, micro_batch_size=-(-args.num_seqs // args.micro_batches),
        group_size=args.group or 2**16, look_ahead=args.look_ahead, prefill_tokens=args.prefill_tokens,
        chunk_tokens=2048, pages_per_expert=args.pages_per_expert,
        resident_pages=(resident,) * spec.num_layers, num_frames=ring, num_blocks=blocks, block_size=BLOCK,
        schedule=args.schedule,
    )  # fmt: skip


def make_step(args: argparse.Namespace, policy: Policy, position: int) -> Step:
    """Every sequence at one position, in micro-batches of the policy's size."""
    per_seq = (policy.num_blocks - 8) // args.num_seqs
    greedy = RowSampling(temperature=0.0)
    rows = [
        DecodeRow(3 + i % 1000, position, range(i * per_seq, (i + 1) * per_seq), greedy)
        for i in range(args.num_seqs)
    ]
    size = policy.micro_batch_size
    return Step(decode=tuple(tuple(rows[i : i + size]) for i in range(0, len(rows), size)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    policy = make_policy(args)
    start = time.perf_counter()
    llm = LLM(
        args.model,
        load_format="dummy",
        device="cuda",
        dtype="bfloat16",
        gpu_memory=args.gpu_memory,
        policy=policy,
    )
    load_s = time.perf_counter() - start
    print(f"ready in {load_s:.1f} s: {policy}", flush=True)
    worker, spec = llm._worker, llm.spec
    page_bytes = worker._weights.pages.host[:1].nbytes
    recorded, walls = [], []
    worker.record_every = 10**9
    steps = [make_step(args, policy, args.context + number - 1) for number in range(args.passes)]
    for number, step in enumerate(steps):
        if number == args.passes - args.recorded:
            worker.record_every = 1
        before = time.perf_counter()
        worker.run(step)
        walls.append(time.perf_counter() - before)
        if number >= args.passes - args.recorded:
            recorded.append(worker._timeline)
        print(f"pass {number}: {walls[-1]:.3f} s", flush=True)
    steady = [t() for t in recorded]
    walls = walls[args.warmup : -args.recorded]
    streamed = sum(worker._weights.pages.placement.streamed) * page_bytes
    hidden = spec.num_layers * args.num_seqs * spec.attention.q_size * 2
    last = steady[-1]
    span = last.end - steady[0].start
    h2d_busy = sum(t.busy_seconds()[Lane.H2D] for t in steady)
    pages_s = sum(r.seconds for t in steady for r in t.records if r.kind is TaskKind.LOAD_PAGE)
    plain = plain_copy_rate(page_bytes)
    kv_bytes = args.num_seqs * args.context * spec.kv_bytes_per_token(2)
    attention_s = statistics.mean(t.busy_seconds()[Lane.CPU] for t in steady)
    kinds: dict[str, float] = {}
    for record in last.records:
        kinds[record.kind.value] = kinds.get(record.kind.value, 0.0) + record.seconds
    return facts() | {
        "model": args.model, "num_seqs": args.num_seqs, "context": args.context, "gpu_memory": args.gpu_memory,
        "policy": asdict(policy), "load_s": load_s, "page_bytes": page_bytes,
        "pass_s": walls, "recorded_pass_s": span / len(steady),
        "tokens_per_s": args.num_seqs / statistics.mean(walls),
        "h2d_busy_share": h2d_busy / span,
        "h2d_page_bytes_per_s": streamed * len(steady) / pages_s,
        "h2d_bytes_per_s_of_pass": (streamed + hidden) / statistics.mean(walls),
        "plain_copy_bytes_per_s": plain,
        "link_share": streamed * len(steady) / pages_s / plain,
        "utilization": {lane.value: share for lane, share in last.utilization().items()},
        "cpu_attention_bytes_per_s": kv_bytes / attention_s,
        "seconds_by_kind_last_pass": kinds,
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
        "timeline": last,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="mixtral-8x7b", help=f"a known name, a config, or {', '.join(SHAPES)}")
    add("--gpu-memory", type=parse_bytes, default=24 * GIB)
    add(
        "--reserve",
        type=parse_bytes,
        default=3 * GIB,
        help="GPU memory left to context, activations, workspace",
    )
    add("--num-seqs", type=int, default=2048)
    add("--context", type=int, default=141)
    add("--micro-batches", type=int, default=8)
    add("--group", type=int, default=0)
    add("--look-ahead", type=int, default=8)
    add("--pages-per-expert", type=int, default=14)
    add("--ring", type=float, default=1.5, help="layers of streamed pages that the ring holds")
    add("--prefill-tokens", type=int, default=2048)
    add("--schedule", default="cgopipe")
    add("--passes", type=int, default=10)
    add("--warmup", type=int, default=3)
    add("--recorded", type=int, default=3, help="passes at the end whose tasks are recorded")
    add("--json", type=Path)
    add("--svg", type=Path, help="Gantt chart of a few layers")
    add("--trace", type=Path, help="the same as Chrome and Perfetto JSON")
    args = parser.parse_args()
    if args.model in SHAPES:
        directory = Path(tempfile.mkdtemp())
        (directory / "config.json").write_text(json.dumps(SHAPES[args.model]))
        args.model = str(directory)
    result = measure(args)
    timeline = result.pop("timeline")
    # A few layers from the middle: of a whole pass nobody would see a task.
    window = timeline.window(timeline.start + 0.40 * timeline.span, timeline.start + 0.52 * timeline.span)
    if args.svg:
        args.svg.write_text(to_svg(window), encoding="utf-8")
    if args.trace:
        args.trace.write_text(json.dumps(to_chrome(window)), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"{statistics.mean(result['pass_s']):.3f} s a pass, {result['recorded_pass_s']:.3f} s recorded, "
        f"{result['tokens_per_s']:.0f} tokens/s; H2D busy {result['h2d_busy_share']:.1%}, pages at "
        f"{result['h2d_page_bytes_per_s'] / 1e9:.1f} GB/s = {result['link_share']:.1%} of the plain copy; "
        f"CPU attention {result['cpu_attention_bytes_per_s'] / 1e9:.1f} GB/s; "
        f"GPU {result['gpu_reserved_bytes'] / GIB:.2f} GiB; "
        f"pages of {result['page_bytes'] / MIB:.0f} MiB"
    )
    for kind, seconds in sorted(result["seconds_by_kind_last_pass"].items(), key=lambda item: -item[1]):
        print(f"  {kind:18} {seconds:8.4f} s")


if __name__ == "__main__":
    main()
