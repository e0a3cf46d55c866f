"""Moments of a CUDA stream that the host asks for."""

from __future__ import annotations

import time

import torch

from moe_lightning.errors import DeviceError

LIMIT_S = 20.0  # what is waited for takes milliseconds, on the slowest machine tenths of a second
_POLL_S = 5e-5


def recorded() -> torch.cuda.Event:
    """An event of the current stream that knows its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def wait_for(event: torch.cuda.Event) -> None:
    """Hold the caller until a stream has come to the event; other threads go on.

    Not by `torch.cuda.synchronize`: that may wait until all streams are idle at once, which beside a load never
    happens.

    Raises:
        DeviceError: that takes longer than anything of a profile does.
    """
    end = time.monotonic() + LIMIT_S
    while not event.query():
        if time.monotonic() > end:
            raise DeviceError(
                f"the GPU is not done after {LIMIT_S:.0f} s with what takes it less than one. End other programs "
                "on it and run the command again; if that does not help, look at `nvidia-smi -q` and "
                "`dmesg | grep -i xid`"
            )
        time.sleep(_POLL_S)
