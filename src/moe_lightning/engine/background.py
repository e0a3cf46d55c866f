"""Work that passes do not wait for, or do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def at_once(work: Callable[[], _T]) -> Future[_T]:
    """Its result or its error, once it is done."""
    future: Future[_T] = Future()
    _finish(future, work)
    return future


def in_thread(work: Callable[[], _T]) -> Future[_T]:
    """Its result or its error, some time later; a process that ends does not wait for it."""
    future: Future[_T] = Future()
    threading.Thread(target=_finish, args=(future, work), name="background", daemon=True).start()
    return future


def _finish(future: Future[_T], work: Callable[[], _T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
