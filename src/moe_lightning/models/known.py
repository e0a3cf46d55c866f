"""Config values of published models, so that they can be planned for before anything is downloaded."""

from __future__ import annotations

from typing import Any


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
_LLAMA31_INSTRUCT = _LLAMA31 | {"eos_token_id": [128001, 128008, 128009]}
_SMOLLM2: dict[str, Any] = {"rope_theta": 1e5, "tie_word_embeddings": True}
_MOE8: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
_7B = (32, 4096, 14336, 32, 8)
_70B = (80, 8192, 28672, 64, 8)
_8X22B = (56, 6144, 16384, 48, 8)
_135M = (30, 576, 1536, 9, 3)

# The models' own config.json files, as far as a spec reads them; end tokens are those of generation_config.json.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": _config("MixtralForCausalLM", _7B, 32000, 32768, **_MOE8),
    "mixtral-8x22b": _config("MixtralForCausalLM", _8X22B, 32000, 65536, **_MOE8),
    "mixtral-8x22b-instruct": _config("MixtralForCausalLM", _8X22B, 32768, 65536, **_MOE8),
    "mistral-7b": _config("MistralForCausalLM", _7B, 32000, 32768, rope_theta=1e4, sliding_window=4096),
    "mistral-7b-v0.3": _config("MistralForCausalLM", _7B, 32768, 32768, rope_theta=1e6, sliding_window=None),
    "llama-2-7b": _config("LlamaForCausalLM", (32, 4096, 11008, 32, 32), 32000, 4096, dtype="float16"),
    "llama-3.1-8b": _config("LlamaForCausalLM", _7B, 128256, 131072, **_LLAMA31),
    "llama-3.1-8b-instruct": _config("LlamaForCausalLM", _7B, 128256, 131072, **_LLAMA31_INSTRUCT),
    "llama-3.1-70b": _config("LlamaForCausalLM", _70B, 128256, 131072, **_LLAMA31),
    "llama-3.1-70b-instruct": _config("LlamaForCausalLM", _70B, 128256, 131072, **_LLAMA31_INSTRUCT),
    "smollm2-135m": _config(
        "LlamaForCausalLM", _135M, 49152, 8192, bos_token_id=0, eos_token_id=0, **_SMOLLM2
    ),
    "smollm2-135m-instruct": _config("LlamaForCausalLM", _135M, 49152, 8192, **_SMOLLM2),
}  # fmt: skip

# Names on the Hugging Face hub, in lower case. Each is listed: a name that only begins alike may have another
# vocabulary, window or rotary theta (Mistral-7B-Instruct-v0.2), or be another model (Llama-2-7B-32K).
ALIASES: dict[str, str] = {
    "mistralai/mixtral-8x7b-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x7b-instruct-v0.1": "mixtral-8x7b",
    "mistralai/mixtral-8x22b-v0.1": "mixtral-8x22b",
    "mistralai/mixtral-8x22b-instruct-v0.1": "mixtral-8x22b-instruct",
    "mistralai/mistral-7b-v0.1": "mistral-7b",
    "mistralai/mistral-7b-instruct-v0.1": "mistral-7b",
    "mistralai/mistral-7b-v0.3": "mistral-7b-v0.3",
    "mistralai/mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-7b-chat-hf": "llama-2-7b",
    "meta-llama/llama-3.1-8b": "llama-3.1-8b",
    "meta-llama/meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama/llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama/meta-llama-3.1-8b-instruct": "llama-3.1-8b-instruct",
    "meta-llama/llama-3.1-70b": "llama-3.1-70b",
    "meta-llama/meta-llama-3.1-70b": "llama-3.1-70b",
    "meta-llama/llama-3.1-70b-instruct": "llama-3.1-70b-instruct",
    "meta-llama/meta-llama-3.1-70b-instruct": "llama-3.1-70b-instruct",
    "huggingfacetb/smollm2-135m": "smollm2-135m",
    "huggingfacetb/smollm2-135m-instruct": "smollm2-135m-instruct",
}
