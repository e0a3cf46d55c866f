"""The offloaded pipeline against a plain forward pass over the checkpoint's own tensors."""

from __future__ import annotations

from moe_lightning.verify.comparison import PromptCheck, Verification, check, verify
from moe_lightning.verify.plain import PlainModel
from moe_lightning.verify.sources import from_checkpoint, from_memory

__all__ = ["PlainModel", "PromptCheck", "Verification", "check", "from_checkpoint", "from_memory", "verify"]
