"""Tile shapes of the expert products: a pure function of shapes and GPU over a small measured table.

`expert_configs.json` holds what `benchmarks/tune_experts.py` measured. Where it has no entry for a GPU or a shape,
`default_config` gives one that is right everywhere and fast on most.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Tile:
    """One product's tile; `num_stages` loads are in flight."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpertsConfig:
    """How the experts of one call are computed.

    Attributes:
        block_m: rows of an expert that a program works on.
        group_m: row blocks that run side by side and so share each weight tile in the cache.
        gate_up: tile of the first product; it has `block_n` rows of gate and as many of up.
        down: tile of the second product.
        split_k: shares into which the second product's sum is cut, for grids too small to fill the GPU.
        gather: load tokens through their indices; else copy them into sorted order first, which pays for
            itself when many tiles read them.
        tma: load through tensor descriptors (Hopper and later).
    """

    block_m: int
    group_m: int
    gate_up: Tile
    down: Tile
    split_k: int = 1
    gather: bool = True
    tma: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExpertsConfig:
        """The inverse of `to_json`."""
        return cls(**{**values, "gate_up": Tile(**values["gate_up"]), "down": Tile(**values["down"])})


@dataclass(frozen=True)
class ExpertsShape:
    """What a configuration depends on.

    Attributes:
        num_tokens: T.
        top_k: experts per token.
        num_experts: E.
        hidden_size: H.
        page_rows: intermediate rows of a page.
        pages_per_expert: P; the intermediate size is P * page_rows.
        itemsize: bytes of a weight.
        capability: of the GPU, such as (9, 0).
    """

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    page_rows: int
    pages_per_expert: int
    itemsize: int
    capability: tuple[int, int]

    @property
    def tokens_per_expert(self) -> float:
        """Rows of an expert on average."""
        return self.num_tokens * self.top_k / self.num_experts

    @property
    def key(self) -> tuple[int, ...]:
        """What an entry of the table must match."""
        intermediate = self.page_rows * self.pages_per_expert
        return (*self.capability, self.itemsize, self.hidden_size, intermediate, self.num_experts, self.top_k)

    @property
    def allows_tma(self) -> bool:
        """Tensor descriptors need Hopper or later, 16-bit weights and rows of 16-byte multiples."""
        aligned = all(size * self.itemsize % 16 == 0 for size in (self.hidden_size, self.page_rows))
        return self.capability >= (9, 0) and self.itemsize == 2 and aligned


@lru_cache(maxsize=1024)
def select(shape: ExpertsShape) -> ExpertsConfig:
    """The configuration for a call: of the measured ones that with the nearest number of tokens per expert."""
    measured = _table().get(shape.key)
    if not measured:
        return fit(default_config(shape), shape)
    wanted = math.log2(max(shape.tokens_per_expert, 1e-3))
    nearest = min(measured, key=lambda tokens: abs(math.log2(tokens) - wanted))
    return fit(measured[nearest], shape)


def default_config(shape: ExpertsShape) -> ExpertsConfig:
    """A configuration by rules, from the number of rows that an expert has on average."""
    if shape.itemsize == 4:
        tile = Tile(32, 32, 4, 2)
        return ExpertsConfig(32, 8, tile, tile)
    block_m = min(128, max(16, _power_of_2(1.25 * shape.tokens_per_expert)))
    if (9, 0) <= shape.capability < (12, 0):
        return _hopper(shape, block_m)
    if shape.capability < (8, 0):  # no tensor cores, as Triton sees it: operands are in registers
        block_m = min(block_m, 64)
        tile = Tile(64, 32, 8 if block_m == 64 else 4, 2)
        return ExpertsConfig(block_m, 8, tile, tile)
    # Must do with the 99 KiB of shared memory that consumer cards have, those after Hopper too.
    if block_m == 128:
        return ExpertsConfig(block_m, 8, Tile(64, 32, 8, 3), Tile(128, 32, 8, 3))
    return ExpertsConfig(block_m, 8, Tile(32, 64, 4, 3), Tile(64, 64, 4, 3))


def _hopper(shape: ExpertsShape, block_m: int) -> ExpertsConfig:
    if block_m == 128:
        tile = Tile(128, 64, 8, 4)
        return ExpertsConfig(128, 16, tile, replace(tile, block_n=256), gather=False, tma=True)
    small = block_m <= 32
    blocks = min(shape.num_experts, shape.num_tokens * shape.top_k)
    narrow = (
        blocks * shape.hidden_size < 132 * 2 * 64
    )  # too few tiles of 64 columns for two programs on each SM
    return ExpertsConfig(
        block_m, 16,
        gate_up=Tile(32 if small else 64, 128 if small else 64, 4, 4),
        down=Tile(32 if small and narrow else 64, 128, 4, 4 if small else 3),
        split_k=4 if narrow else 1, tma=True,
    )  # fmt: skip


def fit(config: ExpertsConfig, shape: ExpertsShape) -> ExpertsConfig:
    """The configuration with no tile much larger than what it covers, and no way of loading that cannot be."""
    rows, hidden = _power_of_2(shape.page_rows), _power_of_2(shape.hidden_size)
    gate_up, down = config.gate_up, config.down
    return replace(
        config,
        gate_up=replace(gate_up, block_n=min(gate_up.block_n, rows), block_k=min(gate_up.block_k, hidden)),
        down=replace(down, block_n=min(down.block_n, hidden), block_k=min(down.block_k, rows)),
        tma=config.tma and shape.allows_tma,
        gather=config.gather or not (config.tma and shape.allows_tma),
    )


def _power_of_2(size: float) -> int:
    return max(16, 1 << math.ceil(math.log2(max(size, 1))))


@lru_cache(maxsize=1)
def _table() -> dict[tuple[int, ...], dict[float, ExpertsConfig]]:
    """Measured configurations by shape, then by tokens per expert."""
    text = resources.files(__package__).joinpath("expert_configs.json").read_text(encoding="utf-8")
    table: dict[tuple[int, ...], dict[float, ExpertsConfig]] = {}
    for entry in json.loads(text):
        config = ExpertsConfig.from_json(entry["config"])
        table.setdefault(tuple(entry["key"]), {})[entry["tokens_per_expert"]] = config
    return table
