"""Where a plain forward pass reads weights: the checkpoint's files, or the memory that an engine runs from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moe_lightning.memory import checkpoint
from moe_lightning.memory.weights import Weights
from moe_lightning.models.spec import ModelSpec, Role

Source = Callable[[Role, int, int], Tensor]  # of a layer and an expert, -1 where there is none: [out, in]


def from_checkpoint(spec: ModelSpec, directory: Path) -> Source:
    """The files' own tensors, read when they are asked for.

    Raises:
        CheckpointError: the files are not the model's.
    """
    stored = {
        (tensor.role, tensor.layer, tensor.expert): entry
        for tensor, entry in checkpoint.open_model(directory, spec)
    }
    return lambda role, layer, expert: checkpoint.read_tensor(stored[role, layer, expert])


def from_memory(weights: Weights) -> Source:
    """What an engine computes with, put together from pages; for random weights, of which there are no files."""
    tensors = {(t.role, t.layer, t.expert): t for t in weights.spec.tensors()}
    return lambda role, layer, expert: weights.get(tensors[role, layer, expert])
