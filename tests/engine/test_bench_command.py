"""`moe-lightning bench throughput` and `bench schedules`, from flags to files."""

from __future__ import annotations

import json

import pytest

from moe_lightning.cli.main import main


@pytest.fixture
def flags(mixtral, tmp_path):
    questions = tmp_path / "question.jsonl"
    questions.write_text("\n".join(json.dumps({"turns": ["x" * size]}) for size in (12, 40, 90)))
    return [
        "--model", str(mixtral), "--load-format", "dummy", "--device", "cpu", "--host-memory", "1200MiB",
        "--max-num-seqs", "8", "--input", str(questions), "--gen-len", "5",
    ]  # fmt: skip


def test_throughput_writes_what_it_prints(flags, tmp_path, capsys):
    path, svg = tmp_path / "out" / "result.json", tmp_path / "pass.svg"
    more = ["--num-layers", "2", "--steady-state", "2", "--job", "--check", "2", "--num-requests", "12"]
    assert main(["bench", "throughput", *flags, *more, "--json", str(path), "--svg", str(svg)]) == 0
    printed = capsys.readouterr()
    values = json.loads(path.read_text())
    steady, job = values["measured"]
    assert values["num_layers"] == 2 and values["settings"]["max_num_seqs"] == 8
    assert (len(steady["passes"]), sum(p["generated"] for p in job["passes"])) == (2, 12 * 5)
    assert f"steady state: {steady['tokens_per_s']:.0f} tokens/s" in printed.out
    assert printed.out.count("checked 2 answers: equal") == 2
    assert "ready after" in printed.err and "pass 1:" in printed.err
    assert "<svg" in svg.read_text()


def test_without_steady_state_it_is_a_job(flags, tmp_path):
    path = tmp_path / "result.json"
    assert main(["bench", "throughput", *flags, "--num-requests", "9", "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    assert [m["kind"] for m in values["measured"]] == ["job"]
    assert values["agreement"] is None and values["measured"][0]["check"] is None


@pytest.mark.parametrize("subject", ["throughput", "schedules"])
def test_what_cannot_run_is_one_line(subject, flags, capsys):
    assert main(["bench", subject, *flags, "--num-layers", "99"]) == 2
    assert "num_layers=99" in capsys.readouterr().err
    more = ["--load-format", "auto", "--num-layers", "2"]
    assert main(["bench", subject, *flags, *more]) == 2
    assert "add --load-format dummy" in capsys.readouterr().err


def test_schedules_need_a_limit_of_gpu_memory_on_a_cpu(flags, capsys):
    assert main(["bench", "schedules", *flags, "--variant", "paper"]) == 2
    assert "give gpu_memory" in capsys.readouterr().err


def test_schedules_write_a_row_for_each_variant(flags, tmp_path, capsys):
    path = tmp_path / "schedules.json"
    # The default policy's rows and logits take 76 MiB of what the CPU plays; a layer's experts a half.
    more = ["--gpu-memory", "104MiB", "--variant", "continuous", "--variant", "flexgen", "--passes", "1"]
    assert main(["bench", "schedules", *flags, *more, "--json", str(path)]) == 0
    values = json.loads(path.read_text())
    assert [row["name"] for row in values["rows"]] == ["continuous", "flexgen"]
    assert "flexgen: FlexGen with attention on the GPU" in capsys.readouterr().out
