"""Llama and Mistral: dense decoders with grouped-query attention, SwiGLU and RMSNorm."""

from __future__ import annotations

from moe_lightning.errors import UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.spec import AttentionSpec, ExpertsSpec, ModelSpec, Role, RopeScaling, RopeSpec

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


def spec(config: HFConfig) -> ModelSpec:
    """The model of a LlamaForCausalLM or MistralForCausalLM config."""
    config.require("mlp_bias", False)
    experts = ExpertsSpec(num_experts=1, intermediate_size=config.integer("intermediate_size"), router=None)
    return decoder(config, experts, {**LAYER_NAMES, **_MLP_NAMES})


def decoder(config: HFConfig, experts: ExpertsSpec, weight_names: dict[Role, str]) -> ModelSpec:
    """What Llama, Mistral and Mixtral share: all but the feed-forward layers."""
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("quantization_config", None)
    tied = config.flag("tie_word_embeddings", False)
    return ModelSpec(
        architecture=config.architecture,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        max_position=config.integer("max_position_embeddings"),
        attention=attention(config),
        experts=experts,
        norm_eps=config.number("rms_norm_eps"),
        weight_names=weight_names,
        rope=rope(config),
        tie_word_embeddings=tied,
        ignored_weights=(INV_FREQ, r"lm_head\.weight") if tied else (INV_FREQ,),
        bos_token_id=config.optional_int("bos_token_id"),
        eos_token_ids=config.eos_token_ids,
        dtype=config.dtype,
    )


def attention(config: HFConfig) -> AttentionSpec:
    """Grouped-query attention from the usual keys."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    head_dim = config.integer("head_dim", config.integer("hidden_size") // num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"{config.source}: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    return AttentionSpec(num_heads, num_kv_heads, head_dim, config.optional_int("sliding_window"))


def rope(config: HFConfig) -> RopeSpec:
    """Rotary embedding; scalings whose numbers are not known here are refused."""
    values = config.rope
    kind = values.get("rope_type", "default")
    if kind == "default":
        return RopeSpec(theta=float(values["rope_theta"]))
    if kind == "linear":
        return RopeSpec(float(values["rope_theta"]), RopeScaling.LINEAR, float(values["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta=float(values["rope_theta"]),
            scaling=RopeScaling.LLAMA3,
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_max_position=int(values["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(
        f"{config.source}: rope_type={kind!r} is not supported; default, linear and llama3 are"
    )
