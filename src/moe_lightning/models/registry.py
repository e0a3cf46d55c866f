"""From a checkpoint, a config file or a known name to a ModelSpec."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from moe_lightning.errors import ConfigError, UnsupportedModelError
from moe_lightning.models import llama, mixtral
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.known import ALIASES, KNOWN_MODELS
from moe_lightning.models.spec import ModelSpec

__all__ = ["ARCHITECTURES", "KNOWN_MODELS", "resolve", "spec_from_config"]

ARCHITECTURES: dict[str, Callable[[HFConfig], ModelSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": llama.mistral_spec,
    "MixtralForCausalLM": mixtral.spec,
}
# Every accepted name, in lower case: known ones, and those of the hub with and without their organization.
_NAMES: dict[str, str] = {
    **{alias.split("/")[-1]: known for alias, known in ALIASES.items()},
    **ALIASES,
    **{known: known for known in KNOWN_MODELS},
}


def resolve(model: str) -> ModelSpec:
    """The spec of a checkpoint directory, a config.json, or a known name such as ``mixtral-8x7b``.

    What is on disk goes before a name. Names on the hub are known too, with or without their organization:
    ``mistralai/Mixtral-8x7B-Instruct-v0.1``. Case does not matter in names.

    Raises:
        ConfigError: there is no such path and no such name.
        UnsupportedModelError: the config asks for something that is not supported.
    """
    if not model:  # as a path it would be the current directory
        raise ConfigError(
            "model='' names no model; give a checkpoint directory or a name such as mixtral-8x7b"
        )
    if Path(model).exists():
        return spec_from_config(HFConfig.load(model))
    name = _NAMES.get(model.lower())
    if name is None:
        raise _unknown(model)
    return spec_from_config(HFConfig(KNOWN_MODELS[name], name))


def spec_from_config(config: HFConfig) -> ModelSpec:
    """The spec that a config describes.

    Raises:
        UnsupportedModelError: the architecture or one of its values is not supported.
    """
    build = ARCHITECTURES.get(config.architecture)
    if build is None:
        raise UnsupportedModelError(
            f"{config.source}: architecture {config.architecture!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return build(config)


def _unknown(model: str) -> ConfigError:
    near = difflib.get_close_matches(model.lower().split("/")[-1], KNOWN_MODELS, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join(KNOWN_MODELS)}."
    return ConfigError(
        f"{model!r} is neither a path nor a known model; {hint} "
        "Of another model, give the directory with its config.json"
    )
