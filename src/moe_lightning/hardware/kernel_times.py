"""What a model's kernels were measured to take, by the sizes that decide it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.curve import RateCurve, TimeCurve


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its kernels' times depend on; `name` is for people."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    pages_per_expert: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def q_size(self) -> int:
        """Width of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def attention(self) -> tuple[int, int, int]:
        """Query heads, KV heads, head dimension."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of query, key and value together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def experts_met(self, num_tokens: float) -> float:
        """Experts that tokens meet, if each chooses at random: those whose weights are read."""
        missed: float = (1.0 - self.top_k / self.num_experts) ** num_tokens
        return self.num_experts * (1.0 - missed)

    def is_like(self, other: ModelShape) -> bool:
        """Whether kernels take the same times: all but the name, and the pages that the GPU alone knows."""
        return replace(self, name=other.name, pages_per_expert=other.pages_per_expert) == other

    @property
    def experts_flops_per_token(self) -> float:
        """FLOPs of a token's visits to its experts in one layer."""
        return 6.0 * self.top_k * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class PartTimes:
    """A sweep over some of a layer's experts: seconds by all tokens, those that meet none of these among them."""

    share: float
    times: TimeCurve

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"a part's share is {self.share}; it must lie between 0 and 1")


@dataclass(frozen=True)
class ExpertsProfile:
    """Sweeps over a layer's experts: seconds by tokens.

    Attributes:
        shape: of the model.
        dtype: of the weights.
        times: all experts in one sweep.
        parts: sweeps over shares of them, the smallest first; none where nobody measured or there is one expert.
    """

    shape: ModelShape
    dtype: str
    times: TimeCurve
    parts: tuple[PartTimes, ...] = ()

    def seconds(self, shape: ModelShape, num_tokens: float, share: float = 1.0) -> float:
        """Seconds of a sweep of any shape, at the FLOP/s that these have with as many rows for each expert.

        A share of the experts takes its share of the whole sweep, and what a sweep takes whatever it computes: its
        launches, and processors that wait for the last blocks. That is measured at some shares, linear between.
        """
        mine = self.shape
        rows = num_tokens * shape.top_k / shape.num_experts
        tokens = rows * mine.num_experts / mine.top_k
        flops = shape.experts_flops_per_token * num_tokens / (mine.experts_flops_per_token * tokens)
        whole = self.times.seconds_at(tokens)
        return min(whole, share * whole + self._fixed(tokens, share)) * flops

    def _fixed(self, tokens: float, share: float) -> float:
        """Seconds that a share takes beyond its share of the whole sweep."""
        found = 0.0
        after, after_s = 1.0, 0.0
        for part in reversed(self.parts):
            found = max(0.0, part.times.seconds_at(tokens) - part.share * self.times.seconds_at(tokens))
            if share >= part.share:
                return after_s + (found - after_s) * (after - share) / (after - part.share)
            after, after_s = part.share, found
        return found


@dataclass(frozen=True)
class SmallKernels:
    """A layer's tasks before and after attention, alone while pages come and the CPU attends: seconds by rows.

    Attributes:
        shape: of the model.
        dtype: of activations.
        pre_attention: norm, product, rotation.
        post_attention: product, norm, the router's product, the choice of experts.
        is_whole: whether the projections' products are in these times; profiles of earlier versions have the small
            kernels alone, one behind the other with nothing beside them.
    """

    shape: ModelShape
    dtype: str
    pre_attention: TimeCurve
    post_attention: TimeCurve
    is_whole: bool = False

    def rows_of(self, hidden_size: int, rows: float) -> float:
        """Rows of this model that have as many elements as rows of another one."""
        return rows * hidden_size / self.shape.hidden_size


@dataclass(frozen=True)
class DenseProfile:
    """A product of rows with a matrix [outputs, inputs]: seconds by rows."""

    name: str
    inputs: int
    outputs: int
    dtype: str
    times: TimeCurve

    def seconds(self, inputs: int, outputs: int, rows: float) -> float:
        """Seconds of a product with a matrix of any size, at this one's rates."""
        return self.times.seconds_at(rows) * (inputs * outputs) / (self.inputs * self.outputs)


@dataclass(frozen=True)
class DecodeProfile:
    """Attention of one query per sequence over blocks in GPU memory: bytes/s of K and V by tokens of a sequence.

    Attributes:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: elements of each.
        dtype: of activations and KV.
        rate: bytes/s, the new K and V appended.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rate: RateCurve


@dataclass(frozen=True)
class PrefillProfile:
    """Causal attention on the GPU: FLOP/s of its two products by tokens of the prompt that a token is in.

    In chunks of unequal prompts, as they come: the mean over tokens, in which a long prompt counts more often.

    Attributes:
        num_heads: query heads.
        num_kv_heads: heads of keys and values.
        head_dim: elements of each.
        dtype: of activations.
        rate: FLOP/s, while K and V of the chunk are stored, pages come and the CPU attends.
        store: seconds by bytes in which kernels write K and V of a chunk to their places in host memory beside all
            of that; None where nobody measured, or they are copied.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rate: RateCurve
    store: TimeCurve | None = None

    def seconds(self, prompt_len: float, flops: float) -> float:
        """Seconds for so many FLOPs over prompts of a length."""
        return flops / self.rate.rate_at(prompt_len)
