"""What a user asks for and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_lightning.engine.checks import shown
from moe_lightning.engine.structured import StructuredOutputsParams
from moe_lightning.errors import RequestError

if TYPE_CHECKING:
    from moe_lightning.engine.grammar import Form

MAX_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; names and defaults as in vLLM.

    Raises:
        RequestError: a value is out of range; the message names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, 1024)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, 2**31)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)  # less overflows float32
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, 2**31)
        _check_int("min_tokens", self.min_tokens, 0, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_form()

    def _check_form(self) -> None:
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise RequestError(
                f"structured_outputs={shown(self.structured_outputs)}: give a StructuredOutputsParams"
            )
        # A form says itself when an answer may end.
        if self.min_tokens or self.ignore_eos:
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            raise RequestError(f"{name} does not go with structured outputs; remove it")

    def _check_stops(self) -> None:
        if not isinstance(self.stop, str | list | tuple | None) or not all(
            isinstance(s, str) and s for s in self.stop_strings
        ):
            raise RequestError(f"stop={self.stop!r}: give non-empty strings")
        if not isinstance(self.stop_token_ids, list | tuple | None):
            raise RequestError(f"stop_token_ids={self.stop_token_ids!r}: give a list of token ids")
        for token in self.stop_token_ids or ():
            _check_int("stop_token_ids", token, 0, 2**31)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r}: give True or False")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken each time."""
        return self.temperature < 1e-5


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={value!r}: give an integer from {low} to {high}")


def _check_range(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (low_open and value == low):  # type: ignore[operator]
        bound = f"above {low}" if low_open else f"from {low}"
        raise RequestError(f"{name}={value!r}: give a number {bound} to {high}")


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position; `rank` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # token id -> its log-probability; the sampled token is always in it


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenized. `seed` fixes the random draws of all its n sequences.

    Background work waits behind all other. `form` is what the parameters' structured outputs ask for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    prompt: str | None = None
    seed: int = 0
    is_background: bool = False
    form: Form | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One of the n answers.

    `finish_reason` is ``stop``, ``length``, ``abort``, or ``error`` where the model's logits were not finite; text
    and tokens are then those before. `stop_reason` is what stopped it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All answers to one request. The first entry of `prompt_logprobs` is None: nothing precedes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass(frozen=True)
class PassStats:
    """Where a run stands after a pass: totals since the run began; `seconds` since then."""

    num_running: int
    num_waiting: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
