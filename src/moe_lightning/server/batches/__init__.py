"""OpenAI's Files and Batches over SQLite and plain files, resumable after any interruption."""

from __future__ import annotations

from moe_lightning.server.batch_limits import BatchLimits
from moe_lightning.server.batches.service import BatchService

__all__ = ["BatchLimits", "BatchService"]
