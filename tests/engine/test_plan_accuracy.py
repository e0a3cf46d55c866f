"""The GPU evidence for the planner, with a tiny model: points are measured once, and tables say what they say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import accuracy_tables
import cells
import plan_accuracy
import points
from accuracy_tables import accuracy, beside, verdicts
from neighbours import neighbours

from moe_lightning.bench import schedules
from moe_lightning.bench.variants import VARIANTS, paper_plan
from moe_lightning.hardware.presets import preset
from moe_lightning.models import registry
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.memory import memory_use
from moe_lightning.perf.paper_model import PaperMachine
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.rates import DatasheetRates
from moe_lightning.perf.sizing import largest_policy
from moe_lightning.perf.trials import Planned
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB, MIB

MIXTRAL = registry.resolve("mixtral-8x7b")
SHALLOW = replace(MIXTRAL, num_layers=8)
WORK = Workload((40, 76, 200), gen_len=64)


@pytest.fixture(scope="module")
def planned():
    memory, rates = Memory(30 * GIB, 7 * GIB), DatasheetRates(preset("h100-sxm"))
    found = search(SHALLOW, "bfloat16", memory, rates, WORK)
    problem = problem_of(SHALLOW, "bfloat16", memory, WORK)
    return replace(problem, packed=found.policy.packed), found


def test_neighbours_are_other_policies_that_fit(planned):
    problem, plan = planned
    found = neighbours(problem, plan)
    assert len(found) >= 8
    assert len({*found.values(), plan.policy}) == len(found) + 1
    assert {name.split()[0] for name in found} >= {
        "micro_batches",
        "ring",
        "prefill",
        "parts",
        "pages",
        "seqs",
    }
    for policy in found.values():
        use = memory_use(SHALLOW, 2, policy)
        assert use.gpu_bytes <= problem.memory.gpu and use.host_bytes <= problem.memory.host


@pytest.mark.parametrize("parts", [1, 2])
def test_of_plans_in_parts_one_neighbour_has_the_first_with_the_others(parts, planned):
    problem, plan = planned
    choice = replace(plan.choice, parts=parts)
    policy = largest_policy(problem, choice)
    found = neighbours(problem, Planned(problem.outlook(policy, plan.outlook.rates), choice))
    late = replace(policy, first_part_at_once=False)
    assert found.get("first part late") == (late if parts > 1 else None)


@pytest.fixture
def command(mixtral, monkeypatch, tmp_path):
    """Runs the script with more arguments, in the memory of a tiny GPU; its exit status."""
    found = paper_plan(MIXTRAL, PaperMachine.of(preset("l4")), WORK)
    monkeypatch.setattr(schedules, "paper_plan", lambda *args: replace(found, ubs=3, n_ub=2, wg=0.3))
    few = {name: VARIANTS[name] for name in ("paper", "plan")}
    monkeypatch.setattr(plan_accuracy, "VARIANTS", few)
    monkeypatch.setattr(points, "neighbours", lambda *args: dict([*neighbours(*args).items()][:1]))
    monkeypatch.setattr(plan_accuracy, "_LOAD_S", 0.0)
    monkeypatch.setattr(plan_accuracy, "_NEXT_LOAD_S", 0.0)
    monkeypatch.setattr(
        cells, "workload", lambda name, gen_len, requests: Workload((3, 5, 9), gen_len, requests)
    )

    def run(*more):
        arguments = [
            "--model", str(mixtral), "--device", "cpu", "--executor", "threads", "--dtype", "float32",
            "--host-memory", "1240MiB", "--cell", f"{69 * MIB // 1024}KiB,12,steady,seqs=6", "--steady-passes", "2",
            "--out", str(tmp_path), "--time-limit", "1e9",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["plan_accuracy.py", *arguments, *more])
        return plan_accuracy.main()

    return run


def test_points_and_variants_are_measured_once_and_told(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        plan_accuracy, "_is_undisturbed", lambda found: True
    )  # passes of microseconds are not
    command()
    found_points = [json.loads(path.read_text()) for path in tmp_path.glob("point_*.json")]
    names = {values["point"] for values in found_points}
    assert {"plan", "plan again 1"} < names and len(names) == 3
    for values in found_points:
        (found,) = values["measured"]
        assert found["kind"] == "steady state" and len(found["passes"]) == 2
        assert found["tokens_per_s"] > 0 and found["predicted_tokens_per_s"] > 0
        assert all(use["predicted_s"] is not None for use in found["lanes"]["use"].values())
    rows = json.loads((tmp_path / "schedules.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["paper", "plan"]
    assert rows[1]["predicted_ratio"] == pytest.approx(
        rows[1]["predicted_tokens_per_s"] / rows[0]["predicted_tokens_per_s"]
    )
    told = capsys.readouterr().out
    assert "1 neighbour, the fastest is" in told

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    command()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_point_that_was_not_steady_is_measured_once_more_and_both_are_told(command, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_accuracy, "_is_undisturbed", lambda found: False)
    command("--part", "plans")
    (path,) = tmp_path.glob("point_plan_*.json")
    values, time = json.loads(path.read_text()), path.stat().st_mtime_ns
    (before,), (found,) = values["unsteady"], values["measured"]
    assert before["tokens_per_s"] != found["tokens_per_s"]
    assert len(accuracy([values]).splitlines()) == 2 + 2
    command("--part", "plans")
    assert path.stat().st_mtime_ns == time, "not a third time"


def test_without_time_nothing_is_measured_and_it_says_so(command, tmp_path, capsys):
    command("--time-limit", "0")
    assert list(tmp_path.iterdir()) == []
    assert "run the command again" in capsys.readouterr().out


def point(name, rate, predicted, h2d=1.0):
    use = {
        "h2d": {"seconds": h2d, "share": 0.9, "predicted_s": 1.0},
        "cpu": {"seconds": 0.9, "share": 0.01, "predicted_s": 0.1},
    }
    measured = {"tokens_per_s": rate, "predicted_tokens_per_s": predicted, "lanes": {"use": use}}
    return {
        "point": name, "name": "mixtral", "gpu_memory": 24 * GIB, "workload": {"gen_len": 128},
        "settings": {"max_num_seqs": None}, "policy": {"max_num_seqs": 3000}, "measured": [measured],
    }  # fmt: skip


class TestTables:
    def test_a_plan_that_keeps_its_promise_and_is_the_fastest_is_good(self):
        results = [
            point("plan", 100, 105),
            point("plan again 1", 102, 105),
            point("ring 1", 103, 104),
            {"rows": []},
        ]
        lines, is_good = verdicts(results, 0.05)
        assert is_good
        assert lines == [
            "mixtral, 24 GiB, 128: as predicted",
            "mixtral, 24 GiB, 128: 1 neighbour, the fastest is ring 1, +2.0% to the plan",
        ]
        assert (
            "| mixtral | 24 GiB | 128 |  |  | 105 | 100 | -4.8% | 1.000 (+0.0%) |  | 0.900 |  |"
            in accuracy(results)
        )
        assert (
            beside(results).splitlines()[2].startswith("| mixtral, 24 GiB, 128 | ring 1 | 3,000 | 104 | 103")
        )

    def test_neighbours_are_compared_with_the_plan_just_before_and_after(self):
        """A machine that gets slower all the time: no neighbour is faster than the plan."""
        rates = {
            "plan": 100,
            "ring 1": 98,
            "parts 1": 95,
            "plan again 1": 90,
            "ring 2": 85,
            "plan again 2": 80,
        }
        results = [point(name, rate, 100) | {"began_s": n} for n, (name, rate) in enumerate(rates.items())]
        rows = {line.split(" | ")[1]: line.split(" | ")[6] for line in beside(results[::-1]).splitlines()[2:]}
        assert {name: rows[name] for name in ("ring 1", "parts 1", "ring 2")} == {
            "ring 1": "+3.2%", "parts 1": "+0.0%", "ring 2": "+0.0%",
        }  # fmt: skip
        assert verdicts(results, 0.05)[0][-1].endswith(
            "3 neighbours, the fastest is ring 1, +3.2% to the plan"
        )

    def test_passes_that_differ_by_more_than_a_quarter_are_not_steady(self):
        steady, unsteady = point("plan", 100, 100), point("plan", 100, 100)
        for values, longest in ((steady, 1.25), (unsteady, 1.26)):
            passes = [{"seconds": 1.0}, {"seconds": longest}, {"seconds": 1.1}]
            values["measured"][0]["passes"] = passes
        assert "| 1.00 to 1.25 |" in accuracy([steady])
        assert "| 1.00 to 1.26, not steady |" in accuracy([unsteady])
        assert verdicts([steady], 0.05) == (["mixtral, 24 GiB, 128: as predicted"], True)
        (line,), is_good = verdicts([unsteady], 0.05)
        assert (line, is_good) == ("mixtral, 24 GiB, 128: not steady, passes of 1.00 to 1.26 s", False)

    def test_host_memory_that_is_slower_than_in_the_profile_is_told(self):
        like, slower = point("plan", 100, 100), point("plan", 100, 100)
        for values, share in ((like, 0.9), (slower, 0.89)):
            values["measured"][0] |= {"passes": [{"seconds": 1.0}], "like_profile": share}
        assert "| 1.00 to 1.00 |" in accuracy([like])
        assert "| 1.00 to 1.00, memory 89% of the profile's |" in accuracy([slower])
        assert verdicts([like], 0.05) == (["mixtral, 24 GiB, 128: as predicted"], True)
        (line,), is_good = verdicts([slower], 0.05)
        assert (line, is_good) == ("mixtral, 24 GiB, 128: host memory 89% of the profile's", False)
        assert not plan_accuracy._is_undisturbed(slower["measured"][0])
        assert plan_accuracy._is_undisturbed(like["measured"][0])

    def test_a_plan_is_compared_with_neighbours_of_its_own_machine_alone(self):
        """One commit on two machines, the second twice as fast; the tables say of which GPU its memory is."""
        results = [
            point(name, rate, 100)
            | {"commit": "a", "began_s": n, "profile": {"created": str(n // 2)}, "hardware": {"gpu": gpu}}
            for n, (name, rate, gpu) in enumerate(
                [
                    ("plan", 100, "NVIDIA H100 80GB HBM3"), ("ring 1", 99, "NVIDIA H100 80GB HBM3"),
                    ("plan", 200, "NVIDIA H200"), ("ring 1", 202, "NVIDIA H200"),
                ]
            )
        ]  # fmt: skip
        assert [line for line in verdicts(results, 0.05)[0] if "neighbour" in line] == [
            "mixtral, 24 GiB, H100, 128: 1 neighbour, the fastest is ring 1, -1.0% to the plan",
            "mixtral, 24 GiB, H200, 128: 1 neighbour, the fastest is ring 1, +1.0% to the plan",
        ]
        for each in results:
            each["hardware"] = {"gpu": "NVIDIA H200"}
        assert [line.partition("1, ")[2] for line in verdicts(results, 0.05)[0] if "neighbour" in line] == [
            "-1.0% to the plan", "+1.0% to the plan",
        ]  # fmt: skip

    def test_a_plan_is_compared_with_neighbours_of_its_own_commit_alone(self):
        others = [point(name, rate, 100) | {"commit": "b"} for name, rate in (("plan", 90), ("ring 1", 89))]
        results = [point("plan", 100, 100) | {"commit": "a0b1c2d3e4"}, *others]
        lines, _ = verdicts(results, 0.05)
        assert lines[-1].endswith("1 neighbour, the fastest is ring 1, -1.1% to the plan")
        assert len(beside(results).splitlines()) == 2 + 2
        assert "| 128 | a0b1c2d |" in accuracy(results)

    @pytest.mark.parametrize(
        ("results", "what"),
        [
            ([point("plan", 89, 100)], "tokens/s -11.0%*"),
            ([point("plan", 100, 100, h2d=1.2)], "h2d +20.0%*"),
            ([point("plan", 100, 100), point("ring 1", 106, 100)], "+6.0% to the plan, more than 5%"),
        ],
    )
    def test_what_is_off_is_said(self, results, what):
        lines, is_good = verdicts(results, 0.05)
        assert not is_good and any(what in line for line in lines)
        assert accuracy_tables.points_of([{"rows": []}, *results]) == results
