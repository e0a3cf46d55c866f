"""Tables of what `plan_accuracy.py` measured: plans beside their predictions, and beside their neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from moe_lightning.bench.report import LANE_TOLERANCE, LIKE, RATE_TOLERANCE, STEADY, spread

IDLE = 0.05  # of a pass: of a lane that works less, seconds say little
Values = dict[str, Any]


def points_of(results: Iterable[Values]) -> list[Values]:
    """The results that are points of `plan_accuracy.py`."""
    return [values for values in results if "point" in values]


def memory_of(values: Values) -> str:
    """How much of which GPU's memory: "24 GiB, H100"; of results that do not say which, "24 GiB"."""
    return ", ".join(filter(None, (f"{(values['gpu_memory'] or 0) / 2**30:g} GiB", card_of(values))))


def card_of(values: Values) -> str:
    """The GPU that a result is from, such as H100 or GeForce RTX 4090; nothing where it does not say."""
    name: str = (values.get("hardware") or {}).get("gpu") or ""
    return re.sub(r" \d+GB.*", "", name.removeprefix("NVIDIA "))


def is_steady(found: Values) -> bool:
    """Whether nothing slowed down some passes of a steady state alone; of the oldest results nobody knows."""
    passes = found.get("passes")
    return not passes or spread(each["seconds"] for each in passes) <= STEADY


def is_like_profile(found: Values) -> bool:
    """Whether host memory was still about as fast as in the profile; of older results nobody knows."""
    share = found.get("like_profile")
    return share is None or share >= LIKE


def accuracy(results: Iterable[Values]) -> str:
    """A row for each plan: tokens/s and seconds of each lane, measured and how far that is from predicted.

    And one for each time that it was measured while the machine was not steady, or not the one of the profile.
    """
    rows = [
        "| model | GPU memory | answers | commit | passes, s | predicted tokens/s | measured | off "
        "| H2D s | GPU s | CPU s | D2H s | BACK s |",
        "| --- " * 13 + "|",
    ]
    for values in points_of(results):
        if values["point"] != "plan":
            continue
        commit = values.get("commit", "")[:7]
        for found in (*values.get("unsteady", ()), values["measured"][0]):
            lanes = " | ".join(_lane(found["lanes"], name) for name in ("h2d", "gpu", "cpu", "d2h", "back"))
            rate, predicted = found["tokens_per_s"], found["predicted_tokens_per_s"]
            rows.append(
                f"| {values['name']} | {memory_of(values)} | {values['workload']['gen_len']} "
                f"| {commit} | {_passes(found)} | {predicted:,.0f} | {rate:,.0f} "
                f"| {_off(rate, predicted, RATE_TOLERANCE)} | {lanes} |"
            )
    return "\n".join(rows)


def _passes(found: Values) -> str:
    seconds = [each["seconds"] for each in found.get("passes", ())]
    if not seconds:
        return ""
    slower = "" if is_like_profile(found) else f", memory {found['like_profile']:.0%} of the profile's"
    return f"{min(seconds):.2f} to {max(seconds):.2f}{'' if is_steady(found) else ', not steady'}{slower}"


def beside(results: Iterable[Values]) -> str:
    """For each cell that has neighbours, a row for each of its policies, the fastest first."""
    rows = [
        "| model, GPU memory, answers | policy | sequences | predicted tokens/s | measured | off | to the plan "
        "| commit |",
        "| --- " * 8 + "|",
    ]
    for name, others in _cells(results):
        for gain, values in others:
            found = values["measured"][0]
            rate, predicted = found["tokens_per_s"], found["predicted_tokens_per_s"]
            unsteady = "" if is_steady(found) else ", not steady"
            rows.append(
                f"| {name} | {values['point']} | {sequences(values):,} | {predicted:,.0f} | {rate:,.0f} "
                f"| {_off(rate, predicted, RATE_TOLERANCE)} | {gain:+.1%}{unsteady} "
                f"| {values.get('commit', '')[:7]} |"
            )
    return "\n".join(rows)


def sequences(values: Values) -> int:
    """That decode while KV memory is full; in older results as many as may run."""
    return int(values["measured"][0].get("num_seqs", values["policy"]["max_num_seqs"]))


