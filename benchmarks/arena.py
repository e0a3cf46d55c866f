"""How fast host memory is brought in and page-locked, and what the disk gives.

python benchmarks/arena.py --size 100GiB
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from moe_lightning.memory.arena import HostArena
from moe_lightning.units import GIB, MIB, parse_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_bytes, default=8 * GIB)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-pin", action="store_true")
    args = parser.parse_args()
    pin = torch.cuda.is_available() and not args.no_pin
    if pin:
        torch.zeros(1, device="cuda")
    arena = HostArena((args.size // (24 * MIB), 24 * MIB), torch.uint8)
    start = time.perf_counter()
    arena.prepare(pin=pin, num_threads=args.threads)
    seconds = time.perf_counter() - start
    print(
        f"{arena.num_bytes / GIB:.1f} GiB in {seconds:.1f} s, {arena.num_bytes / GIB / seconds:.2f} GiB/s, "
        f"pinned {arena.is_pinned} {arena.refusal or ''}"
    )


if __name__ == "__main__":
    main()
