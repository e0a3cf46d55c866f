"""Measurements for Prometheus; vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moe_lightning.server.batches import BatchService
from moe_lightning.server.info import Info
from moe_lightning.server.watch import PREFIX


class EngineCollector(Collector):
    """What the engine counts itself, read when somebody asks."""

    def __init__(self, info: Info) -> None:
        self._info = info

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is now."""
        watch, desk = self._info.service.watch, self._info.service.desk
        load = watch.load
        yield self._gauge("num_requests_running", "Answers that have KV in memory", load.running)
        yield self._gauge("num_requests_waiting", "Answers that wait for memory or a place", load.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV memory that is taken, 0 to 1", load.kv_usage)
        yield self._counter("num_preemptions", "Times an answer gave its memory back", load.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens computed", load.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", load.generated_tokens)
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Answers given", labels=["model_name", "finished_reason"]
        )
        for reason, count in dict(watch.finished).items():
            finished.add_metric([self._name, reason], count)
        yield finished
        yield self._counter("request_aborted", "Requests whose client went, or that failed", watch.aborted)
        yield self._counter("passes", "Passes over the layers", load.passes)
        yield self._counter("pass_seconds", "Seconds in passes", load.busy_seconds)
        yield self._counter(
            "page_bytes", "Bytes of weights copied to the GPU", load.passes * self._info.pass_bytes
        )
        yield self._lanes()
        yield self._gauge("tokens_per_second", "Generated in the last minute", watch.tokens_per_second())
        if prediction := self._info.prediction:
            text = "What the plan should reach while KV memory is full"
            yield self._gauge("predicted_tokens_per_second", text, prediction.tokens_per_s)
            yield self._gauge("predicted_pass_seconds", "Of a pass, by the plan", prediction.pass_s)
        yield self._gauge("last_pass_seconds", "Of the last pass", load.pass_seconds)
        yield self._gauge("interactive_requests", "Answers in work for clients", desk.num_interactive)
        yield self._gauge("background_requests", "Answers in work for batches", desk.num_background)

    @property
    def _name(self) -> str:
        return self._info.service.names[0]

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        return _gauge(self._name, name, text, value)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._name], value)
        return family

    def _lanes(self) -> Metric:
        text = "Share of the fullest pass that a lane works, 0 to 1"
        family = GaugeMetricFamily(PREFIX + "lane_utilization", text, labels=["model_name", "lane"])
        for lane, share in self._info.lanes().items():
            family.add_metric([self._name, lane], share)
        return family


class BatchCollector(Collector):
    """What the batch service has at work, read when somebody asks."""

    def __init__(self, model: str, batches: BatchService) -> None:
        self._model, self._batches = model, batches

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is now."""
        load = self._batches.load()
        for name, text, value in (
            ("open_batches", "Batches that have not ended", load.open_batches),
            ("waiting_batches", "Open batches that wait for room on the disk", load.waiting_batches),
            ("batch_requests_in_flight", "Lines of batches that are being answered", load.requests_in_flight),
            ("batch_requests_completed", "Lines of open batches that are answered", load.completed_requests),
            ("batch_requests_failed", "Lines of open batches that are refused", load.failed_requests),
        ):
            yield _gauge(self._model, name, text, value)


def _gauge(model: str, name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
    family.add_metric([model], value)
    return family
