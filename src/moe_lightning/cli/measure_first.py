"""Before a long job: measures the machine, where the plan would otherwise go by a datasheet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_lightning.cli.notes import note
from moe_lightning.units import format_duration

if TYPE_CHECKING:
    from moe_lightning.config import EngineConfig
    from moe_lightning.engine.plan import Plan

BY_DATASHEET = (
    "the plan goes by the GPU's datasheet; `moe-lightning profile` measures this machine in a minute"
)
_WORTH = 20 * 60.0  # seconds of a job for which a minute of measuring is little


def measured_first(config: EngineConfig, planned: Callable[[EngineConfig], Plan | None]) -> Plan | None:
    """A job's plan, made once more after measuring where nobody has measured this machine and the job is long.

    Datasheets do not say how much slower the link is while the CPU attends. Of a short job only a note says so, and
    where measuring fails the plan stays.

    Args:
        config: of the engine.
        planned: makes the plan.
    """
    from moe_lightning.perf.rates import DatasheetRates  # with torch

    plan = planned(config)
    if plan is None or plan.prediction is None or not isinstance(plan.rates, DatasheetRates):
        return plan
    job_s = plan.prediction.job_s
    if job_s is None or job_s < _WORTH:
        note(BY_DATASHEET)
        return plan
    note(
        f"by the GPU's datasheet this job takes {format_duration(job_s)}; measuring this machine first takes a "
        "minute, once"
    )
    status = _measure(config)
    if status:
        note(f"measuring ended with exit status {status}; the plan goes by the datasheet")
        return plan
    return planned(config)


def _measure(config: EngineConfig) -> int:
    """Exit status of `profile`: in a process of its own, which gives back all memory that it takes."""
    command = [sys.executable, "-m", "moe_lightning", "profile", "--model", config.model]
    if config.gpu_memory is not None:
        command += ["--gpu-memory", str(config.gpu_memory)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
