"""A long job's machine is measured before it is planned for, where nobody has."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import profiles
from moe_lightning.cli import measure_first
from moe_lightning.cli.measure_first import BY_DATASHEET, measured_first
from moe_lightning.config import EngineConfig
from moe_lightning.hardware.presets import preset
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates

DATASHEET, MEASURED = DatasheetRates(preset("l4")), MeasuredRates(profiles.PROFILE)
LONG, SHORT = 1300.0, 1100.0
CONFIG = EngineConfig("a model", gpu_memory=16 * 2**30)


def plan(rates, job_s):
    return SimpleNamespace(rates=rates, prediction=Prediction(1.5, {"h2d": 1.4}, 9, 8, 60.0, 51.0, job_s))


@pytest.fixture
def commands(monkeypatch):
    """What was run, with an exit status that a test may change."""
    ran = SimpleNamespace(all=[], status=0)

    def run(command, **kwargs):
        ran.all.append(command)
        return SimpleNamespace(returncode=ran.status)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def test_a_long_job_by_a_datasheet_is_planned_again_by_what_was_measured(commands, capsys):
    plans = [plan(DATASHEET, LONG), plan(MEASURED, LONG)]
    asked = []

    def planned(config):
        asked.append((config, len(commands.all)))
        return plans[len(asked) - 1]

    assert measured_first(CONFIG, planned) is plans[1]
    assert asked == [(CONFIG, 0), (CONFIG, 1)]
    (command,) = commands.all
    assert command[:4] == [sys.executable, "-m", "moe_lightning", "profile"]
    assert command[4:] == ["--model", "a model", "--gpu-memory", str(16 * 2**30)]
    assert "21 min 40 s; measuring this machine first takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "is_noted"),
    [
        (plan(DATASHEET, SHORT), True),
        (plan(DATASHEET, None), True),
        (plan(MEASURED, LONG), False),
        (SimpleNamespace(rates=DATASHEET, prediction=None), False),
        (None, False),
    ],
)
def test_else_nothing_is_measured(first, is_noted, commands, capsys):
    assert measured_first(CONFIG, lambda config: first) is first
    assert not commands.all
    assert (BY_DATASHEET in capsys.readouterr().err) == is_noted


def test_where_measuring_fails_the_plan_stays(commands, capsys):
    commands.status = 2
    first = plan(DATASHEET, LONG)
    assert measured_first(CONFIG, lambda config: first) is first
    assert "measuring ended with exit status 2; the plan goes by the datasheet" in capsys.readouterr().err


def test_what_is_run_is_a_command(monkeypatch, tmp_path):
    """It measures a machine without a GPU too; here with a model that is none, so that it ends at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure_first._measure(EngineConfig("no such model")) == 2
