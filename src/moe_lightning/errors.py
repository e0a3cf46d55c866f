"""The errors that a user can act on."""

from __future__ import annotations


class MoELightningError(Exception):
    """Base of every error this package raises on purpose; its message says the value and the remedy."""


class ConfigError(MoELightningError):
    """A setting or flag cannot be used."""


class GPUMemoryError(ConfigError):
    """A policy takes more GPU memory than there is: others have some of it."""


class UnsupportedModelError(MoELightningError):
    """The checkpoint's architecture or one of its config values is not supported."""


class CheckpointError(MoELightningError):
    """The checkpoint's files are missing, truncated or not what its config says."""


class NotPackableError(MoELightningError):
    """Weights have more exponents outside their windows than a packed segment has room for; unpacked they work."""


class NoFeasiblePolicyError(MoELightningError):
    """No policy fits the memory there is.

    Attributes:
        problem: the message without the remedy, for those whose user sets memory in another way.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}. {remedy}" if remedy else problem)
        self.problem = problem


class ScheduleError(MoELightningError):
    """A schedule would compute something else than the model."""


class DeviceError(MoELightningError):
    """The GPU or its driver failed, or its memory does not suffice for the smallest pass."""


class RequestError(MoELightningError):
    """One request cannot be served; other requests are not affected."""


class JobError(MoELightningError):
    """A batch job cannot start or go on; what it has written stays valid."""
