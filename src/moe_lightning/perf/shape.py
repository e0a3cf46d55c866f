"""The sizes of a model as profiles know them."""

from __future__ import annotations

from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import pages_per_expert


def shape_of(spec: ModelSpec, name: str, dtype_bytes: int = 2) -> ModelShape:
    """A model's shape, its experts cut into pages as the default policy would."""
    e, a = spec.experts, spec.attention
    return ModelShape(
        name, spec.hidden_size, e.intermediate_size, e.num_experts, e.top_k,
        pages_per_expert(spec, dtype_bytes),
        a.num_heads, a.num_kv_heads, a.head_dim, spec.vocab_size,
    )  # fmt: skip
