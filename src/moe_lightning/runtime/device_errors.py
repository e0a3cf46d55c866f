"""What a GPU's failures mean and what helps."""

from __future__ import annotations

from moe_lightning.errors import DeviceError


def explain(error: RuntimeError) -> DeviceError | None:
    """The error that a user can act on, if this one is a failure of the GPU or its driver; None for any other."""
    text = str(error)
    reason = text.splitlines()[0] if text else ""
    if not reason.startswith(("CUDA error", "CUDA driver error", "Triton Error", "cuStreamWaitValue32")):
        return None
    return DeviceError(
        f"the GPU failed ({reason}); nothing can run on it in this process any more. Run the command again: a "
        "batch job goes on where it stopped. If it fails again, look at `dmesg | grep -i xid` and `nvidia-smi -q`, "
        "and try executor='serial', which fails at the task itself"
    )
