"""What a pass does while something of it is measured: pages come, the CPU attends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Event, Thread

from torch import Tensor

from moe_lightning.errors import DeviceError
from moe_lightning.profiling.events import LIMIT_S
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
        """Both go on inside, where nothing may wait for the whole GPU or be launched for the first time."""
        with self.copies, again_and_again(self._layer):
            yield

    def _layer(self) -> None:
        self.copies.keep_up(self.attended_bytes)
        self.copies.watch()
        self.attend()
        self.copies.watched()


def running(load: Load | None) -> AbstractContextManager[None]:
    """The load goes on inside, if there is one."""
    return load.running() if load else nullcontext()


@contextmanager
def again_and_again(work: Callable[[], object]) -> Iterator[None]:
    """Work on a thread of its own, as attention does in a pass, until the block ends; its error is raised then.

    Raises:
        DeviceError: the work under way does not end.
    """
    ended, errors = Event(), list[BaseException]()

    def go_on() -> None:
        try:
            while not ended.is_set():
                work()
        except BaseException as error:  # whatever it is, the caller's thread must raise it
            errors.append(error)

    # A daemon: if it waits for a GPU that does not answer, the process can end all the same.
    thread = Thread(target=go_on, name="load", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LIMIT_S)
    if thread.is_alive():
        raise DeviceError(
            f"copies and attention beside a measurement have not ended after {LIMIT_S:.0f} s, which take less than "
            "one; end other programs that use the GPU or many cores, and run the command again"
        )
    if errors:
        raise errors[0]