def verdicts(results: Iterable[Values], tolerance: float) -> tuple[list[str], bool]:
    """What the points say in a line each; and whether all is as it should be."""
    results = list(results)
    if not points_of(results):
        return ["nothing has been measured"], False
    lines, is_good = [], True
    for values in points_of(results):
        if values["point"] == "plan":
            bad = list(_wrong(values["measured"][0]))
            is_good = is_good and not bad
            lines.append(f"{_title(values)}: {'; '.join(bad) or 'as predicted'}")
    for name, others in _cells(results):
        gain, fastest = next(entry for entry in others if not _is_plan(entry[1]))
        is_good = is_good and gain <= tolerance
        count = sum(not _is_plan(values) for _, values in others)
        lines.append(
            f"{name}: {count} neighbour{'s' if count != 1 else ''}, the fastest is {fastest['point']}, "
            f"{gain:+.1%} to the plan"
            f"{'' if gain <= tolerance else f', more than {tolerance:.0%}'}"
        )
    return lines, is_good


def _wrong(found: Values) -> Iterator[str]:
    if not is_steady(found):
        yield f"not steady, passes of {_passes(found).split(',')[0]} s"
    if not is_like_profile(found):
        yield f"host memory {found['like_profile']:.0%} of the profile's"
    rate = _off(found["tokens_per_s"], found["predicted_tokens_per_s"], RATE_TOLERANCE)
    if rate.endswith("*"):
        yield f"tokens/s {rate}"
    for name, use in (found["lanes"] or {"use": {}})["use"].items():
        if use["share"] > IDLE and (off := _off(use["seconds"], use["predicted_s"], LANE_TOLERANCE)).endswith(
            "*"
        ):
            yield f"{name} {off}"


def _cells(results: Iterable[Values]) -> Iterator[tuple[str, list[tuple[float, Values]]]]:
    """Name and points of a cell with neighbours, with what each gains over the plan, the most first.

    Those of one commit and profile: others were measured on other machines.
    """
    cells: dict[tuple[str, ...], list[Values]] = {}
    for values in points_of(results):
        profile = (values.get("profile") or {}).get("created", "")
        cells.setdefault((_title(values), values.get("commit", ""), profile), []).append(values)
    for (name, *_), of in cells.items():
        plans = [values for values in of if _is_plan(values)]
        if plans and len(of) > len(plans):
            gains = ((_rate(values) / _beside(values, plans) - 1, values) for values in of)
            yield name, sorted(gains, key=lambda entry: entry[0], reverse=True)


def _is_plan(values: Values) -> bool:
    return str(values["point"]).startswith("plan")


def _beside(values: Values, plans: list[Values]) -> float:
    """Tokens/s of the plan as it was measured just before and just after; of all such in older results."""
    when = values.get("began_s")
    if when is None or _is_plan(values):
        near = plans
    else:
        ordered = sorted(plans, key=lambda plan: plan["began_s"])
        near = [plan for plan in ordered if plan["began_s"] < when][-1:]
        near += [plan for plan in ordered if plan["began_s"] > when][:1]
    return sum(_rate(plan) for plan in near) / len(near)


def _title(values: Values) -> str:
    more = "".join(
        f", {what} {values['settings'][key]}"
        for key, what in (("max_num_seqs", "sequences"),)
        if values["settings"][key]
    )
    return f"{values['name']}, {memory_of(values)}, {values['workload']['gen_len']}{more}"


def _rate(values: Values) -> float:
    return float(values["measured"][0]["tokens_per_s"])


def _lane(lanes: Values | None, name: str) -> str:
    use = lanes["use"].get(name) if lanes else None
    if not use:
        return ""
    if not use["predicted_s"] or use["share"] <= IDLE:
        return f"{use['seconds']:.3f}"
    return f"{use['seconds']:.3f} ({_off(use['seconds'], use['predicted_s'], LANE_TOLERANCE)})"


def _off(found: float, predicted: float, tolerance: float) -> str:
    """How far measured is from predicted, with a star where that is too far."""
    off = found / predicted - 1 if predicted else float("inf")
    return f"{off:+.1%}{'*' if abs(off) > tolerance else ''}"
