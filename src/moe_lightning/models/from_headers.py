"""A model to plan for, from the headers of its weights alone, where there is no config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lightning.errors import UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.registry import resolve, spec_from_config
from moe_lightning.models.spec import ModelSpec
from moe_lightning.models.stored import INDEX, SINGLE, StoredTensor, open_checkpoint

_LAYER = "model.layers.0."
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# What no shape tells, as most models have it; none of it changes a plan by much.
_HEAD_DIMS = (128, 64)
_TOP_K, _POSITIONS = 2, 32768


def resolve_to_plan(model: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of a checkpoint, a config.json or a name, and what was assumed of it: nothing where a config is.

    Raises:
        ConfigError: there is no such path and no such name.
        UnsupportedModelError: the model is none that is supported.
        CheckpointError: there is no config.json, and the weights' files are damaged or not all there.
    """
    directory = Path(model)
    has_weights = (directory / SINGLE).exists() or (directory / INDEX).exists()
    if not model or not has_weights or (directory / "config.json").exists():
        return resolve(model), ()
    return spec_from_headers(directory)


def spec_from_headers(directory: Path) -> tuple[ModelSpec, tuple[str, ...]]:
    """Shapes from the weights' headers, and what had to be assumed: good for a plan, not for running the model.

    Raises:
        UnsupportedModelError: the tensors are not those of a model that is supported.
        CheckpointError: a file is damaged or missing.
    """
    tensors = open_checkpoint(directory, has_weights=False)
    try:
        values = _config(directory, tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise UnsupportedModelError(
            f"{directory} has no config.json, and its weights are of no model that is known from their names "
            f"({error} is missing); put the model's config.json beside them"
        ) from error
    assumed = [f"heads of {values['head_dim']}", f"up to {_POSITIONS:,} positions", "no sliding window"]
    if "num_experts_per_tok" in values:
        assumed.insert(0, f"{_TOP_K} experts a token")
    note = f"no config.json beside the weights; assumed are {', '.join(assumed)}"
    return spec_from_config(HFConfig(values, str(directory))), (note,)


def _config(directory: Path, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """The values that a config.json would have."""
    vocab, hidden = tensors["model.embed_tokens.weight"].shape
    query = tensors[_LAYER + "self_attn.q_proj.weight"]
    q, kv = query.shape[0], tensors[_LAYER + "self_attn.k_proj.weight"].shape[0]
    head_dim = next((size for size in _HEAD_DIMS if q % size == 0 and kv % size == 0), kv)
    if query.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{directory}: {query.name} is {query.dtype}; weights in {', '.join(_DTYPES)} can be planned for"
        )
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    return {
        **_experts(tensors), "num_hidden_layers": len(layers), "hidden_size": hidden, "vocab_size": vocab,
        "num_attention_heads": q // head_dim, "num_key_value_heads": kv // head_dim, "head_dim": head_dim,
        "max_position_embeddings": _POSITIONS, "rms_norm_eps": 1e-5, "hidden_act": "silu", "sliding_window": None,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "dtype": _DTYPES[query.dtype],
    }  # fmt: skip


def _experts(tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    router = tensors.get(_LAYER + "block_sparse_moe.gate.weight")
    if router is None:
        size = tensors[_LAYER + "mlp.gate_proj.weight"].shape[0]
        return {"architectures": ["LlamaForCausalLM"], "intermediate_size": size}
    return {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": tensors[_LAYER + "block_sparse_moe.experts.0.w1.weight"].shape[0],
        "num_local_experts": router.shape[0], "num_experts_per_tok": min(_TOP_K, router.shape[0]),
    }  # fmt: skip
