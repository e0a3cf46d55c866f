"""Policies to draw from and runners that disturb, for tests that no policy changes a token."""

from __future__ import annotations

import random
import threading
import time

from checkpoints import NUM_EXPERTS, NUM_LAYERS
from moe_lightning.pipeline.baselines import SCHEDULES

NAMES = sorted(SCHEDULES)
LENGTHS = (1, 5, 16, 17, 33, 70, 9)


def drawn_policy(number):
    """One of many policies; the schedule and the number of micro-batches go round, the rest is random."""
    draw = random.Random(number)
    pages = draw.choice([1, 2, 3, 4])
    per_layer = NUM_EXPERTS * pages
    resident = tuple(draw.randint(0, per_layer) for _ in range(NUM_LAYERS))
    cpu_every = random.Random(-number - 1).choice([0, 0, 1, 2, NUM_LAYERS])
    if cpu_every:
        resident = tuple(0 if (i + 1) % cpu_every == 0 else count for i, count in enumerate(resident))
    smallest = per_layer - min(resident)
    name, parts = NAMES[number % len(NAMES)], draw.choice([1, 2, 3, NUM_EXPERTS])
    if name == "cgopipe":  # the others sweep whole layers
        smallest = min(smallest, -(-NUM_EXPERTS // parts) * pages)
    num_micro_batches = (1, 2, 3, 7)[number % 4]
    return {
        "schedule": name,
        "expert_parts": parts,
        "first_part_at_once": random.Random(-number - 2).random() < 0.5,
        "micro_batch_size": -(-len(LENGTHS) // num_micro_batches),
        "group_size": draw.choice([1, 2, 3, 5, 100]),
        "look_ahead": draw.choice([0, 1, 2, 5, 100]),
        "chunk_tokens": draw.choice([5, 7, 16, 33, 256]),
        "pages_per_expert": pages,
        "resident_pages": resident,
        "num_frames": smallest + draw.choice([0, 0, 1, smallest // 2, smallest, 3 * smallest]),
        "block_size": draw.choice([4, 16]),
        "num_blocks": draw.choice([40, 64]),
        "prefill_tokens": draw.choice([80, 120, 256]),
        "max_num_seqs": draw.choice([3, 7, 8]),
        "kv_every": draw.choice([0, 0, 1, 2, NUM_LAYERS]),
        "cpu_every": cpu_every,
    }


class Slowed:
    """A runner whose tasks wait before they start: `delay` gives seconds for each."""

    def __init__(self, runner, delay):
        self._runner, self._delay = runner, delay

    def run(self, task):
        time.sleep(self._delay(task))
        self._runner.run(task)


class Overtaken:
    """A runner of which one task, of a lane of its own, begins when another one has ended."""

    def __init__(self, runner, first, second):
        self._runner, self._first, self._second = runner, first, second
        self._has_ended = threading.Event()

    def run(self, task):
        if task is self._second:
            assert self._has_ended.wait(60), f"{self._first} waits for {task} all the same"
        try:
            self._runner.run(task)
        finally:
            if task is self._first:
                self._has_ended.set()
