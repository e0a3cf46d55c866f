"""Llama and Mistral: dense decoders with grouped-query attention, SwiGLU and RMSNorm."""

from __future__ import annotations

from moe_lightning.errors import UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.rotary import rope
from moe_lightning.models.spec import AttentionSpec, ExpertsSpec, ModelSpec, Role

LAYER_NAMES = {
    Role.EMBED: "model.embed_tokens.weight",
    Role.FINAL_NORM: "model.norm.weight",
    Role.LM_HEAD: "lm_head.weight",
    Role.INPUT_NORM: "model.layers.{layer}.input_layernorm.weight",
    Role.Q: "model.layers.{layer}.self_attn.q_proj.weight",
    Role.K: "model.layers.{layer}.self_attn.k_proj.weight",
    Role.V: "model.layers.{layer}.self_attn.v_proj.weight",
    Role.O: "model.layers.{layer}.self_attn.o_proj.weight",
    Role.POST_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
}
_MLP_NAMES = {
    Role.GATE: "model.layers.{layer}.mlp.gate_proj.weight",
    Role.UP: "model.layers.{layer}.mlp.up_proj.weight",
    Role.DOWN: "model.layers.{layer}.mlp.down_proj.weight",
}
INV_FREQ = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # old checkpoints store what theta implies
# Values that change the numbers and that a spec cannot express.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
    "quantization_config": None,
    "compression_config": None,
}


def spec(config: HFConfig) -> ModelSpec:
    """The model of a LlamaForCausalLM config."""
    # Some files carry a sliding_window; the model has none, whatever they say.
    return _dense(config, sliding_window=None)


def mistral_spec(config: HFConfig) -> ModelSpec:
    """The model of a MistralForCausalLM config."""
    # As transformers reads it: null is no window, a missing key means that of Mistral-7B-v0.1.
    return _dense(config, config.optional_int("sliding_window", missing=4096))


def _dense(config: HFConfig, sliding_window: int | None) -> ModelSpec:
    experts = ExpertsSpec(num_experts=1, intermediate_size=config.integer("intermediate_size"), router=None)
    return decoder(config, experts, {**LAYER_NAMES, **_MLP_NAMES}, sliding_window, default_theta=1e4)


def decoder(
    config: HFConfig,
    experts: ExpertsSpec,
    weight_names: dict[Role, str],
    sliding_window: int | None,
    default_theta: float,
) -> ModelSpec:
    """What Llama, Mistral and Mixtral share: all but feed-forward layers, window and default theta.

    Raises:
        UnsupportedModelError: a value is missing, out of range or would change the numbers.
    """
    for key, expected in _FIXED.items():
        config.require(key, expected)
    tied = config.flag("tie_word_embeddings", False)
    return ModelSpec(
        architecture=config.architecture,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        max_position=config.integer("max_position_embeddings"),
        attention=attention(config, sliding_window),
        experts=experts,
        norm_eps=config.number("rms_norm_eps"),
        weight_names=weight_names,
        rope=rope(config, default_theta),
        tie_word_embeddings=tied,
        ignored_weights=(INV_FREQ, r"lm_head\.weight") if tied else (INV_FREQ,),
        bos_token_id=config.bos_token_id,
        eos_token_ids=config.eos_token_ids,
        dtype=config.dtype,
    )


def attention(config: HFConfig, sliding_window: int | None) -> AttentionSpec:
    """Grouped-query attention from the usual keys.

    Raises:
        UnsupportedModelError: a size is missing or out of range, or the heads do not divide evenly.
    """
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"{config.source}: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}; take the config.json that came with the weights"
        )
    hidden_size = config.integer("hidden_size")
    if not config.has("head_dim") and hidden_size % num_heads:
        raise UnsupportedModelError(
            f"{config.source}: hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}, "
            "and there is no head_dim; take the config.json that came with the weights"
        )
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise UnsupportedModelError(
            f"{config.source}: head_dim={head_dim} is odd, and rotary embedding turns pairs; "
            "take the config.json that came with the weights"
        )
    return AttentionSpec(num_heads, num_kv_heads, head_dim, sliding_window)
