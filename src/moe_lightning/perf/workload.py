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
    """Requests that all get answers of about one length.

    Attributes:
        prompt_lens: tokens of the prompts, or of a sample of them.
        gen_len: tokens of an answer.
        num_requests: how many there are; None for as many as keep the machine busy.

    Raises:
        ConfigError: a length is not positive.
    """

    prompt_lens: tuple[int, ...]
    gen_len: int
    num_requests: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_lens or min(self.prompt_lens) < 1:
            raise ConfigError("a workload needs prompts of 1 token or more")
        if self.gen_len < 1:
            raise ConfigError(f"gen_len={self.gen_len}: answers have 1 token or more")

    @classmethod
    def of(cls, prompt_lens: Sequence[int], gen_lens: Sequence[int]) -> Workload:
        """Requests that are all known; `gen_lens` are the tokens that each may get."""
        mean = round(sum(gen_lens) / max(len(gen_lens), 1))
        return cls(tuple(sorted(prompt_lens)), max(1, mean), len(prompt_lens))

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
        """Tokens of the longest prompt with its answer."""
        return max(self.prompt_lens) + self.gen_len

    def mean_context(self) -> float:
        """Tokens that a decoding sequence holds on average while all ages are equally frequent."""
        return self.mean_prompt + (self.gen_len + 1) / 2

    def mean_blocks(self, block_size: int) -> float:
        """KV blocks that it holds on average."""
        total = 0
        for prompt, count in self._counts.items():
            # The sum of ceil(n / size) for n up to m, as whole blocks and a rest.
            of_all = _sum_of_blocks(prompt + self.gen_len, block_size)
            total += count * (of_all - _sum_of_blocks(prompt, block_size))
        return total / (len(self.prompt_lens) * self.gen_len)

    @cached_property
    def _counts(self) -> Counter[int]:
        """How many prompts have each length: there are far fewer lengths than prompts."""
        return Counter(self.prompt_lens)


def num_decoding(policy: Policy, workload: Workload) -> int:
    """Sequences of all ages that decode in a pass while KV memory is full; more may run while they are short."""
    held = floor(policy.num_blocks / workload.mean_blocks(policy.block_size))
    return min(policy.max_num_seqs, max(1, held))


def _sum_of_blocks(most: int, block_size: int) -> int:
    """The sum of ceil(n / block_size) over n = 1 .. most."""
    whole, rest = divmod(most, block_size)
    return block_size * whole * (whole + 1) // 2 + rest * (whole + 1)
