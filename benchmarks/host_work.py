"""What the host does between passes, in microseconds for each sequence: batching, building, taking tokens.

A worker that computes nothing stands for the GPU, so all that is left of a pass is Python. While it runs, nothing
decodes, and the link copies no further than the ring of frames goes.

    python benchmarks/host_work.py --num-seqs 4000 --passes 20
    python benchmarks/host_work.py --num-seqs 4000 --passes 20 --by-function
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch

from moe_lightning.bench.passes import Source, begin_midway, run_passes
from moe_lightning.bench.workloads import workload
from moe_lightning.engine.engine import Engine
from moe_lightning.engine.garbage import collect_rarely
from moe_lightning.engine.tokenizer import dummy_tokenizer
from moe_lightning.engine.waiting import Turns
from moe_lightning.policy import Policy
from moe_lightning.runtime.micro_batch import Step, build_micro_batches
from moe_lightning.runtime.runner import MicroBatchOutput
from moe_lightning.runtime.sampler import SampleOutput
from moe_lightning.runtime.upload import Uploader

_VOCAB = 32_000


class Nothing:
    """A worker whose passes take no time: every row gets the same token."""

    def __init__(self, block_size: int) -> None:
        self._uploader, self._block_size = Uploader(torch.device("cpu")), block_size

    def run(self, step: Step) -> list[MicroBatchOutput]:
        """Builds what tasks would read."""
        self._uploader.clear()
        batches = build_micro_batches(step, self._block_size, _VOCAB, self._uploader)
        return [
            MicroBatchOutput(SampleOutput(torch.full((len(batch.sample_rows),), 7)), []) for batch in batches
        ]


def main() -> None:
    """Prints the median pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-seqs", type=int, default=4000)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--gen-len", type=int, default=128)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--by-function", action="store_true", help="where the time goes, by cProfile")
    args = parser.parse_args()
    work, n = workload("mtbench", args.gen_len, None), args.num_seqs
    policy = Policy(
        max_num_seqs=5 * n // 4, micro_batch_size=-(-n // args.micro_batches), group_size=2, look_ahead=4,
        prefill_tokens=9336, chunk_tokens=2048, pages_per_expert=1, resident_pages=(0,), num_frames=8,
        num_blocks=int(n * work.mean_blocks(16)),
    )  # fmt: skip
    engine = Engine(
        Nothing(16), policy, dummy_tokenizer(_VOCAB), (2,), 4096, turns=Turns(8 * policy.max_num_seqs)
    )  # type: ignore[arg-type]
    source = Source(work, _VOCAB)
    running = begin_midway(engine, source, n)
    passes = run_passes(engine, iter(source), source, 2 * policy.max_num_seqs, num_passes=args.passes + 3)
    for _ in range(3):
        next(passes)
    collect_rarely()
    profile = cProfile.Profile()
    if args.by_function:
        profile.enable()
    start = time.process_time()
    records = list(passes)
    seconds = time.process_time() - start
    profile.disable()
    each = statistics.median(record.seconds for record in records)
    print(
        f"{running} sequences, {records[-1].num_running} in the end: {each * 1e3:.1f} ms a pass in the middle, "
        f"{each / running * 1e6:.1f} us a sequence; {seconds / len(records) * 1e3:.1f} ms of CPU on average"
    )
    if args.by_function:
        pstats.Stats(profile).sort_stats("tottime").print_stats(28)


if __name__ == "__main__":
    main()
