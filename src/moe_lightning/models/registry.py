"""From a checkpoint, a config file or a known name to a ModelSpec."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lightning.errors import ConfigError, UnsupportedModelError
from moe_lightning.models import llama, mixtral
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.spec import ModelSpec

ARCHITECTURES: dict[str, Callable[[HFConfig], ModelSpec]] = {
    "LlamaForCausalLM": llama.spec,
    "MistralForCausalLM": llama.spec,
    "MixtralForCausalLM": mixtral.spec,
}


def _config(
    architecture: str, shape: tuple[int, int, int, int, int], vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    """A config.json from (layers, hidden, intermediate, heads, KV heads) and the rest by name."""
    layers, hidden, intermediate, heads, kv_heads = shape
    return {
        "architectures": [architecture], "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": positions, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


_LLAMA31: dict[str, Any] = {
    "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_MOE8 = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}

# The models' own config.json files, as far as a spec reads them.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": _config("MixtralForCausalLM", (32, 4096, 14336, 32, 8), 32000, 32768, **_MOE8),
    "mixtral-8x22b": _config("MixtralForCausalLM", (56, 6144, 16384, 48, 8), 32000, 65536, **_MOE8),
    "mistral-7b": _config(
        "MistralForCausalLM", (32, 4096, 14336, 32, 8), 32000, 32768, rope_theta=1e4, sliding_window=4096
    ),
    "llama-2-7b": _config("LlamaForCausalLM", (32, 4096, 11008, 32, 32), 32000, 4096),
    "llama-3.1-8b": _config("LlamaForCausalLM", (32, 4096, 14336, 32, 8), 128256, 131072, **_LLAMA31),
    "llama-3.1-70b": _config("LlamaForCausalLM", (80, 8192, 28672, 64, 8), 128256, 131072, **_LLAMA31),
    "smollm2-135m": _config(
        "LlamaForCausalLM", (30, 576, 1536, 9, 3), 49152, 8192, rope_theta=1e5, tie_word_embeddings=True
    ),
}


def resolve(model: str) -> ModelSpec:
    """The spec of a checkpoint directory, a config.json, or a known name such as ``mixtral-8x7b``.

    Names are compared without organization, version and tuning: ``mistralai/Mixtral-8x7B-Instruct-v0.1`` is
    known.

    Raises:
        ConfigError: there is no such path and no such name.
        UnsupportedModelError: the config asks for something that is not supported.
    """
    if Path(model).exists():
        return spec_from_config(HFConfig.load(model))
    name = _known_name(model)
    if name is None:
        near = difflib.get_close_matches(model.lower().split("/")[-1], KNOWN_MODELS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known names: {', '.join(KNOWN_MODELS)}"
        raise ConfigError(f"{model!r} is neither a path nor a known model; {hint}")
    return spec_from_config(HFConfig(KNOWN_MODELS[name], name, {}))


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


def _known_name(model: str) -> str | None:
    name = model.lower().split("/")[-1].replace("meta-llama-", "llama-")
    for known in KNOWN_MODELS:
        rest = name.removeprefix(known)
        if name.startswith(known) and (not rest or rest[0] == "-"):
            return known
    return None
