"""What storage may refuse."""

from __future__ import annotations

from moe_lightning.server.errors import HttpError


class StorageFull(HttpError):  # noqa: N818 - says what is the case, and passes by itself
    """The disk takes nothing more; the same may be tried again once there is room."""

    def __init__(self, reason: str | None) -> None:
        message = f"the server's disk takes nothing more ({reason}); make room and try again"
        super().__init__(507, message, "storage_full")


class StorageDamaged(HttpError):  # noqa: N818
    """What lies on the disk is not what was written there."""

    def __init__(self, what: str) -> None:
        super().__init__(500, f"{what}; the server's operator has to repair or remove it", "storage_damaged")
