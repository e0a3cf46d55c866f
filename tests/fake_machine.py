"""A machine whose tasks take what rates say, on a clock of its own, whatever they take in truth."""

from __future__ import annotations

from collections.abc import Callable

from moe_lightning import LLM
from moe_lightning.engine.background import at_once
from moe_lightning.engine.facts import pass_work
from moe_lightning.engine.plan import Plan
from moe_lightning.engine.watch import Begin
from moe_lightning.hardware.presets import preset
from moe_lightning.perf.rates import DatasheetRates, Rates
from moe_lightning.perf.refit import Refitted
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.simulate import simulate
from moe_lightning.pipeline.task import Schedule, TaskKind
from moe_lightning.pipeline.timeline import Timeline
from moe_lightning.runtime.executor import Runner, SerialExecutor
from moe_lightning.runtime.micro_batch import Step
from moe_lightning.runtime.runner import MicroBatchOutput

# A tiny model's tasks take microseconds, and what the host does between passes would be all that a pass takes.
RATES = Refitted(DatasheetRates(preset("l4")), dict.fromkeys(TaskKind, 1000.0))


def slower(factors: dict[TaskKind, float] | None) -> Rates | None:
    """The rates with kinds of tasks that take so many times as long; None for no change."""
    return None if factors is None else Refitted(RATES, factors)


class FakeMachine(SerialExecutor):
    """Runs an engine's passes truly and one task after the other, and times them as if lanes ran at once.

    Attributes:
        now: seconds.
        num_passes: so far.
    """

    def __init__(self, llm: LLM, change: Callable[[int], Rates | None] = lambda _: None) -> None:
        """`change` gives new rates for a pass by its number, from 1 on, and those after it; None for no change."""
        super().__init__()
        self.now, self.num_passes = 0.0, 0
        self._llm, self._change, self._rates = llm, change, RATES
        self._step = Step()
        worker, run = llm._worker, llm._worker.run

        def remember(step: Step) -> list[MicroBatchOutput]:
            self._step = step
            return run(step)

        worker.run = remember  # type: ignore[method-assign]
        worker._executor = self
        llm.engine.clock = lambda: self.now

    def keep_to_plan(self, workload: Workload, begin: Begin = at_once) -> None:
        """As for a plan that was searched for by the rates."""
        llm = self._llm
        llm.keep_to(
            Plan(llm.spec, llm._device, llm.dtype, llm.policy, llm.max_model_len, None, RATES, workload),
            begin,
        )

    def run(self, schedule: Schedule, runner: Runner, *, record: bool = True) -> Callable[[], Timeline]:
        """Run the schedule; its timeline is what the rates say."""
        self.num_passes += 1
        self._rates = self._change(self.num_passes) or self._rates
        super().run(schedule, runner)
        llm = self._llm
        work = pass_work(llm.spec, "float32", llm.policy, self._step, schedule.shape.num_parts)
        timeline = simulate(schedule, self._rates.seconds(work))
        self.now += timeline.until_tokens
        return lambda: timeline
