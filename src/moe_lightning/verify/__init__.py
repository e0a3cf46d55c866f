"""The offloaded pipeline against a plain forward pass over the checkpoint's own tensors."""

from __future__ import annotations

from moe_lightning.verify.comparison import PromptCheck, Verification, verify
from moe_lightning.verify.plain import PlainModel

__all__ = ["PlainModel", "PromptCheck", "Verification", "verify"]
