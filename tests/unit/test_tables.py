"""Cells are measured once, as far as time allows, and tables and curves show what their files say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import accounting
import cost_curves
import make_tables
import throughput_table
from cells import CURVES, TABLE, CellSpec
from cost_curves import Point

from moe_lightning.bench.workloads import WORKLOADS
from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.units import GIB


class TestCells:
    def test_every_default_cell_is_one_and_has_a_file_of_its_own(self):
        cells = [CellSpec.parse(text) for text in (*TABLE, *CURVES)]
        assert len({cell.file_name("m", 0) for cell in cells}) == len(cells)
        assert {(c.gpu, c.gen_len) for c in cells} >= {
            (g * GIB, n) for g in (16, 24) for n in (32, 64, 128, 256)
        }

    def test_options_are_read(self):
        cell = CellSpec.parse("24GiB,64,both,host=100GiB,seqs=1000,workload=summarization")
        assert cell == CellSpec(24 * GIB, 64, "both", 100 * GIB, 1000, "summarization")
        assert cell.file_name("a/m", 2) == (
            "cell_a-m_gpu24gib_gen64_summarization_host100gib_seqs1000_both_2.json"
        )
        effort = cell.effort(20, 3)
        assert (effort.steady_passes, effort.is_job, effort.num_checked) == (20, True, 3)
        assert CellSpec.parse("24GiB,64,job").effort(20, 0).steady_passes == 0
        assert not CellSpec.parse("24GiB,64,steady").effort(20, 0).is_job

    def test_a_job_may_have_a_number_of_requests(self):
        cell = CellSpec.parse("24GiB,32,job,requests=50")
        assert cell.file_name("m", 0) == "cell_m_gpu24gib_gen32_requests50_job_0.json"
        assert (cell.work.num_requests, cell.work.gen_len) == (50, 32)
        assert CellSpec.parse("24GiB,32,job").work.num_requests is None

    @pytest.mark.parametrize(
        "text", ["24GiB,64,fast", "24GiB,64,job,disk=1", "24GiB,64,job,seqs=", "24GiB,64,job,requests=0"]
    )
    def test_what_is_no_cell_is_refused(self, text):
        with pytest.raises(ValueError, match="64"):
            CellSpec.parse(text)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Runs the driver on three cells without a model; what was measured, and how long each cell needs."""
    state = SimpleNamespace(measured=[], needed={}, wrong=set(), failing=set())

    def measure(setting, work, effort, session, show):
        if work.gen_len in state.failing:
            raise NoFeasiblePolicyError("nothing fits", "Raise gpu_memory")
        state.measured.append((setting.gpu_memory // GIB, work.gen_len, effort.num_checked))
        check = SimpleNamespace(is_equal=work.gen_len not in state.wrong)
        return SimpleNamespace(measured=[SimpleNamespace(check=check)])

    monkeypatch.setattr(throughput_table, "measure", measure)
    monkeypatch.setattr(throughput_table, "Session", lambda *a, **k: SimpleNamespace(unload=lambda: None))
    monkeypatch.setattr(throughput_table, "to_json", lambda found, setting: {})
    monkeypatch.setattr(throughput_table, "to_text", lambda found: "")
    monkeypatch.setattr(throughput_table, "seconds_since_start", lambda: 0.0)
    monkeypatch.setattr(
        throughput_table, "_seconds", lambda session, setting, cell, *rest: state.needed.get(cell.gen_len, 1)
    )

    def run(*flags):
        cells = [f"--cell=24GiB,{gen_len},job" for gen_len in (32, 64, 128)]
        monkeypatch.setattr(sys, "argv", ["throughput_table.py", f"--out={tmp_path}", *cells, *flags])
        state.measured.clear()
        return throughput_table.main()

    state.run = run
    return state


def test_cells_are_measured_once_and_checked_in_the_first_repetition(driver, tmp_path):
    assert driver.run("--repeat=2", "--check=3") == 0
    assert driver.measured == [(24, n, checked) for n in (32, 64, 128) for checked in (3, 0)]
    assert len(list(tmp_path.glob("cell_*.json"))) == 6
    next(tmp_path.glob("*gen64_job_1.json")).unlink()
    assert driver.run("--repeat=2") == 0
    assert driver.measured == [(24, 64, 0)]


def test_a_cell_for_which_time_is_too_short_is_left_for_the_next_run(driver, tmp_path):
    driver.needed = {64: 1000}
    assert driver.run("--time-limit=560") == 0
    assert [gen_len for _, gen_len, _ in driver.measured] == [32, 128]


def test_a_cell_that_fails_stops_no_other(driver, tmp_path):
    driver.failing, driver.wrong = {32}, {64}
    assert driver.run() == 1
    assert [gen_len for _, gen_len, _ in driver.measured] == [64, 128]
    assert len(list(tmp_path.glob("cell_*.json"))) == 2, "a wrong answer is kept, and told by the exit status"


H100 = {"gpu": "NVIDIA H100 80GB HBM3"}


def result(gpu=24, gen_len=128, rate=2000.0, kind="steady state", **changes):
    lanes = {"use": {"h2d": {"seconds": 1.4, "share": 0.96, "predicted_s": 1.4}}}
    values = {
        "settings": {"model": "mixtral-8x7b", "host_memory": None, "max_num_seqs": None},
        "workload": {"prompt_lens": list(WORKLOADS["mtbench"][0]), "gen_len": gen_len},
        "policy": {"max_num_seqs": 2856}, "num_layers": 32, "gpu_memory": gpu * GIB, "plain_copy_bytes_per_s": 5e10,
        "limit_host_memory": 125 * GIB,
        "memory": {"gpu": int(23.5 * GIB), "is_gpu_within": True, "is_host_within": True},
        "measured": [
            {
                "kind": kind, "tokens_per_s": rate, "share_of_limit": rate / 2939, "lanes": lanes,
                "predicted_tokens_per_s": 2100.0, "share_of_plain_copy": 0.97,
                "check": {"is_equal": True, "num_tokens": 40},
            }
        ],
    }  # fmt: skip
    return values | changes


def test_a_row_is_the_median_of_repetitions_with_their_spread(tmp_path):
    for number, rate in enumerate((2000.0, 2100.0, 1900.0)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result(rate=rate)))
    (tmp_path / "other.json").write_text(json.dumps({"unknown": 1}))
    *_, row = make_tables.throughput(make_tables.read(tmp_path)).splitlines()
    assert row == (
        "| mixtral-8x7b | 24 GiB | 128 | steady state | 2,000 (1,900 to 2,100, 3 runs) | 68% | 2,100 (-5%) | 96% | "
        "97% | 23.50 GiB | 120 tokens |"
    )


def test_what_is_off_over_or_wrong_is_said():
    bad = result(rate=1500.0)
    bad["memory"] |= {"is_gpu_within": False, "is_host_within": False}
    bad["measured"][0]["check"]["is_equal"] = False
    row = make_tables.throughput([bad]).splitlines()[-1]
    assert "2,100 (-29%, off)" in row
    assert row.endswith("23.50 GiB, over, host over its plan | 40 tokens, NOT EQUAL |")
    row = make_tables.throughput([bad, result()]).splitlines()[-1]
    assert row.endswith("over in 1 of 2, host over its plan in 1 of 2 | 80 tokens, NOT EQUAL in 1 of 2 |")


def test_a_run_of_both_kinds_says_how_the_job_is_beside_its_steady_state():
    """Two passes fill memory; in the next four, as an answer has tokens, it changes hands once."""
    both = result(gen_len=4)
    both["workload"]["num_requests"] = None
    counts = (50, 100, 99, 80, 80, 40, 10)
    passes = [{"seconds": 0.1, "generated": n, "num_running": n, "prompt_tokens": 0} for n in counts]
    both["measured"].append({"kind": "job", "tokens_per_s": 700.0, "passes": passes})
    *_, row = make_tables.agreement([both | {"file": "a.json"}, result()]).splitlines()
    assert row == "| mixtral-8x7b | 24 GiB | 4 | 2,000 | 898 | 45% | 700 |"


def test_peers_are_shown_with_their_best_batch():
    peer = {
        "engine": "deepspeed", "gpu_memory": 24 * GIB, "workload": {"gen_len": 128},
        "runs": [
            {"batch_size": 256, "tokens_per_s": 200.0},
            {"batch_size": 512, "tokens_per_s": 243.2},
            {"batch_size": 1024, "error": "CUDA out of memory"},
        ],
    }  # fmt: skip
    assert make_tables.peers([peer]).splitlines()[-1] == "| deepspeed | 24 GiB | 128 | 512 | 243.2 |"


def test_the_headline_has_a_column_for_each_length_and_counts_kept_promises():
    """Of plans alone, of jobs that fill memory; with 16-bit weights 54 GB/s allow 2,900 tokens/s here."""

    def run(rate, **changes):
        values = result(rate=rate, plain_copy_bytes_per_s=5.4e10, **{"hardware": H100, **changes})
        values["workload"]["num_requests"] = None
        return values

    results = [
        run(2100.0), run(1800.0, point="plan again 1"), run(1500.0, gen_len=64),
        run(9999.0, point="ring 2"), run(9999.0, cell="24GiB,128,steady,host=96GiB"),
        run(9999.0, hardware={"gpu": "NVIDIA H200"}),
        {
            "engine": "deepspeed", "gpu_memory": 24 * GIB, "workload": {"gen_len": 128}, "hardware": H100,
            "runs": [{"batch_size": 512, "tokens_per_s": 243.2}, {"batch_size": 1024, "error": "out of memory"}],
        },
        {
            "engine": "deepspeed", "gpu_memory": 24 * GIB, "workload": {"gen_len": 128},
            "hardware": {"gpu": "NVIDIA H200"}, "runs": [{"batch_size": 512, "tokens_per_s": 900.0}],
        },
    ]  # fmt: skip
    results[1]["settings"]["host_memory"] = 120 * GIB  # of all points of a run
    job = run(9999.0)
    job["workload"]["num_requests"] = 30
    _, _, *rows = make_tables.headline([*results, job]).splitlines()
    assert rows == [
        "| **24 GiB, KV memory full** |  | **1,500** | **1,950** (1,800 to 2,100, 2 runs) |  |",
        "| of the limit, 16-bit weights; packed |  | 40%; 20% | 67%; 34% |  |",
        "| within 10 % of the promise |  | 0 of 1, median -29% | 1 of 2, median -7% |  |",
        "| deepspeed, 24 GiB, the best batch tried |  |  | 243 |  |",
    ]


def test_what_is_missing_of_the_limit_is_accounted_for():
    """Of a run on a GPU: the factors' product is the share that the result has."""
    path = make_tables._RESULTS / "cells_6338035" / "cell_mixtral-8x7b_gpu16gib_gen64_both_0.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    found = accounting.account(values)
    assert found.share == pytest.approx(values["measured"][0]["share_of_limit"], rel=1e-6)
    assert math.prod(found[1:]) == pytest.approx(found.share, rel=0.01)
    assert all(0.7 < factor < 1 for factor in found[1:])
    values["policy"]["packed"] = False
    assert accounting.account(values) is None
    assert accounting.account({"rows": []}) is None


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_documents_tables_are_those_of_the_results(name):
    """After new results: make tables."""
    text = (Path(make_tables.__file__).parents[1] / name).read_text(encoding="utf-8")
    results = [values for directory in make_tables.recorded() for values in make_tables.read(directory)]
    assert make_tables.write(text, results) == text


def test_a_document_gets_its_tables_between_the_marks_and_nothing_else():
    document = "before\n<!-- tables: throughput -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    made = make_tables.write(document, [result()])
    assert made.startswith("before\n<!-- tables: throughput -->\n\n| model |")
    assert made.endswith("|\n\n<!-- end -->\nafter <!-- end -->\n") and "old" not in made
    assert make_tables.write(made, [result()]) == made
    with pytest.raises(ValueError, match="no table is named 'speed'"):
        make_tables.write("<!-- tables: speed -->\n<!-- end -->", [])
    with pytest.raises(ValueError, match="has no line"):
        make_tables.write("nothing", [])


def test_a_dot_is_on_the_curve_of_what_alone_is_different(tmp_path):
    middle = Point(24 * GIB, 121 * GIB, 128)
    allowed = result(rate=900.0)
    allowed["settings"]["host_memory"] = 96 * GIB
    capped = result(rate=700.0)
    capped["settings"]["max_num_seqs"] = 1000
    capped["policy"] = {"max_num_seqs": 990}
    results = [
        result(limit_host_memory=124 * GIB), capped, result(gpu=16, rate=1500.0), result(gen_len=32, rate=2800.0),
        allowed, result(gpu=16, gen_len=32, rate=1.0),
        result(kind="job", rate=2.0),
    ]  # fmt: skip
    found = cost_curves.measured(results, "mixtral-8x7b")
    dots = {curve.name: cost_curves.dots(curve, middle, found) for curve in cost_curves.CURVES}
    assert dots["seqs"] == [(990.0, 700.0), (2856.0, 2000.0)]
    assert dots["gen_len"] == [(32, 2800.0), (128, 2000.0)]
    assert dots["gpu"] == [(16, 1500.0), (24, 2000.0)]
    assert [(round(x, 2), y) for x, y in dots["host"]] == [(96, 900.0), (120.28, 2000.0)]
    lines = [
        cost_curves.line(curve, middle, lambda p: (p.seqs or 7, p.gpu / GIB)) for curve in cost_curves.CURVES
    ]
    assert lines[0] == [(float(v), 24.0) for v in cost_curves.CURVES[0].values]
    assert lines[2] == [(v / GIB, v / GIB) for v in cost_curves.CURVES[2].values]
    svg = tmp_path / "images" / "curves.svg"
    panels = zip(cost_curves.CURVES, lines, dots.values(), strict=True)
    cost_curves.draw(list(panels), "a title", svg)
    assert "<svg" in svg.read_text()
