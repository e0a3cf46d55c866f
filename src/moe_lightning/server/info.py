"""What the server says of itself: plan, load, lanes, throughput over time."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from moe_lightning import __version__
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.perf.outlook import Prediction
from moe_lightning.pipeline.shape import layers_on_cpu
from moe_lightning.server.engine_thread import EngineThread
from moe_lightning.server.service import Service
from moe_lightning.server.watch import LANES

_LANES_EVERY_S = 5.0  # working out how lanes overlapped takes a part of a pass


class Info:
    """What operators and the page want to know.

    Args:
        service: what is served.
        engine: its thread.
        prediction: what the plan should reach, where one was searched for.
    """

    def __init__(self, service: Service, engine: EngineThread, prediction: Prediction | None = None) -> None:
        self.service, self.engine, self.prediction = service, engine, prediction
        self._asked_lanes_at = -_LANES_EVERY_S
        self.pass_bytes = _bytes_per_pass(service)

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self.engine.broken is None and not self.service.desk.is_closing

    def lanes(self) -> dict[str, float]:
        """The share of the fullest pass that each lane worked, as of some seconds ago; empty before the first."""
        if time.monotonic() - self._asked_lanes_at >= _LANES_EVERY_S:
            self._asked_lanes_at = time.monotonic()
            self.engine.call(self.service.watch.update_lanes)
        return {name: share for name, share in self.service.watch.lanes.items() if name in LANES}

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON; names of SGLang's /get_server_info where it has them."""
        llm, watch, desk = self.service.llm, self.service.watch, self.service.desk
        config = asdict(llm.config)
        return {
            "model_path": config.pop("model"),
            "tokenizer_path": config.pop("tokenizer"),
            "served_model_name": self.service.names[0],
            **config,
            "dtype": str(llm.dtype).removeprefix("torch."),
            "max_model_len": llm.max_model_len,
            "version": __version__,
            "status": "ready" if self.is_ready else "broken" if self.engine.broken else "closing",
            "plan": asdict(llm.policy),
            "prediction": asdict(self.prediction) if self.prediction else None,
            "internal_states": [{"last_gen_throughput": watch.tokens_per_second()}],
            "load": asdict(watch.load) | {"kv_usage": watch.load.kv_usage, "interactive": desk.num_interactive,
                                          "background": desk.num_background},
            "lanes": self.lanes(),
            "page_bytes_per_pass": self.pass_bytes,
            "uptime": watch.seconds,
            "history": [[p.seconds, p.prompt_tokens, p.generated_tokens] for p in list(watch.points)],
        }  # fmt: skip


def _bytes_per_pass(service: Service) -> int:
    """Bytes of weights that each pass copies to the GPU."""
    llm, policy = service.llm, service.llm.policy
    layout = PageLayout.of(llm.spec, policy.pages_per_expert, packed=policy.packed)
    placement = Placement(
        layout.pages_per_layer, policy.resident_pages, policy.num_frames, layers_on_cpu(policy)
    )
    return sum(placement.streamed) * layout.page_bytes(llm.dtype.itemsize)
