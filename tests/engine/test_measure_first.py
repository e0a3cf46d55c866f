"""A long job's machine is measured before it is planned for, where nobody has."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import profiles
from moe_lightning.cli import measure_first
from moe_lightning.cli.measure_first import measured_first
from moe_lightning.config import EngineConfig
from moe_lightning.hardware.presets import preset
from moe_lightning.models import registry
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates
from moe_lightning.perf.shape import shape_of

SPEC = registry.resolve("mixtral-8x7b")
OTHER = replace(SPEC, hidden_size=2048)
DATASHEET, MEASURED = DatasheetRates(preset("l4")), MeasuredRates(profiles.PROFILE)
LONG, SHORT = 1200.0, 1199.0
CONFIG = EngineConfig("a model")
SAID = "the plan goes by {}; `moe-lightning profile --model MODEL` measures this machine in a minute"


def plan(rates, job_s, spec=SPEC):
    prediction = Prediction(1.5, {"h2d": 1.4}, 9, 8, 60.0, 51.0, job_s)
    return SimpleNamespace(rates=rates, prediction=prediction, spec=spec)


class Process:
    """What runs instead of `profile`."""

    ran: list[list[str]]
    status = 0
    lines = " 0.0 s 1/11 host memory\n"

    def __init__(self, command, *, stdout, stderr, text, errors):
        assert (stdout, stderr, text, errors) == (subprocess.DEVNULL, subprocess.PIPE, True, "replace")
        self.ran.append(command)
        self.stderr, self.returncode, self.is_ended = io.StringIO(self.lines), self.status, False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def terminate(self):
        Process.is_ended = True


@pytest.fixture
def commands(monkeypatch):
    """What was run."""
    monkeypatch.setattr(Process, "ran", [], raising=False)
    monkeypatch.setattr(Process, "is_ended", False, raising=False)
    monkeypatch.setattr(subprocess, "Popen", Process)
    return Process.ran


def test_the_profile_of_these_tests_has_the_one_model_and_not_the_other():
    assert profiles.PROFILE.has(shape_of(SPEC, "")) and not profiles.PROFILE.has(shape_of(OTHER, ""))


@pytest.mark.parametrize(
    ("first", "source"),
    [
        (plan(DATASHEET, LONG), "the GPU's datasheet"),
        (plan(MEASURED, LONG, OTHER), "a profile of other models"),
    ],
)
@pytest.mark.parametrize("gpu_memory", [None, 16 * 2**30])
def test_a_long_job_is_planned_again_by_what_was_measured(first, source, gpu_memory, commands, capsys):
    plans = [first, plan(MEASURED, LONG)]
    config, asked = replace(CONFIG, gpu_memory=gpu_memory), []

    def planned(config):
        asked.append((config, len(commands)))
        return plans[len(asked) - 1]

    assert measured_first(config, planned) is plans[1]
    assert asked == [(config, 0), (config, 1)]
    (command,) = commands
    flags = ["--gpu-memory", str(gpu_memory)] if gpu_memory else []
    assert command == [sys.executable, "-P", "-m", "moe_lightning", "profile", "--model", "a model", *flags]
    found = capsys.readouterr()
    assert found.err.splitlines() == [
        f"note: by {source} this job takes 20 min 00 s; measuring first takes about a minute, once",
        Process.lines.rstrip(),
    ]
    assert not found.out


@pytest.mark.parametrize(
    ("first", "source"),
    [
        (plan(DATASHEET, SHORT), "the GPU's datasheet"),
        (plan(DATASHEET, None), "the GPU's datasheet"),
        (plan(MEASURED, SHORT, OTHER), "a profile of other models"),
        (plan(MEASURED, LONG), None),
        (SimpleNamespace(rates=DATASHEET, prediction=None), None),
        (None, None),
    ],
)
def test_else_nothing_is_measured(first, source, commands, capsys):
    assert measured_first(CONFIG, lambda config: first) is first
    assert not commands
    assert capsys.readouterr().err == (f"note: {SAID.format(source)}\n" if source else "")


@pytest.mark.parametrize("status", [2, 0])
def test_where_nothing_comes_of_it_the_plan_stays_and_says_so(status, commands, capsys, monkeypatch):
    """With a status of 0 it was measured, but could not be kept."""
    monkeypatch.setattr(Process, "status", status)
    first = plan(DATASHEET, LONG)
    assert measured_first(CONFIG, lambda config: first) is first
    told = capsys.readouterr().err
    assert ("measuring ended with exit status 2" in told) == bool(status)
    assert told.splitlines()[-1] == "note: " + SAID.format("the GPU's datasheet")


def test_who_interrupts_ends_what_measures_too(commands, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_first._measure(CONFIG)
    assert Process.is_ended


def test_what_is_run_is_a_command_and_no_file_of_the_users_comes_before_it(monkeypatch, tmp_path, capfd):
    """With a model that is none, so that it ends at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')\n")
    assert measure_first._measure(EngineConfig("no-such-model", gpu_memory=2**30)) == 2
    told = capfd.readouterr()
    assert "no-such-model" in told.err and "known" in told.err and not told.out
