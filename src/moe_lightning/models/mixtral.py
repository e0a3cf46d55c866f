"""Mixtral: Mistral's decoder with a mixture of SwiGLU experts in every layer."""

from __future__ import annotations

from moe_lightning.errors import UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.llama import LAYER_NAMES, decoder
from moe_lightning.models.spec import ExpertsSpec, ModelSpec, Role, RouterScoring, RouterSpec

_MOE = "model.layers.{layer}.block_sparse_moe."
_EXPERT_NAMES = {
    Role.ROUTER: _MOE + "gate.weight",
    Role.GATE: _MOE + "experts.{expert}.w1.weight",
    Role.UP: _MOE + "experts.{expert}.w3.weight",
    Role.DOWN: _MOE + "experts.{expert}.w2.weight",
}


def spec(config: HFConfig) -> ModelSpec:
    """The model of a MixtralForCausalLM config."""
    num_experts, top_k = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise UnsupportedModelError(
            f"{config.source}: num_experts_per_tok={top_k} is more than num_local_experts={num_experts}; "
            "take the config.json that came with the weights"
        )
    experts = ExpertsSpec(
        num_experts=num_experts,
        intermediate_size=config.integer("intermediate_size"),
        router=RouterSpec(top_k, RouterScoring.SOFTMAX_TOPK, normalize=True),
    )
    window = config.optional_int("sliding_window")
    return decoder(config, experts, {**LAYER_NAMES, **_EXPERT_NAMES}, window, default_theta=1e6)
