"""A measured cell as JSON, and as a table for people."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from moe_lightning.bench.cell import Cell, Measured
from moe_lightning.bench.machine import facts
from moe_lightning.config import EngineConfig
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.units import GIB
from moe_lightning.verify import Verification

RATE_TOLERANCE, LANE_TOLERANCE = 0.10, 0.15  # how far a prediction may be off
# The longest pass of a steady state over the shortest, at most, where nothing else slows the machine down: of 166
# recorded ones below it 151 are within 10 % of what is predicted from the profile minutes before, of 22 above it 6.
STEADY = 1.25
LIKE = 0.9  # of the profile's rate of plain reads, at least, where a machine is still the one that was planned for
_STOLEN = 0.005  # of all processors' time: a few ticks a second say nothing


def to_json(cell: Cell, config: EngineConfig) -> dict[str, Any]:
    """Everything but the timelines, with the machine."""
    prediction = cell.plan.prediction
    return facts() | {
        "settings": asdict(config), "num_layers": cell.plan.spec.num_layers, "workload": asdict(cell.workload),
        "gpu_memory": cell.gpu_memory, "policy": asdict(cell.plan.policy),
        "prediction": asdict(prediction) if prediction else None, "profile": _profile(cell),
        "measured": [_measured(cell, m) for m in cell.measured], "agreement": cell.agreement,
        "limit": asdict(cell.limit) if cell.limit else None, "limit_host_memory": cell.limit_host_memory,
        "plain_copy_bytes_per_s": cell.plain_copy, "plain_read_bytes_per_s": cell.plain_read,
        "ready_s": cell.ready_s,
        "memory": asdict(cell.peaks)
        | {"is_gpu_within": cell.peaks.is_gpu_within, "is_host_within": cell.peaks.is_host_within},
    }  # fmt: skip


def _profile(cell: Cell) -> dict[str, Any] | None:
    """What the plan went by; None where that is a datasheet."""
    rates = cell.plan.rates
    return rates.profile.to_json() if isinstance(rates, MeasuredRates) else None


def _measured(cell: Cell, m: Measured) -> dict[str, Any]:
    lanes = m.lanes
    return {
        "kind": m.kind, "num_seqs": m.num_seqs, "tokens_per_s": m.tokens_per_s,
        "predicted_tokens_per_s": m.predicted_tokens_per_s,
        "share_of_limit": m.tokens_per_s / cell.limit.tokens_per_s if cell.limit else None,
        "lanes": asdict(lanes) if lanes else None, "share_of_plain_copy": page_share(cell, m),
        "link_share_of_plain_copy": link_share(cell, m), "like_profile": cell.like_profile,
        "num_preemptions": m.num_preemptions, "first_pass_s": m.first_pass_s,
        "check": _check(m.check) if m.check else None, "passes": [asdict(p) for p in m.passes],
    }  # fmt: skip


def _check(found: Verification) -> dict[str, Any]:
    total = found.all
    return {
        "is_equal": found.is_equal, "num_answers": len(found.checks), "num_tokens": total.num_tokens,
        "num_wrong": total.num_wrong, "num_rounded_wrong": total.num_rounded_wrong,
        "wrong_by_answer": [[one.num_tokens, one.num_wrong, one.num_rounded_wrong] for one in found.checks],
        "num_not_finite": total.num_not_finite,
        "median_difference": total.median_difference, "max_difference": total.max_difference,
        "max_median": found.max_median, "max_wrong": found.max_wrong,
    }  # fmt: skip


def spread(passes: Iterable[float]) -> float:
    """The longest of a steady state's passes over the shortest, by their seconds: seldom more than `STEADY`."""
    seconds = list(passes)
    return max(seconds) / min(seconds)


def page_share(cell: Cell, m: Measured) -> float | None:
    """The rate of pages over that of plain copies in the same run."""
    rate = m.lanes.page_bytes_per_s if m.lanes else None
    return rate / cell.plain_copy if rate else None


def link_share(cell: Cell, m: Measured) -> float | None:
    """The rate of all that comes to the GPU over that of plain copies in the same run."""
    rate = m.lanes.link_bytes_per_s if m.lanes else None
    return rate / cell.plain_copy if rate else None


