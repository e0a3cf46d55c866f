"""Timelines in the trace event format that Chrome and Perfetto open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.pipeline.task import Lane, TaskKind
from moe_lightning.pipeline.timeline import Record, Timeline

_US = 1e6  # the format counts microseconds


def to_chrome(timeline: Timeline, extra: Mapping[str, object] | None = None) -> dict[str, Any]:
    """A trace with one row per lane, ready for `json.dump`; `extra` is kept with it as facts about the run.

    Source: "Trace Event Format", the JSON object form with complete ("X") and metadata ("M") events.
    """
    events = [_metadata("process_name", 0, name=timeline.name)]
    for tid, lane in enumerate(Lane):
        events.append(_metadata("thread_name", tid, name=lane.upper()))
        events.append(_metadata("thread_sort_index", tid, sort_index=tid))
    events += [_complete(record) for record in timeline.records]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {**(extra or {}), "name": timeline.name},
    }


def _metadata(name: str, tid: int, /, **args: object) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 0, "tid": tid, "args": args}


def _complete(record: Record) -> dict[str, Any]:
    return {
        "name": record.task_name,
        "cat": str(record.kind),
        "ph": "X",
        "pid": 0,
        "tid": list(Lane).index(record.lane),
        "ts": record.start * _US,
        "dur": record.seconds * _US,
        "args": {
            "kind": str(record.kind),
            "lane": str(record.lane),
            "layer": record.layer,
            "micro_batches": list(record.micro_batches),
            "us": round(record.seconds * _US, 3),
        },
    }


def from_chrome(trace: Mapping[str, Any]) -> Timeline:
    """The timeline that `to_chrome` wrote; events of other programs in the same trace are left out.

    Raises:
        ConfigError: it is no such trace.
    """
    try:
        records = tuple(
            _record(event)
            for event in trace["traceEvents"]
            if event.get("ph") == "X" and {"kind", "lane"} <= event.get("args", {}).keys()
        )
        return Timeline(str(trace["otherData"]["name"]), records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"this is not a trace of a pass ({type(error).__name__}: {error}); "
            "give a file that `moe-lightning trace` or `run-batch --trace` wrote"
        ) from error


def _record(event: Mapping[str, Any]) -> Record:
    args = event["args"]
    return Record(
        task_name=str(event["name"]),
        kind=TaskKind(args["kind"]),
        lane=Lane(args["lane"]),
        layer=int(args["layer"]),
        micro_batches=tuple(int(j) for j in args["micro_batches"]),
        start=event["ts"] / _US,
        end=(event["ts"] + event["dur"]) / _US,
    )
