"""Rates fitted to timelines, and what was predicted beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.presets import preset
from moe_lightning.models.registry import resolve
from moe_lightning.perf.beside import by_kind, by_lane
from moe_lightning.perf.cost import PassWork
from moe_lightning.perf.drift import TOLERANCE, WINDOW, Drift
from moe_lightning.perf.facts import PassFacts
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.refit import Refitted, fit, kind_seconds
from moe_lightning.pipeline.task import Lane, PassShape, TaskKind

SPEC = replace(resolve("mixtral-8x7b"), num_layers=3)
SHAPE = PassShape(3, 1, 2, 2, 2, (8, 8, 8), 12)
WORK = PassWork(SPEC, "bfloat16", 1, (60, 40, 30), (900, 4000, 3000), (1, 40, 30))
FACTS = PassFacts("cgopipe", SHAPE, WORK)
RATES = DatasheetRates(preset("l4"))
PREDICTED = FACTS.predict(RATES)
factors = st.dictionaries(st.sampled_from(TaskKind), st.floats(0.01, 100))


@settings(max_examples=30, deadline=None)
@given(true=factors)
def test_what_a_fit_finds_is_what_slowed_the_tasks_and_predicts_the_measured_pass(true):
    measured = FACTS.predict(Refitted(RATES, true))
    found = fit(PREDICTED, measured)
    ran = {record.kind for record in PREDICTED.records}
    assert found.keys() == ran
    assert all(found[kind] == pytest.approx(true.get(kind, 1.0)) for kind in ran)
    again = FACTS.predict(Refitted(RATES, found))
    assert again.until_tokens == pytest.approx(measured.until_tokens)


def test_the_link_is_as_much_slower_as_pages_are():
    assert Refitted(RATES, {TaskKind.LOAD_PAGE: 2.0}).h2d == RATES.h2d / 2
    assert Refitted(RATES, {TaskKind.ATTENTION: 2.0}).h2d == RATES.h2d


def test_rows_by_kind_count_tasks_and_add_their_seconds():
    measured = FACTS.predict(Refitted(RATES, {TaskKind.EXPERTS: 3.0}))
    rows = {row.name: row for row in by_kind(kind_seconds(PREDICTED), measured)}
    assert sum(row.count for row in rows.values()) == len(PREDICTED.records)
    assert TaskKind.LOAD_KV not in rows, "nothing of the kind ran"
    assert rows["experts"].ratio == pytest.approx(3.0)
    assert rows["attention"].ratio == pytest.approx(1.0)
    assert rows["attention"].count == 2 * 3
    assert {row.predicted_s for row in by_kind(None, measured)} == {None}
    assert {row.ratio for row in by_kind(None, measured)} == {None}


def test_rows_by_lane_end_with_the_pass():
    measured = FACTS.predict(Refitted(RATES, {TaskKind.ATTENTION: 50.0}))
    *lanes, whole = by_lane(PREDICTED, measured)
    assert [row.name for row in lanes] == ["gpu", "h2d", "back", "d2h", "cpu"]
    by_name = {row.name: row for row in lanes}
    assert by_name["cpu"].ratio == pytest.approx(50.0)
    assert by_name["cpu"].measured_s == measured.busy_seconds()[Lane.CPU]
    assert (whole.name, whole.count) == ("pass", len(measured.records))
    assert (whole.predicted_s, whole.measured_s) == (PREDICTED.until_tokens, measured.until_tokens)


def test_pages_of_the_next_pass_do_not_count_until_the_tokens():
    measured = FACTS.predict(Refitted(RATES, {TaskKind.LOAD_PAGE: 1000.0}))
    last = max(record.end for record in measured.records if record.kind is TaskKind.SAMPLE)
    assert measured.until_tokens == last - measured.start < measured.span


def test_facts_survive_json():
    values = json.loads(json.dumps(FACTS.to_json()))
    assert PassFacts.from_json(values, SPEC) == FACTS
    assert (FACTS.num_decode, FACTS.num_prompt) == (70, 60)


@pytest.mark.parametrize(
    "values",
    [{}, {"schedule": "cgopipe"}, {**FACTS.to_json(), "shape": {"dance": 1}}, {**FACTS.to_json(), "work": 5}],
)
def test_what_is_no_facts_is_refused(values):
    with pytest.raises(ConfigError, match="record it anew"):
        PassFacts.from_json(values, SPEC)


def drift_of(ratios):
    drift = Drift()
    for ratio in ratios:
        drift.note(ratio)
    return drift


@given(st.lists(st.floats(1 / (1 + TOLERANCE) + 1e-6, 1 + TOLERANCE - 1e-6), max_size=3 * WINDOW))
def test_what_stays_within_the_tolerance_is_no_drift(ratios):
    assert not drift_of(ratios).is_large


@pytest.mark.parametrize("ratio", [1 + 2 * TOLERANCE, 1 / (1 + 2 * TOLERANCE)])
def test_drift_takes_a_window_of_passes_of_which_most_are_off(ratio):
    assert not drift_of([ratio] * (WINDOW - 1)).is_large
    assert drift_of([ratio] * WINDOW).is_large
    assert not drift_of([ratio] * (WINDOW // 2 - 1) + [1.0] * (WINDOW // 2 + 1)).is_large
    drift = drift_of([ratio] * WINDOW)
    drift.forget()
    assert not drift.is_large
