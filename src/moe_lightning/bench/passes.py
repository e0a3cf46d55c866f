"""Passes over random prompts, each with its time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moe_lightning.bench.machine import stolen_seconds
from moe_lightning.bench.workloads import as_met, sequences
from moe_lightning.engine.engine import Engine
from moe_lightning.engine.request import Request, RequestOutput, SamplingParams
from moe_lightning.errors import DeviceError
from moe_lightning.perf.workload import Workload
from moe_lightning.verify.comparison import TOP

Show = Callable[[str], None]


def show_nothing(line: str) -> None:
    """For those who do not want to be told."""


@dataclass(frozen=True)
class PassRecord:
    """One pass: what it generated, how many sequences ran in it, and its seconds.

    `stolen` are the CPU seconds that a virtual machine's host gave to others meanwhile.
    """

    seconds: float
    generated: int
    num_running: int
    prompt_tokens: int
    stolen: float = 0.0


@dataclass
class Source:
    """Requests without end, numbered, of a workload's lengths; those in `scored` come with log-probabilities.

    Attributes:
        workload: whose lengths.
        vocab_size: of the model.
        scored: numbers of the requests that are to be checked.
        outputs: theirs, once they have ended.
    """

    workload: Workload
    vocab_size: int
    scored: Sequence[int] = ()
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __iter__(self) -> Iterator[Request]:
        return self._requests(self.workload)

    def midway(self) -> Iterator[Request]:
        """As they are met in the middle of a job, for `begin_midway`."""
        return self._requests(as_met(self.workload))

    def _requests(self, work: Workload) -> Iterator[Request]:
        for seed in itertools.count():
            for prompt, answer in sequences(work, len(work.prompt_lens), self.vocab_size, seed):
                number = next(self._numbers)
                logprobs = TOP if number in self.scored else None
                params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, logprobs=logprobs)
                yield Request(str(number), tuple(prompt), params)

    def keep(self, outputs: list[RequestOutput]) -> None:
        """Remember the outputs that are to be checked."""
        self.outputs.update((o.request_id, o) for o in outputs if int(o.request_id) in self.scored)


def run_passes(
    engine: Engine,
    requests: Iterator[Request],
    source: Source,
    queue: int,
    *,
    count: int | None = None,
    num_passes: int | None = None,
    show: Show = show_nothing,
) -> Iterator[PassRecord]:
    """Passes until `count` requests are answered or so many have run.

    Args:
        engine: may have requests already.
        requests: of the source.
        source: keeps outputs.
        queue: requests that wait at least, as long as there are more.
        count: requests to add.
        num_passes: to run.
        show: told of each.

    Raises:
        DeviceError: the model's logits were not finite.
    """
    left, number = count if count is not None else 2**62, 0
    while num_passes is None or number < num_passes:
        while left > 0 and engine.num_waiting < queue:
            engine.add(next(requests))
            left -= 1
            engine.expect_more(left > 0)
        if not engine.num_unfinished:
            return
        generated, prompted = engine.num_generated_tokens, engine.num_prompt_tokens
        stolen, start = stolen_seconds(), time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        _check_finite(outputs)
        source.keep(outputs)
        record = PassRecord(
            seconds, engine.num_generated_tokens - generated, engine.num_running,
            engine.num_prompt_tokens - prompted, stolen_seconds() - stolen,
        )  # fmt: skip
        number += 1
        show(
            f"pass {number}: {record.seconds:.3f} s, {record.generated} tokens, {record.num_running} running, "
            f"{record.prompt_tokens} prompt tokens, {engine.num_waiting} waiting"
        )
        yield record


def _check_finite(outputs: list[RequestOutput]) -> None:
    """Sequences that end early would make a pass of few of them look like one of many."""
    failed = [o.request_id for o in outputs if any(answer.finish_reason == "error" for answer in o.outputs)]
    if failed:
        raise DeviceError(
            f"{len(failed)} sequences ended because their logits were not finite, {failed[0]!r} first: their "
            "weights or their KV are damaged, and nothing was measured"
        )


def begin_midway(engine: Engine, source: Source, num_seqs: int, *, same_age: bool = False) -> int:
    """Fill KV memory with sequences, as if they had been running for long; how many.

    Args:
        engine: has none yet.
        source: of the requests; ages are evenly spread over their answers.
        num_seqs: at most.
        same_age: all are half as old as they get, instead.
    """
    draw = random.Random(0)
    for number, request in zip(range(num_seqs), source.midway(), strict=False):
        length = request.params.max_tokens or 0
        age = length // 2 if same_age else number * length // num_seqs
        if not engine.adopt(request, [draw.randrange(3, source.vocab_size) for _ in range(age)]):
            return number
    return num_seqs
