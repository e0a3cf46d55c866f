"""What the planner tries of each choice, and where it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from moe_lightning.perf.default_policy import PAGE_BYTES, pages_per_expert
from moe_lightning.perf.sizing import Choice, Problem

RINGS = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)
_VALUES: dict[str, tuple[float, ...]] = {
    "ring": RINGS,
    "parts": (4, 1, 2, 8),
    "prefill": (2.0, 1.25, 1.5, 3.0, 4.0),
    "micro_batches": (8, 2, 4, 12, 16, 1),
    "groups": (1, 2, 4),
    "ahead": (2.0, 1.0, 0.5),
    "kv_every": (0, 12, 8, 6, 5, 4, 3, 2, 1),
    "cpu_every": (0, 8, 4, 3, 2, 1),
}
_PAGE_SIZES = (1.0, 0.5, 2.0)  # shares of the usual page's
# Of small jobs, whose prompts would otherwise take many passes, each as long as one with all of them.
_MORE_PREFILL, _MOST_OF_SMALL = (8.0, 16.0, 32.0, 64.0), 8192


def changed(choice: Choice, name: str, value: float) -> Choice:
    """The choice with another value."""
    new: dict[str, Any] = {name: value}
    return replace(choice, **new)


def _pages(problem: Problem) -> list[int]:
    sizes = (round(share * PAGE_BYTES) for share in _PAGE_SIZES)
    size = problem.expert_bytes or problem.dtype_bytes
    return list(dict.fromkeys(pages_per_expert(problem.spec, size, page) for page in sizes))


def _prefills(problem: Problem) -> tuple[float, ...]:
    work = problem.workload
    steady = problem.most_seqs * work.mean_prompt / work.mean_answer  # if all there are ran at once
    more = (value for value in _MORE_PREFILL if value <= work.mean_answer)
    return (*_VALUES["prefill"], *(value for value in more if value * steady <= _MOST_OF_SMALL))


def values_of(problem: Problem) -> dict[str, tuple[float, ...]]:
    """What is tried of each choice, the one that is begun with first."""
    most = problem.spec.experts.num_experts
    parts = tuple(count for count in _VALUES["parts"] if count <= most)
    every = {
        name: tuple(count for count in _VALUES[name] if count <= problem.spec.num_layers)
        for name in ("kv_every", "cpu_every")
    }
    return {
        **_VALUES, "prefill": _prefills(problem), "parts": parts, **every, "pages": tuple(_pages(problem)),
    }  # fmt: skip


class Starts(NamedTuple):
    """Choices that a search begins with: the usual one, those that differ in much, and the smallest."""

    usual: Choice
    fine: Choice
    whole: Choice
    bridging: Choice
    halves: Choice
    smallest: Choice


def starts(problem: Problem) -> Starts:
    """The usual choice, four that differ in much, and one that takes as little memory as any.

    Sweeps over whole layers pay with a ring of two layers and little room for prompts, those over halves with one
    of a layer and much room, and each of these alone does not: from the other starts luck alone leads there.
    """
    values = values_of(problem)
    usual = Choice(**{name: some[0] for name, some in values.items()})  # type: ignore[arg-type]
    finest: dict[str, Any] = {"parts": max(values["parts"]), "pages": min(values["pages"])}
    fine = replace(usual, micro_batches=2, prefill=4.0, **finest)
    whole = replace(usual, ring=1.2, micro_batches=2, prefill=4.0, parts=1, groups=2)
    bridging = replace(usual, ring=2.0, prefill=1.25, parts=1, groups=2)
    halves = replace(
        usual, ring=1.1, micro_batches=4, prefill=4.0, parts=int(min(2, max(values["parts"]))), groups=2
    )
    least: dict[str, Any] = {name: min(values[name]) for name in ("ring", "prefill")}
    most: dict[str, Any] = {name: max(values[name]) for name in ("micro_batches", "parts", "pages")}
    return Starts(usual, fine, whole, bridging, halves, replace(usual, **least, **most))
