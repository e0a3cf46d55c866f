"""How long the requests of a job are, for the plan: counted in bytes for all of them, in tokens for some."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from moe_lightning.engine.prompts import render, tokenize
from moe_lightning.errors import RequestError
from moe_lightning.jobs.lines import BatchLine
from moe_lightning.perf.workload import Workload
from moe_lightning.protocol import ChatCall

_SAMPLE = 256  # lines that are tokenized
_LONGEST_SAMPLE = 2**18  # bytes: those lines stay in memory
_HISTOGRAM = 512
_GOLDEN = 0.618034  # its multiples, but for whole ones, are evenly spread, however many one takes
# Tokens of an answer: where no limit is set, what is usual and what is allowed; of a large limit, what is expected.
_ANSWER, _LONGEST_ANSWER, EXPECTED = 256, 2**15, 1024
_BYTES = 4  # of a token of text, about
_TEMPLATE = 2048  # tokens that a chat template may add


class Lengths:
    """Sizes of the valid lines, and some of the lines, drawn at random but the same in every run."""

    def __init__(self) -> None:
        self._sizes = array("Q")
        self._limits = array("q")
        self._answers = array("Q")  # of each line
        self._sample: list[BatchLine] = []
        self._draw = Random(0)

    def add(self, line: BatchLine) -> None:
        """Count a line."""
        # A reservoir: files often alternate, so that every k-th line would be no sample.
        size, place = _size(line), self._draw.randrange(len(self._sizes) + 1)
        if size <= _LONGEST_SAMPLE and len(self._sample) < _SAMPLE:
            self._sample.append(line)
        elif size <= _LONGEST_SAMPLE and place < _SAMPLE:
            self._sample[place] = line
        self._sizes.append(size)
        limit = line.call.params.max_tokens
        self._limits.append(-1 if limit is None else min(limit, _LONGEST_ANSWER))
        self._answers.append(line.call.params.n)

    @property
    def longest(self) -> int:
        """Tokens that no request exceeds with its answer: each takes a byte of the prompt at least."""
        answers = (_LONGEST_ANSWER if limit < 0 else limit for limit in self._limits)
        return max(map(sum, zip(self._sizes, answers, strict=True)), default=1) + _TEMPLATE

    @property
    def num_longer(self) -> int:
        """Lines whose answers may have more tokens than are expected of any."""
        return sum(limit > EXPECTED for limit in self._limits)

    def workload(self, tokenizer: Any | None) -> Workload:
        """The requests as the planner sees them.

        Args:
            tokenizer: the model's; None for a guess, a token for each four bytes of text.
        """
        sizes, tokens = 0, 0
        for line in self._sample:
            try:
                tokens += _num_tokens(tokenizer, line)
            except RequestError:  # it will be a line of the error file
                continue
            sizes += _size(line)
        rate = tokens / sizes if sizes else 1.0
        # All sequences in the order of their lengths, of which a line has one for each answer, in equal parts.
        lines = sorted(range(len(self._sizes)), key=lambda line: (self._expected(line), self._sizes[line]))
        count = sum(self._answers)
        if not count:
            return Workload((1,), 1, 1)
        times = np.array([self._answers[line] for line in lines])
        ends, num = times.cumsum(), min(_HISTOGRAM, count)
        some = list(self._some_sizes(lines, ends, num))
        true = float(times @ np.array([self._sizes[line] for line in lines])) / count
        rate *= true * num / max(sum(some), 1)
        prompts = (max(1, round(rate * size)) for size in some)
        answers = _means(times * [self._expected(line) for line in lines], ends, num)
        return Workload.of(list(zip(prompts, answers, strict=True)), count, self._expected(lines[-1]))

    def _some_sizes(self, lines: list[int], ends: np.ndarray, num: int) -> Iterator[int]:
        """Of a line of each part, now a short one and now a long one: as spread as those of all."""
        bounds = np.linspace(0, ends[-1], num + 1)
        firsts, lasts = np.searchsorted(ends, bounds[:-1], "right"), np.searchsorted(ends, bounds[1:], "left")
        for part, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            sizes = sorted(self._sizes[line] for line in lines[first : last + 1])
            yield sizes[int(part * _GOLDEN % 1 * len(sizes))]

    def _expected(self, line: int) -> int:
        """Tokens of a line's answer."""
        limit = self._limits[line]
        return _ANSWER if limit < 0 else min(max(limit, 1), EXPECTED)


def _means(tokens: np.ndarray, ends: np.ndarray, num: int) -> list[int]:
    """Means of `num` equal parts of all sequences, whole tokens each and 1 at least, about right together.

    Args:
        tokens: of the sequences of each line.
        ends: number of sequences up to each line's last one.
        num: of parts.
    """
    total = np.interp(np.linspace(0, ends[-1], num + 1), [0, *ends], [0, *tokens.cumsum()])
    upto = np.round(total * num / ends[-1])
    return [max(1, int(mean)) for mean in np.diff(upto)]


def _size(line: BatchLine) -> int:
    """Bytes of a line's prompt; tokens, where it is given as such."""
    call = line.call
    if isinstance(call, ChatCall):
        return sum(_bytes(text) for message in call.messages for text in message.values())
    prompt = call.prompts[0]
    return _bytes(prompt) if isinstance(prompt, str) else len(prompt)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _num_tokens(tokenizer: Any | None, line: BatchLine) -> int:
    call = line.call
    if isinstance(call, ChatCall):
        return _guess(line) if tokenizer is None else len(render(tokenizer, list(call.messages))[0])
    prompt = call.prompts[0]
    if tokenizer is None and isinstance(prompt, str):
        return _guess(line)
    return len(tokenize(tokenizer, prompt)[0])


def _guess(line: BatchLine) -> int:
    return -(-_size(line) // _BYTES)
