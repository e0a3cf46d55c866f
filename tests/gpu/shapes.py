"""Models of true shapes with few layers and random weights."""

from __future__ import annotations

import json

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def write_config(directory, num_layers, **changes):
    """A directory that `load_format="dummy"` takes for a model."""
    (directory / "config.json").write_text(
        json.dumps({**MIXTRAL, "num_hidden_layers": num_layers, **changes})
    )
    return directory
