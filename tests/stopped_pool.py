"""A pool of threads that tells when it no longer begins what waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest


def stopped(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a pool of the module has dropped what waits: work that waits for it is not overtaken by chance."""
    event = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            event.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    return event
