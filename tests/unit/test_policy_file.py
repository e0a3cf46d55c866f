"""A policy file that cannot be right is an error that names the value and what may stand there."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from moe_lightning.errors import ConfigError
from moe_lightning.perf.default_policy import load_policy
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.policy import Policy

BASE = Policy(8, 4, 1, 2, 256, 64, 2, (16, 16, 16), 0, 64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "policy.json"


def test_values_of_the_file_replace_those_of_the_base(path):
    path.write_text(json.dumps({"schedule": "flexgen", "resident_pages": [1, 0, 2], "look_ahead": 0}))
    policy = load_policy(str(path), BASE)
    assert (policy.schedule, policy.resident_pages, policy.look_ahead) == ("flexgen", (1, 0, 2), 0)
    assert policy.num_blocks == BASE.num_blocks


@pytest.mark.parametrize("at_once", [True, False])
def test_a_policy_as_json_comes_back_as_it_was(at_once, path):
    """As `plan --json` and results have it."""
    policy = Policy(
        9, 3, 2, 5, 300, 70, 4, (0, 7, 16), 11, 99, block_size=32, expert_parts=2, first_part_at_once=at_once,
        kv_every=2, cpu_every=3, packed=True,
    )  # fmt: skip
    path.write_text(json.dumps(asdict(policy)))
    assert load_policy(str(path), BASE) == policy


def test_policies_of_files_that_know_no_order_of_parts_keep_the_one_they_ran_with(path):
    path.write_text(json.dumps({"expert_parts": 2}))
    assert not load_policy(str(path), BASE).first_part_at_once


@pytest.mark.parametrize("name", ["packed", "first_part_at_once"])
@pytest.mark.parametrize("value", [1, 0, "no", None])
def test_what_is_true_or_false_is_nothing_else(name, value, path):
    path.write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=rf"{name}={value!r}: give true or false"):
        load_policy(str(path), BASE)


@pytest.mark.parametrize("schedule", ["zzz", 3, None, ["cgopipe"]])
def test_an_unknown_schedule_is_refused_with_the_known_ones(schedule, path):
    path.write_text(json.dumps({"schedule": schedule}))
    with pytest.raises(ConfigError) as caught:
        load_policy(str(path), BASE)
    assert f"schedule={schedule!r}" in str(caught.value) and str(path) in str(caught.value)
    assert all(name in str(caught.value) for name in SCHEDULES)


@pytest.mark.parametrize(
    "pages", ["x", "abc", 5, None, [1, 2], [1, 2, 3, 4], [1, 2, "3"], [1, -1, 0], [1, 2.0, 3]]
)
def test_resident_pages_that_are_no_count_for_each_layer_are_refused(pages, path):
    path.write_text(json.dumps({"resident_pages": pages}))
    with pytest.raises(ConfigError, match=r"resident_pages=.*: give a list of 3 integers"):
        load_policy(str(path), BASE)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_blocks", 0),
        ("num_blocks", True),
        ("group_size", "2"),
        ("num_frames", -1),
        ("mu", 3),
        ("kv_every", -1),
        ("kv_every", "2"),
        ("kv_every", 4),
        ("cpu_every", -1),
        ("cpu_every", 4),
    ],
)
def test_another_wrong_value_is_named(name, value, path):
    path.write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=name):
        load_policy(str(path), BASE)


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 100_000])
def test_a_file_without_an_object_is_refused(content, path):
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"policy file .*; give"):
        load_policy(str(path), BASE)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load_policy(str(tmp_path), BASE)
