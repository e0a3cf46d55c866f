"""Rotary embedding as the configs of transformers 4 and 5 describe it."""

from __future__ import annotations

from moe_lightning.errors import UnsupportedModelError
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.spec import RopeScaling, RopeSpec


def rope(config: HFConfig, default_theta: float) -> RopeSpec:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    `default_theta` is the family's, for files of transformers 4 that say nothing; 5 always writes it.

    Raises:
        UnsupportedModelError: another scaling than none, linear or llama3, or one that lacks a value.
    """
    config.require("rope_interleaved", False)
    config.require("partial_rotary_factor", 1.0)
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new and old and new.values != old.values:
        raise UnsupportedModelError(
            f"{config.source}: rope_parameters={new.values} and rope_scaling={old.values} differ; "
            "remove the one that is not meant"
        )
    theta = config.number("rope_theta", default_theta)
    if new:
        theta = new.number("rope_theta", theta) if config.has("rope_theta") else new.number("rope_theta")
        return _scaled(new, theta)
    return _scaled(old, old.number("rope_theta", theta)) if old else RopeSpec(theta)


def _scaled(section: HFConfig, theta: float) -> RopeSpec:
    section.require("rope_interleaved", False)
    section.require("partial_rotary_factor", 1.0)
    kind = section.text("rope_type", section.text("type", "default"))  # the oldest files say `type`
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, RopeScaling.LINEAR, section.number("factor"))
    if kind == "llama3":
        return _llama3(section, theta)
    raise UnsupportedModelError(
        f"{section.source}: rope_type={kind!r} is not supported; default, linear and llama3 are. "
        "Use a checkpoint with one of them"
    )


def _llama3(section: HFConfig, theta: float) -> RopeSpec:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise UnsupportedModelError(
            f"{section.source}: high_freq_factor={high:g} is not above low_freq_factor={low:g}; "
            "take the config.json that came with the weights"
        )
    # Required: max_position_embeddings, which could stand in for it, is the stretched length in these models.
    original = section.integer("original_max_position_embeddings")
    return RopeSpec(theta, RopeScaling.LLAMA3, section.number("factor"), low, high, original)
