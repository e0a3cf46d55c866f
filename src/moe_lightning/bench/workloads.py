"""Workloads by name: lengths as measured or defined, and prompts of such lengths."""

from __future__ import annotations

import random
from bisect import bisect
from itertools import accumulate
from statistics import NormalDist

from moe_lightning.errors import ConfigError
from moe_lightning.perf.workload import Workload

# Tokens of MT-Bench's first turns under the tokenizer of Mixtral-8x7B, the first token of a text among them.
_MTBENCH = (
    26, 51, 59, 46, 25, 40, 35, 35, 50, 108, 38, 58, 87, 100, 113, 63, 79, 46, 46, 57,
    42, 39, 23, 20, 223, 81, 24, 21, 55, 152, 36, 53, 71, 23, 77, 25, 22, 31, 74, 30,
    29, 20, 29, 215, 24, 30, 26, 42, 34, 19, 185, 227, 418, 217, 189, 301, 221, 373, 172, 345,
    27, 47, 50, 21, 68, 41, 70, 42, 37, 22, 35, 16, 31, 62, 27, 23, 15, 18, 16, 21,
)  # fmt: skip

_MET = 512  # sequences that stand for all


def _normal(mean: float, deviation: float, longest: int, count: int = 80) -> tuple[int, ...]:
    """Quantiles of a normal distribution: the same for everybody, without drawing."""
    spread = NormalDist(mean, deviation)
    found = [spread.inv_cdf((i + 0.5) / count) for i in range(count)]
    return tuple(min(longest, max(1, round(length))) for length in found)


# Prompt lengths, and the tokens that are generated unless something else is asked for.
WORKLOADS: dict[str, tuple[tuple[int, ...], int]] = {
    "mtbench": (_MTBENCH, 128),
    "synthetic-reasoning": (_normal(242, 10, 270), 50),
    "summarization": (_normal(1693, 150, 1984), 64),
    "random": (_normal(512, 128, 1024), 128),
}


def workload(name: str, gen_len: int | None = None, num_requests: int | None = None) -> Workload:
    """A workload of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is named {name!r}; choose one of {', '.join(WORKLOADS)}")
    lengths, default = WORKLOADS[name]
    return Workload(lengths, gen_len or default, num_requests)


def sequences(work: Workload, count: int, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts of random token ids, each with the length of its answer.

    Each round goes through the lengths in another order, so that every part is like the whole.
    """
    draw = random.Random(seed)
    found: list[tuple[list[int], int]] = []
    while len(found) < count:
        pairs = list(zip(work.prompt_lens, work.answers, strict=True))
        draw.shuffle(pairs)
        found += [([draw.randrange(3, vocab_size) for _ in range(n)], answer) for n, answer in pairs]
    return found[:count]


def as_met(work: Workload) -> Workload:
    """The sequences as they decode at some time: those with long answers are met more often than they begin."""
    if work.gen_lens is None:
        return work
    pairs, ends = list(zip(work.prompt_lens, work.answers, strict=True)), list(accumulate(work.answers))
    met = [pairs[bisect(ends, (i + 0.5) * ends[-1] / _MET)] for i in range(_MET)]
    return Workload.of(met, work.num_requests)
