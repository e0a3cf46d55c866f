"""The README's table: Mixtral-8x7B on a small part of an H100 by the length of answers, with limit and peers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from accuracy_tables import card_of
from model_on_record import hashable

from moe_lightning.bench.models import spec_of
from moe_lightning.bench.report import RATE_TOLERANCE
from moe_lightning.perf.limit import HardwareLimit, hardware_limit
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB

Values = dict[str, Any]
_MODEL, _CARD, _GPUS, _LENGTHS = "mixtral-8x7b", "H100", (24, 16), (32, 64, 128, 256)
_KINDS = {"steady state": "KV memory full", "job": "a whole job"}
# Whoever has others measures something else.
_SETTINGS = {"max_num_seqs": None, "policy": None, "quantization": None, "packing": "auto"}


class _Run(NamedTuple):
    """A run's tokens/s, what had been promised, and its shares of what link and memory allow there.

    The limits are for 16-bit weights and for packed ones; `job` is what was promised of a whole job.
    """

    rate: float
    promised: float | None
    of_plain: float
    of_packed: float
    job: float | None


def headline(results: Iterable[Values]) -> str:
    """Rows of tokens/s for each GPU memory and kind of measurement, a column for each length of answers."""
    results = list(results)
    cells = _cells(results)
    rows = [
        "| generated tokens/s | " + " | ".join(f"{n} tokens an answer" for n in _LENGTHS) + " |",
        "| --- " * (1 + len(_LENGTHS)) + "|",
    ]
    for gpu in _GPUS:
        for kind, name in _KINDS.items():
            runs = [cells.get((gpu, kind, length), []) for length in _LENGTHS]
            if any(runs):
                steady = [cells.get((gpu, "steady state", length), []) for length in _LENGTHS]
                rates = [
                    _rates(some) or _simulated(others) for some, others in zip(runs, steady, strict=True)
                ]
                rows += [
                    _row(f"**{gpu} GiB, {name}**", rates),
                    _row("of the limit, 16-bit weights; packed", map(_shares, runs)),
                    _row("within 10 % of the promise", map(_kept, runs)),
                ]
    engines = {values["engine"] for values in results if "engine" in values}
    for engine in sorted(engines):
        best = (_best_of_peer(results, engine, length) for length in _LENGTHS)
        rows.append(_row(f"{engine}, {_GPUS[0]} GiB, the best batch tried", best))
    return "\n".join(rows)


def _cells(results: Iterable[Values]) -> dict[tuple[int, str, int], list[_Run]]:
    """Runs of the planner's policy, of as many requests as fill memory."""
    cells: dict[tuple[int, str, int], list[_Run]] = {}
    for values in results:
        if not _is_plans(values):
            continue
        length = values["workload"]["gen_len"]
        for m in (*values.get("unsteady", ()), *values["measured"]):
            rate, promise = m["tokens_per_s"], values.get("prediction") or {}
            run = _Run(
                rate, m["predicted_tokens_per_s"], rate / hardware_limit_of(values, packed=False).tokens_per_s,
                rate / hardware_limit_of(values, packed=True).tokens_per_s, promise.get("job_tokens_per_s"),
            )  # fmt: skip
            cells.setdefault((round(values["gpu_memory"] / GIB), m["kind"], length), []).append(run)
    return cells


def _is_plans(values: Values) -> bool:
    if "measured" not in values or not values.get("limit_host_memory"):
        return False
    settings = values["settings"]
    return (
        settings["model"] == _MODEL
        and card_of(values) == _CARD
        and values["num_layers"] == spec_of(_MODEL).num_layers
        and all(settings.get(name, usual) == usual for name, usual in _SETTINGS.items())
        and "host" not in values.get("cell", "")
        and values.get("point", "plan").startswith("plan")
        and values["workload"]["num_requests"] is None
    )


def hardware_limit_of(values: Values, *, packed: bool) -> HardwareLimit:
    """What a run's link and memory allow if nothing else is a bound."""
    return hardware_limit(
        spec_of(values["settings"]["model"], values["num_layers"]), 2, values["gpu_memory"],
        values["limit_host_memory"], values["plain_copy_bytes_per_s"], Workload(**hashable(values["workload"])),
        packed=packed,
    )  # fmt: skip


def _row(name: str, texts: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(texts) + " |"


def _rates(runs: list[_Run]) -> str:
    rates = [run.rate for run in runs]
    if len(rates) < 2:
        return "".join(f"**{rate:,.0f}**" for rate in rates)
    return f"**{statistics.median(rates):,.0f}** ({min(rates):,.0f} to {max(rates):,.0f}, {len(rates)} runs)"


def _simulated(steady: list[_Run]) -> str:
    """What plans of measured steady states say of a job that nobody ran."""
    jobs = [run.job for run in steady if run.job]
    return f"simulated {statistics.median(jobs):,.0f}" if jobs else ""


def _shares(runs: list[_Run]) -> str:
    if not runs:
        return ""
    shares = (statistics.median(share) for share in ((r.of_plain for r in runs), (r.of_packed for r in runs)))
    return "; ".join(f"{share:.0%}" for share in shares)


def _kept(runs: list[_Run]) -> str:
    offs = [run.rate / run.promised - 1 for run in runs if run.promised]
    within = sum(abs(off) <= RATE_TOLERANCE for off in offs)
    return f"{within} of {len(offs)}, median {statistics.median(offs):+.0%}" if offs else ""


def _best_of_peer(results: Iterable[Values], engine: str, length: int) -> str:
    rates = [
        run["tokens_per_s"]
        for values in results
        if values.get("engine") == engine
        and card_of(values) == _CARD
        and values["workload"]["gen_len"] == length
        for run in values["runs"]
        if run.get("tokens_per_s")
    ]
    return f"{max(rates):,.0f}" if rates else ""