def to_text(cell: Cell) -> str:
    """A page for people."""
    lines = [line for m in cell.measured for line in (*_lines(cell, m), "")]
    if cell.agreement is not None:
        lines.append(
            f"the job while full memory changes hands once, over the steady state: {cell.agreement:.1%}"
        )
    peaks = cell.peaks
    if peaks.gpu is not None:
        allowed = f" of {peaks.gpu_allowed / GIB:.2f} allowed" if peaks.gpu_allowed else ""
        lines.append(f"GPU memory {peaks.gpu / GIB:.2f} GiB{allowed}{_flag(peaks.is_gpu_within)}")
    came = peaks.host - peaks.host_before
    lines.append(
        f"host memory {came / GIB:.2f} GiB of {peaks.host_planned / GIB:.2f} planned{_flag(peaks.is_host_within)}, "
        f"beside {peaks.host_before / GIB:.2f} before"
    )
    lines.append(
        f"weights in place after {cell.ready_s:.0f} s, the first pass {cell.measured[0].first_pass_s:.0f} s after "
        f"the start; plain copies {cell.plain_copy / 1e9:.1f} GB/s{_reads(cell)}"
    )
    return "\n".join(lines)


def _reads(cell: Cell) -> str:
    if cell.plain_read is None:
        return ""
    share = cell.like_profile
    beside = "" if share is None else f", {share:.0%} of the profile's{'' if share >= LIKE else ', SLOWER'}"
    return f", plain reads {cell.plain_read / 1e9:.1f}{beside}"


def _lines(cell: Cell, m: Measured) -> Iterator[str]:
    share = f", {m.tokens_per_s / cell.limit.tokens_per_s:.1%} of the hardware limit" if cell.limit else ""
    yield f"{m.kind}: {m.tokens_per_s:.0f} tokens/s{share}"
    yield (
        f"  {len(m.passes)} passes, median {statistics.median(p.seconds for p in m.passes):.3f} s, "
        f"{statistics.mean(p.num_running for p in m.passes):.0f} sequences on average, "
        f"{sum(p.prompt_tokens for p in m.passes)} prompt tokens, {m.num_preemptions} preemptions"
    )
    if m.predicted_tokens_per_s is not None:
        yield f"  predicted {m.predicted_tokens_per_s:.0f} tokens/s{_off(m.tokens_per_s, m.predicted_tokens_per_s)}"
    seconds = [p.seconds for p in m.passes]
    if m.kind == "steady state" and spread(seconds) > STEADY:
        yield (
            f"  its passes took {min(seconds):.2f} to {max(seconds):.2f} s: something else slows this machine down "
            "at times; measure again"
        )
    stolen = sum(p.stolen for p in m.passes) / sum(seconds) / (os.cpu_count() or 1)
    if stolen > _STOLEN:
        yield f"  the host of this virtual machine gave {stolen:.1%} of its CPU time to others"
    if m.check:
        c = _check(m.check)
        yield (
            f"  checked {c['num_answers']} answers: {'equal' if c['is_equal'] else 'NOT EQUAL'}; "
            f"{c['num_wrong']} of {c['num_tokens']} tokens wrong ({c['max_wrong']} may be, plain PyTorch has "
            f"{c['num_rounded_wrong']}), median difference {c['median_difference']:.1e} "
            f"({c['max_median']:.1e} may be)"
        )
    if m.lanes:
        yield from _lane_lines(cell, m)


def _lane_lines(cell: Cell, m: Measured) -> Iterator[str]:
    lanes = m.lanes
    assert lanes is not None
    yield (
        f"  lane   busy  of its roof  seconds  predicted, in {lanes.num_passes} recorded passes of "
        f"{lanes.span_s:.3f} s"
    )
    for lane, use in lanes.use.items():
        roof = f"{use.roof_s / use.seconds:.0%}" if use.roof_s is not None and use.seconds else ""
        predicted = "" if use.predicted_s is None else f"{use.predicted_s:9.3f}"
        if use.predicted_s is not None and use.share > 0.05:  # of hardly any time, a share says little
            predicted += _off(use.seconds, use.predicted_s, LANE_TOLERANCE)
        yield f"  {lane.upper():<5} {use.share:5.0%} {roof:>12} {use.seconds:8.3f} {predicted}"
    found, all_found = page_share(cell, m), link_share(cell, m)
    if found and lanes.page_bytes_per_s:
        line = f"  pages {lanes.page_bytes_per_s / 1e9:.1f} GB/s, {found:.1%} of plain copies"
        yield line + (f"; with what comes back from attention {all_found:.1%}" if all_found else "")
    if lanes.attention_bytes_per_s:
        yield f"  attention reads {lanes.attention_bytes_per_s / 1e9:.1f} GB/s"
    kinds = sorted(lanes.seconds_by_kind.items(), key=lambda item: -item[1])
    yield "  seconds: " + ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in kinds if seconds > 5e-4)


def _off(found: float, predicted: float, tolerance: float = RATE_TOLERANCE) -> str:
    """How far measured is from predicted, and a word where that is too far."""
    off = found / predicted - 1 if predicted else float("inf")
    return f" ({off:+.0%}{', OFF' if abs(off) > tolerance else ''})"


def _flag(is_within: bool) -> str:
    return "" if is_within else " OVER"
