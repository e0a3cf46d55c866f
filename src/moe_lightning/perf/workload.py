"""What is to be computed, as far as a plan depends on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

from moe_lightning.errors import ConfigError
from moe_lightning.policy import Policy


@dataclass(frozen=True)
class Workload:
    """Requests, by the lengths of their prompts and answers.

    Attributes:
        prompt_lens: tokens of the prompts, or of a sample of them.
        gen_len: tokens of an answer; of answers that differ, of the mean one.
        num_requests: how many there are; None for as many as keep the machine busy.
        gen_lens: tokens of the answer to each of these prompts; None where all have `gen_len`.
        most: tokens of the longest answer, where these prompts are a sample that may not have it.

    Raises:
        ConfigError: a length is not positive, or there is not an answer for each prompt.
    """

    prompt_lens: tuple[int, ...]
    gen_len: int
    num_requests: int | None = None
    gen_lens: tuple[int, ...] | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_lens or min(self.prompt_lens) < 1:
            raise ConfigError("a workload needs prompts of 1 token or more")
        if self.gen_len < 1 or min(self.gen_lens or (1,)) < 1:
            raise ConfigError(f"gen_len={self.gen_len}: answers have 1 token or more")
        if self.gen_lens is not None and len(self.gen_lens) != len(self.prompt_lens):
            raise ConfigError(
                f"{len(self.prompt_lens)} prompts with {len(self.gen_lens)} answers; give one for each"
            )

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[int, int]], num_requests: int | None = None, most: int | None = None
    ) -> Workload:
        """Requests by pairs, the tokens of a prompt and of its answer."""
        prompts, answers = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        mean = max(1, round(sum(answers) / max(len(answers), 1)))
        return cls(prompts, mean, num_requests, answers if len(set(answers)) > 1 else None, most)

    @cached_property
    def answers(self) -> tuple[int, ...]:
        """Tokens of the answer to each prompt."""
        return self.gen_lens or (self.gen_len,) * len(self.prompt_lens)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest one."""
        return max(self.most or 0, self.gen_len if self.gen_lens is None else max(self.gen_lens))

    @cached_property
    def mean_answer(self) -> float:
        """Tokens of an answer on average."""
        return sum(self.answers) / len(self.answers)

    @cached_property
    def mean_prompt(self) -> float:
        """Tokens of a prompt on average."""
        return sum(self.prompt_lens) / len(self.prompt_lens)

    @cached_property
    def token_prompt(self) -> float:
        """Tokens of the prompt that a token of a prompt is in, on average."""
        return sum(n * n for n in self.prompt_lens) / sum(self.prompt_lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, a prompt with its answer."""
        return max(map(sum, zip(self.prompt_lens, self.answers, strict=True)))

    @cached_property
    def mean_context(self) -> float:
        """Tokens that a decoding sequence holds on average while all ages are equally frequent.

        A sequence decodes as long as its answer is: those with long answers are met more often than begun.
        """
        held = sum(count * gen * (2 * prompt + gen + 1) for (prompt, gen), count in self._counts.items())
        return held / (2 * sum(self.answers))

    def mean_blocks(self, block_size: int) -> float:
        """KV blocks that it holds on average."""
        total = 0
        for (prompt, gen), count in self._counts.items():
            # The sum of ceil(n / size) for n up to m, as whole blocks and a rest.
            of_all = _sum_of_blocks(prompt + gen, block_size)
            total += count * (of_all - _sum_of_blocks(prompt, block_size))
        return total / sum(self.answers)

    @cached_property
    def _counts(self) -> Counter[tuple[int, int]]:
        """How many sequences have each pair of lengths: there are far fewer pairs than sequences."""
        return Counter(zip(self.prompt_lens, self.answers, strict=True))


def num_decoding(policy: Policy, workload: Workload) -> int:
    """Sequences of all ages that decode in a pass while KV memory is full; more may run while they are short."""
    held = floor(policy.num_blocks / workload.mean_blocks(policy.block_size))
    return min(policy.max_num_seqs, max(1, held))


def _sum_of_blocks(most: int, block_size: int) -> int:
    """The sum of ceil(n / block_size) over n = 1 .. most."""
    whole, rest = divmod(most, block_size)
    return block_size * whole * (whole + 1) // 2 + rest * (whole + 1)
