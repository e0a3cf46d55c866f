"""What the server measures: of requests as they come and go, of the engine after each pass."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram

from moe_lightning.engine.request import RequestOutput
from moe_lightning.llm import LLM
from moe_lightning.pipeline.task import Lane
from moe_lightning.server.engine_thread import Update

PREFIX = "moe_lightning:"
_HISTORY = 600  # points of throughput over time
_EVERY_S = 1.0  # between two of them
_RECENT_S = 60.0  # over which the measured rate is taken
_SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Totals at a time, in seconds since the server began."""

    seconds: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Load:
    """Where the engine stood after its last pass."""

    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    used_blocks: int = 0
    num_blocks: int = 1
    passes: int = 0
    pass_seconds: float = 0.0
    busy_seconds: float = 0.0

    @property
    def kv_usage(self) -> float:
        """The share of KV memory that is taken, 0 to 1."""
        return self.used_blocks / self.num_blocks


class Watch:
    """Holds what is measured. The engine's thread writes `load`, `points` and `lanes`; others read them."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._start = time.monotonic()
        self._mutex = threading.Lock()
        self.load = Load(num_blocks=llm.policy.num_blocks)
        self.points: deque[Point] = deque([Point(0.0, 0, 0)], maxlen=_HISTORY)
        self.lanes: dict[str, float] = {}
        self.finished: Counter[str] = Counter()
        self.aborted = 0
        self.registry = CollectorRegistry()
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Until the first token, of requests that stream"
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of an answer, of requests that stream"
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "Until the whole answer")
        self.prompts = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt", tuple(4.0**i for i in range(10))
        )
        self.answers = self._histogram(
            "request_generation_tokens", "Tokens of an answer", tuple(4.0**i for i in range(10))
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(PREFIX + name, text, registry=self.registry, buckets=buckets)

    @property
    def seconds(self) -> float:
        """Since the server began."""
        return time.monotonic() - self._start

    def on_change(self, seconds: float | None) -> None:
        """Take down how the engine stands, after a pass of so many seconds if there was one; in its thread."""
        engine, last = self._llm.engine, self.load
        self.load = Load(
            engine.num_running,
            engine.num_waiting,
            engine.num_preemptions,
            engine.num_prompt_tokens,
            engine.num_generated_tokens,
            self._llm.policy.num_blocks - engine.num_free_blocks,
            self._llm.policy.num_blocks,
            last.passes + (seconds is not None),
            last.pass_seconds if seconds is None else seconds,
            last.busy_seconds + (seconds or 0.0),
        )
        self._note_point()

    def _note_point(self) -> None:
        now = self.seconds
        if now - self.points[-1].seconds >= _EVERY_S:
            self.points.append(Point(now, self.load.prompt_tokens, self.load.generated_tokens))

    def update_lanes(self) -> None:
        """The share of the fullest pass so far that each lane worked; in the engine's thread."""
        timeline = self._llm.fullest_pass
        if timeline is not None:
            self.lanes = {lane.value: share for lane, share in timeline.utilization().items()}

    def tokens_per_second(self) -> float:
        """Generated in the last minute."""
        now, load = self.seconds, self.load
        since = next(
            (p for p in list(self.points) if now - p.seconds <= _RECENT_S),
            Point(now, 0, load.generated_tokens),
        )
        return (load.generated_tokens - since.generated_tokens) / max(now - since.seconds, _EVERY_S)

    @contextmanager
    def request(self) -> Iterator[Seen]:
        """Measures one request; it counts as aborted if it does not finish."""
        seen = Seen(self)
        try:
            yield seen
        finally:
            if not seen.is_finished:
                self.aborted += 1


@dataclass
class Seen:
    """One request, as it goes on."""

    watch: Watch
    start: float = field(default_factory=time.monotonic)
    last: float | None = None
    is_finished: bool = False

    def news(self, updates: Sequence[Update]) -> None:
        """Pieces have come."""
        now = time.monotonic()
        if any(update.pieces for update in updates):
            if self.last is None:
                self.watch.first_token.observe(now - self.start)
            else:
                self.watch.between_tokens.observe(now - self.last)
            self.last = now
        if ended := [update.output for update in updates if update.output.finished]:
            self.finish(ended)

    def finish(self, outputs: Sequence[RequestOutput]) -> None:
        """Outputs are there."""
        self.is_finished = True
        for output in outputs:
            self.watch.whole.observe(time.monotonic() - self.start)
            self.watch.prompts.observe(len(output.prompt_token_ids))
            for answer in output.outputs:
                self.watch.answers.observe(len(answer.token_ids))
                self.watch.finished[answer.finish_reason or ""] += 1


LANES = tuple(lane.value for lane in Lane)
