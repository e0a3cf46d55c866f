"""What a pass was: enough to predict it for any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.predict import predict_pass
from moe_lightning.perf.rates import Rates
from moe_lightning.pipeline.task import PassShape
from moe_lightning.pipeline.timeline import Timeline


@dataclass(frozen=True)
class PassFacts:
    """A pass that ran: the schedule's name, its shape, and what its tasks worked on."""

    schedule: str
    shape: PassShape
    work: PassWork

    @property
    def num_decode(self) -> int:
        """Sequences that decoded."""
        return sum(self.work.tokens[self.shape.num_prefill :])

    @property
    def num_prompt(self) -> int:
        """Tokens of prompts."""
        return sum(self.work.tokens[: self.shape.num_prefill])

    def predict(self, hardware: HardwareSpec | Rates) -> Timeline:
        """When each task of the pass would have run on a machine.

        Raises:
            ConfigError: the machine has no rate for the dtype.
        """
        return predict_pass(self.work, self.shape, hardware, self.schedule)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the model is not among them."""
        work = {name: value for name, value in vars(self.work).items() if name != "spec"}
        return {"schedule": self.schedule, "shape": asdict(self.shape), "work": work}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], spec: ModelSpec) -> PassFacts:
        """What `to_json` gave, of this model.

        Raises:
            ConfigError: the values are no such facts.
        """
        try:
            shape, work = (_with_tuples(values[part]) for part in ("shape", "work"))
            return cls(str(values["schedule"]), PassShape(**shape), PassWork(spec, **work))
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ConfigError(
                f"the trace does not say what its pass was ({type(error).__name__}: {error}); record it anew with "
                "`moe-lightning run-batch --trace`"
            ) from error


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
