"""MoE-Lightning: batch inference for Mixture-of-Experts models on a GPU that cannot hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

if TYPE_CHECKING:
    from moe_lightning.engine.request import RequestOutput, SamplingParams
    from moe_lightning.engine.structured import StructuredOutputsParams
    from moe_lightning.llm import LLM

# Imported on first use: `import moe_lightning.perf` must not import torch.
_LAZY = {
    "LLM": "moe_lightning.llm",
    "RequestOutput": "moe_lightning.engine.request",
    "SamplingParams": "moe_lightning.engine.request",
    "StructuredOutputsParams": "moe_lightning.engine.structured",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
