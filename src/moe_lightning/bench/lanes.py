"""What the lanes did in recorded passes, beside what was predicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_lightning.engine.worker import RecordedPass
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.perf.cost import DTYPE_BYTES
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates, Rates
from moe_lightning.pipeline.task import Lane, TaskKind


@dataclass(frozen=True)
class LaneUse:
    """One lane in a pass, on average over those recorded.

    Attributes:
        seconds: that it works.
        share: of the time from the first task to the last.
        predicted_s: seconds that the plan says it works; None without a prediction.
        roof_s: seconds that its tasks take at the machine's peaks: of the GPU's arithmetic and memory, of host
            memory, of the link. None where these are not known.
    """

    seconds: float
    share: float
    predicted_s: float | None
    roof_s: float | None = None


@dataclass(frozen=True)
class Lanes:
    """All lanes in the passes that were recorded.

    Attributes:
        num_passes: that count.
        span_s: seconds of such a pass, from its first task to its last.
        use: of each lane, by name.
        seconds_by_kind: of tasks, in a pass.
        page_bytes_per_s: at which pages are copied; None where none are.
        link_bytes_per_s: at which pages and what the CPU attended to come to the GPU, while either does; None
            without pages, and where K and V come too.
        attention_bytes_per_s: at which the CPU reads KV; None where it does not.
    """

    num_passes: int
    span_s: float
    use: dict[str, LaneUse]
    seconds_by_kind: dict[str, float]
    page_bytes_per_s: float | None
    link_bytes_per_s: float | None
    attention_bytes_per_s: float | None


def summarize(
    recorded: Sequence[RecordedPass],
    page_bytes: int,
    predicted: Mapping[str, float] | None = None,
    hardware: HardwareSpec | None = None,
) -> Lanes | None:
    """The average of some passes; None without any.

    Args:
        recorded: the passes.
        page_bytes: of one page.
        predicted: seconds of each lane.
        hardware: the machine's peaks.
    """
    n = len(recorded)
    if not n:
        return None
    timelines, kv_bytes = [one.timeline() for one in recorded], sum(_kv_bytes(one.facts) for one in recorded)
    kinds, lanes = defaultdict[str, float](float), defaultdict[str, float](float)
    roofs = _at_peaks([one.facts for one in recorded], hardware) if hardware else {}
    num_pages, span, coming_s = 0, sum(timeline.span for timeline in timelines), 0.0
    for timeline in timelines:
        coming_s += sum(end - start for start, end in timeline.busy(Lane.H2D, Lane.BACK))
        for lane, seconds in timeline.busy_seconds().items():
            lanes[lane.value] += seconds
        for record in timeline.records:
            kinds[record.kind.value] += record.seconds
            num_pages += record.kind is TaskKind.LOAD_PAGE
    pages_s, attention_s = (kinds.get(kind.value, 0.0) for kind in (TaskKind.LOAD_PAGE, TaskKind.ATTENTION))
    came = num_pages * page_bytes
    if TaskKind.LOAD_HIDDEN.value in kinds:
        came += sum(_attended_bytes(one.facts) for one in recorded)
    has_rate = pages_s and TaskKind.LOAD_KV.value not in kinds
    return Lanes(
        num_passes=n,
        span_s=span / n,
        use={
            name: LaneUse(
                seconds / n,
                seconds / span if span else 0.0,
                predicted.get(name) if predicted else None,
                roofs[name] / n if roofs else None,
            )
            for name, seconds in lanes.items()
        },
        seconds_by_kind={kind: seconds / n for kind, seconds in kinds.items()},
        page_bytes_per_s=num_pages * page_bytes / pages_s if pages_s else None,
        link_bytes_per_s=came / coming_s if has_rate else None,
        attention_bytes_per_s=kv_bytes / attention_s if attention_s else None,
    )


def peaks_of(rates: Rates | None) -> HardwareSpec | None:
    """The peaks of the machine that rates are of, where they say them."""
    return rates.hardware if isinstance(rates, DatasheetRates | MeasuredRates) else None


def _at_peaks(passes: Sequence[PassFacts], hardware: HardwareSpec) -> dict[str, float]:
    """Seconds of each lane in all passes at a machine's peaks, launches left out."""
    seconds, peaks = defaultdict[str, float](float), replace(hardware, launch_s=0.0)
    for facts in passes:
        for lane, busy in facts.predict(peaks).busy_seconds().items():
            seconds[lane.value] += busy
    return seconds


def _attended_bytes(facts: PassFacts) -> int:
    """That attention on the CPU gives back in a pass, over all layers."""
    work = facts.work
    return facts.num_decode * work.spec.num_layers * work.spec.attention.q_size * DTYPE_BYTES[work.dtype]


def _kv_bytes(facts: PassFacts) -> int:
    """That the decode sequences of a pass attend to, over all layers."""
    work = facts.work
    tokens = sum(work.context_tokens[facts.shape.num_prefill :])
    return tokens * work.spec.kv_bytes_per_token(DTYPE_BYTES[work.dtype])
