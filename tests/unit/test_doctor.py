"""What `doctor` says of a machine."""

from __future__ import annotations

import json

import pytest

from moe_lightning.cli.main import main
from moe_lightning.hardware.inspection import Verdict, disk_finding, disk_read_rate, host_findings


def machine(root, *, huge_pages="always [madvise] never", num_nodes=1):
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text("model name\t: A CPU\nmodel name\t: A CPU\n")
    pages = root / "sys/kernel/mm/transparent_hugepage"
    pages.mkdir(parents=True)
    (pages / "enabled").write_text(huge_pages)
    for node in range(num_nodes):
        (root / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    return root


def found(root):
    return {finding.name: finding for finding in host_findings(root)}


def test_a_machine_that_lacks_nothing_gets_no_advice_about_pages_and_nodes(tmp_path):
    findings = found(machine(tmp_path))
    assert findings["cpu"].value.startswith("A CPU, ")
    assert (findings["huge pages"].value, findings["huge pages"].advice) == ("madvise", "")
    assert findings["NUMA"].value == "one node"


def test_missing_huge_pages_are_slow_and_the_command_that_helps_is_named(tmp_path):
    finding = found(machine(tmp_path, huge_pages="always madvise [never]"))["huge pages"]
    assert finding.verdict is Verdict.SLOW
    assert "echo madvise >" in finding.advice


def test_several_nodes_are_counted(tmp_path):
    assert found(machine(tmp_path, num_nodes=2))["NUMA"].value.startswith("2 nodes")


@pytest.mark.parametrize("rate, verdict", [(0.2e9, Verdict.SLOW), (3e9, Verdict.GOOD)])
def test_a_slow_disk_is_told_by_the_minutes_that_a_model_takes(rate, verdict, tmp_path):
    finding = disk_finding(tmp_path, measure=lambda directory: rate)
    assert finding.verdict is verdict
    assert ("minutes" in finding.advice) == (verdict is Verdict.SLOW)


def test_a_directory_that_cannot_be_written_is_no_crash(tmp_path):
    finding = disk_finding(tmp_path / "absent")
    assert finding.verdict is Verdict.SLOW
    assert "--disk" in finding.advice


def test_a_disk_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_lightning.hardware.inspection._DISK_BYTES", 32 * 2**20)
    assert disk_read_rate(tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_json_has_every_finding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moe_lightning.hardware.inspection._DISK_BYTES", 16 * 2**20)
    status = main(["doctor", "--json", "--disk", str(tmp_path)])
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {
        "cpu",
        "host memory",
        "huge pages",
        "locking limit",
        "NUMA",
        "GPU",
        "CPU attention",
        "disk",
    } <= set(findings)
    assert status == (1 if any(entry["verdict"] == "missing" for entry in findings.values()) else 0)
