"""A model as data: every shape, option and weight name that the rest of the package derives from.

A dense model is the same data with one expert and no router: its feed-forward layers are streamed as pages of
that one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property


class Activation(StrEnum):
    """The gated activation of the feed-forward layers."""

    SWIGLU = "swiglu"  # silu(gate) * up


class RouterScoring(StrEnum):
    """How router logits become the weights of the chosen experts."""

    SOFTMAX_TOPK = "softmax_topk"  # softmax over all experts, then the top k


class RopeScaling(StrEnum):
    """How rotary frequencies are stretched for long contexts."""

    NONE = "none"
    LINEAR = "linear"  # all frequencies divided by the factor
    LLAMA3 = "llama3"  # low frequencies divided by the factor, high ones kept, smooth between


class Role(StrEnum):
    """What a checkpoint tensor is for."""

    EMBED = "embed"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"
    INPUT_NORM = "input_norm"
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741  the field's own name for the output projection
    POST_NORM = "post_norm"
    ROUTER = "router"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


EXPERT_ROLES = frozenset({Role.GATE, Role.UP, Role.DOWN})


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding, in the half-split convention of Llama.

    Source: transformers' `modeling_rope_utils` for the meaning of each scaling.
    """

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None  # a query sees itself and the sliding_window - 1 tokens before it

    @property
    def q_size(self) -> int:
        """Width of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of query, key and value together."""
        return self.q_size + 2 * self.kv_size


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts."""

    top_k: int
    scoring: RouterScoring = RouterScoring.SOFTMAX_TOPK
    normalize: bool = True  # the chosen experts' weights sum to one


@dataclass(frozen=True)
class ExpertsSpec:
    """The feed-forward part of a layer; `router` is None for a dense layer, which has one expert."""

    num_experts: int
    intermediate_size: int
    router: RouterSpec | None
    activation: Activation = Activation.SWIGLU

    @property
    def top_k(self) -> int:
        """Experts that each token visits."""
        return self.router.top_k if self.router else 1


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint: its name there, its shape and its place in the model."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int = -1
    expert: int = -1

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model but its weights.

    `weight_names` maps each role to the tensor's name with `{layer}` and `{expert}`; `ignored_weights` are regular
    expressions of checkpoint tensors that carry nothing (inverse frequencies, tied heads).
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position: int
    attention: AttentionSpec
    experts: ExpertsSpec
    norm_eps: float
    weight_names: dict[Role, str] = field(hash=False)
    rope: RopeSpec = RopeSpec()
    tie_word_embeddings: bool = False
    ignored_weights: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # what the checkpoint says of itself

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor that a checkpoint of this model must hold, in layer order."""
        names, h = self.weight_names, self.hidden_size
        yield TensorSpec(names[Role.EMBED], (self.vocab_size, h), Role.EMBED)
        for layer in range(self.num_layers):
            yield from self._layer_tensors(layer)
        yield TensorSpec(names[Role.FINAL_NORM], (h,), Role.FINAL_NORM)
        if not self.tie_word_embeddings:
            yield TensorSpec(names[Role.LM_HEAD], (self.vocab_size, h), Role.LM_HEAD)

    def _layer_tensors(self, layer: int) -> Iterator[TensorSpec]:
        for role, shape in self.layer_shapes.items():
            name = self.weight_names[role]
            if role not in EXPERT_ROLES:
                yield TensorSpec(name.format(layer=layer), shape, role, layer)
        for expert in range(self.experts.num_experts):
            for role in (Role.GATE, Role.UP, Role.DOWN):
                name = self.weight_names[role].format(layer=layer, expert=expert)
                yield TensorSpec(name, self.layer_shapes[role], role, layer, expert)

    @cached_property
    def layer_shapes(self) -> dict[Role, tuple[int, ...]]:
        """Shape of each tensor of one layer, as [out, in]; expert roles are for one expert."""
        h, i, a = self.hidden_size, self.experts.intermediate_size, self.attention
        shapes: dict[Role, tuple[int, ...]] = {
            Role.INPUT_NORM: (h,),
            Role.Q: (a.q_size, h),
            Role.K: (a.kv_size, h),
            Role.V: (a.kv_size, h),
            Role.O: (h, a.q_size),
            Role.POST_NORM: (h,),
            Role.GATE: (i, h),
            Role.UP: (i, h),
            Role.DOWN: (h, i),
        }
        if self.experts.router:
            shapes[Role.ROUTER] = (self.experts.num_experts, h)
        return shapes

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once."""
        return sum(t.num_elements for t in self.tensors())

    @property
    def num_expert_parameters(self) -> int:
        """Weights of all experts: what can be streamed."""
        per_expert = 3 * self.hidden_size * self.experts.intermediate_size
        return self.num_layers * self.experts.num_experts * per_expert

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets."""
        e = self.experts
        return self.num_parameters - self.num_expert_parameters * (e.num_experts - e.top_k) // e.num_experts

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * 2 * self.attention.kv_size * dtype_bytes
