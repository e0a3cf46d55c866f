"""Which models' shapes are measured."""

from __future__ import annotations

from pathlib import Path

from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.models.registry import resolve
from moe_lightning.perf.shape import shape_of

# Of models that do not run yet. Source: the models' config.json.
_LATER = {"qwen3-30b-a3b": ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, 1, 32, 4, 128, 151936)}


def shape_named(model: str) -> ModelShape:
    """The shape of a known name, a checkpoint directory or a config.json.

    Raises:
        ConfigError: there is none of that name.
        UnsupportedModelError: the config asks for something that is not supported.
    """
    if model.lower() in _LATER and not Path(model).exists():
        return _LATER[model.lower()]
    return shape_of(resolve(model), Path(model).name if Path(model).exists() else model)
