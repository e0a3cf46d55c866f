"""From a plan to what runs it: where the GPU has less memory than was planned with, by the next smaller plan."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from moe_lightning.config import EngineConfig
from moe_lightning.engine.gpu_budget import context_bytes
from moe_lightning.engine.plan import Plan
from moe_lightning.errors import GPUMemoryError
from moe_lightning.units import format_bytes

_log = logging.getLogger(__name__)

_TRIES = 4
_LESS = 0.95  # of the memory that was planned with
_FREE = 0.9  # of what is free now

Built = TypeVar("Built")
Some = TypeVar("Some", Plan, Plan | None)


def built(
    config: EngineConfig, plan: Some, plan_for: Callable[[EngineConfig], Some], build: Callable[[Some], Built]
) -> tuple[Built, Some]:
    """What `build` makes of a plan, and the plan; where the GPU cannot hold that, of one for less memory.

    Other programs may take memory between planning and building. A plan that is None is nobody's to change.

    Args:
        config: what was planned with.
        plan: to begin with.
        plan_for: other settings.
        build: raises `GPUMemoryError` where the plan does not fit, and has let go of what it took then.

    Raises:
        GPUMemoryError: the last of some plans does not fit either.
        NoFeasiblePolicyError: no smaller one is possible.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            return build(plan), plan
        except GPUMemoryError as error:
            if plan is None or not tries_left or _is_without_limit(config, plan):
                raise
            reason = str(error)
        # Not before the error is gone: it holds what had been allocated.
        gc.collect()
        config = replace(config, gpu_memory=_less(config, plan.device))
        _log.warning("%s; planning again for %s of GPU memory", reason, format_bytes(config.gpu_memory or 0))
        plan = plan_for(config)
    raise AssertionError("the last try returns or raises")


def _is_without_limit(config: EngineConfig, plan: Plan) -> bool:
    """A CPU plays a GPU whose memory has no end: there is nothing to plan with less of."""
    return plan.device.type == "cpu" and config.gpu_memory is None


def _less(config: EngineConfig, device: torch.device) -> int:
    """Bytes of the whole process: less than before, and less than there is."""
    some = [] if config.gpu_memory is None else [_LESS * config.gpu_memory]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        some.append(_FREE * (torch.cuda.mem_get_info(device)[0] + context_bytes(device)))
    return int(min(some))
