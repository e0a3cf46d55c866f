"""What a pass does while something of it is measured: pages come, the CPU attends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from torch import Tensor

from moe_lightning.profiling.link import Copies


@dataclass(frozen=True)
class Load:
    """Copies and attention that run until nobody wants them any more.

    Attributes:
        copies: to the GPU, and with each layer's attention some both ways.
        attend: a layer's calls of attention.
        attended_bytes: of their queries, keys and values.
        kv: [bytes] uint8, page-locked memory as the GPU sees it, in which K and V are.
    """

    copies: Copies
    attend: Callable[[], object]
    attended_bytes: int
    kv: Tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """Both go on inside."""
        with self.copies, again_and_again(self._layer):
            yield

    def _layer(self) -> None:
        self.copies.keep_up(self.attended_bytes)
        self.attend()


@contextmanager
def again_and_again(work: Callable[[], object]) -> Iterator[None]:
    """Work on a thread of its own, as attention does in a pass, until the block ends; its error is raised then."""
    ended = Event()

    def go_on() -> None:
        while not ended.is_set():
            work()

    with ThreadPoolExecutor(1, thread_name_prefix="load") as thread:
        going = thread.submit(go_on)
        try:
            yield
        finally:
            ended.set()
        going.result()
