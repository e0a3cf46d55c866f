"""Models to measure with: known ones, shapes of others, and all of them with fewer layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.known import KNOWN_MODELS
from moe_lightning.models.registry import resolve, spec_from_config
from moe_lightning.models.spec import ModelSpec

# Models whose architecture is not supported yet, as one that is: their passes take as long, but for small kernels.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 2048, "intermediate_size": 768, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "num_local_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    },
}  # fmt: skip


def spec_of(model: str, num_layers: int | None = None, *, is_dummy: bool = True) -> ModelSpec:
    """The spec of a path, a known name, or shapes; with the first layers only, where `num_layers` is given.

    Raises:
        ConfigError: there is no such model, or it cannot have as many layers; real weights are never cut.
    """
    name = model.lower()
    if is_dummy and name in SHAPES and name not in KNOWN_MODELS:
        spec = spec_from_config(HFConfig(SHAPES[name], name))
    else:
        spec = resolve(model)
    if num_layers is None:
        return spec
    if not is_dummy:
        raise ConfigError(f"num_layers={num_layers} needs random weights; add --load-format dummy")
    if not 1 <= num_layers <= spec.num_layers:
        raise ConfigError(f"num_layers={num_layers}: {model} has {spec.num_layers}; give 1 to as many")
    return replace(spec, num_layers=num_layers)
