"""Before a long job: measures the machine, where the plan would otherwise go by a datasheet or by other models."""

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

_WORTH = 20 * 60.0  # seconds of a job for which a minute of measuring is little


def measured_first(config: EngineConfig, planned: Callable[[EngineConfig], Plan | None]) -> Plan | None:
    """A job's plan, made once more after measuring where nobody has measured that here and the job is long.

    Datasheets do not say how much slower the link is while the CPU attends, nor other models' kernels what this
    one's take. Of a short job only a note says so, and where measuring fails the plan stays.

    Args:
        config: of the engine.
        planned: makes the plan; what it raises is raised.
    """
    plan = planned(config)
    source = unmeasured_source(plan)
    if plan is None or source is None:
        return plan
    job_s = plan.prediction.job_s if plan.prediction else None
    if job_s is not None and job_s >= _WORTH:
        note(
            f"by {source} this job takes {format_duration(job_s)}; measuring first takes about a minute, once"
        )
        if status := _measure(config):
            note(f"measuring ended with exit status {status}")
        else:
            plan = planned(config)
    note_unmeasured(plan)
    return plan


def note_unmeasured(plan: Plan | None) -> None:
    """Say so if a plan's rates are not this machine's for this model."""
    if source := unmeasured_source(plan):
        note(
            f"the plan goes by {source}; `moe-lightning profile --model MODEL` measures this machine in a minute"
        )


def unmeasured_source(plan: Plan | None) -> str | None:
    """What a plan goes by if it is no profile of its model; None for one that was not searched for."""
    from moe_lightning.perf.rates import DatasheetRates, MeasuredRates
    from moe_lightning.perf.shape import shape_of

    if plan is None or plan.prediction is None:
        return None
    if isinstance(plan.rates, DatasheetRates):
        return "the GPU's datasheet"
    if isinstance(plan.rates, MeasuredRates) and not plan.rates.profile.has(shape_of(plan.spec, "")):
        return "a profile of other models"
    return None


def _measure(config: EngineConfig) -> int:
    """Exit status of `profile`: in a process of its own, which gives back all memory that it takes.

    Its lines come through a pipe. So it draws no bar that somebody would have to take down, and if this process is
    killed, it ends at its next line.
    """
    # -P: no module from where the user works instead of Python's own.
    command = [sys.executable, "-P", "-m", "moe_lightning", "profile", "--model", config.model]
    if config.gpu_memory is not None:
        command += ["--gpu-memory", str(config.gpu_memory)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode
