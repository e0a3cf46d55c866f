"""The verb `profile`, its measurements replaced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_lightning.cli import profile
from moe_lightning.cli.main import main
from moe_lightning.cli.profile_table import grids, to_text
from moe_lightning.hardware.kernel_times import ExpertsProfile, ModelShape
from moe_lightning.hardware.profile import DiskProfile, Profile
from moe_lightning.hardware.profile_cache import cache_path, load_profile, save_profile
from profiles import CPU_PROFILE, MACHINE, PROFILE

EXPERTS = PROFILE.gpu.experts[0]


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names that each measurement was asked for."""
    calls: list[list[str]] = []

    def measure(shapes: list[ModelShape], effort: object, **_: object) -> Profile:
        calls.append([s.name for s in shapes])
        experts = tuple(ExpertsProfile(s, "bfloat16", EXPERTS.times) for s in shapes)
        return replace(PROFILE, gpu=replace(PROFILE.gpu, experts=experts), disk=None)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moe_lightning.profiling.measure.measure", measure)
    monkeypatch.setattr("moe_lightning.engine.identity.this_machine", lambda: MACHINE)
    monkeypatch.setattr(
        "moe_lightning.profiling.measure.measure_disk", lambda path: DiskProfile(str(path), 2e9)
    )
    return calls


def test_the_second_time_it_is_the_cache_that_answers(measured, capsys):
    assert main(["profile"]) == 0
    first = capsys.readouterr()
    assert first.err.startswith(f"measuring: no profile at {cache_path()}")
    assert measured == [["mixtral-8x7b", "qwen3-30b-a3b"]]
    assert main(["profile"]) == 0
    second = capsys.readouterr()
    assert second.err == ""
    assert second.out == first.out
    assert f"cache: {cache_path()}" in second.out
    assert len(measured) == 1


def test_refresh_measures_again_and_keeps_the_disk(measured, capsys):
    main(["profile", "--disk", "/"])
    assert main(["profile", "--refresh"]) == 0
    assert len(measured) == 2
    assert "measuring: --refresh" in capsys.readouterr().err
    assert load_profile(cache_path()).disk == DiskProfile("/", 2e9)


def test_a_change_of_the_machine_is_told_and_measured(measured, monkeypatch, capsys):
    main(["profile"])
    monkeypatch.setattr("moe_lightning.engine.identity.this_machine", lambda: replace(MACHINE, torch="9.9"))
    main(["profile"])
    assert "torch was 2.11.0 and is 9.9" in capsys.readouterr().err
    assert len(measured) == 2


def test_another_model_is_added_to_those_that_are_there(measured, capsys):
    main(["profile", "--model", "mixtral-8x7b"])
    main(["profile", "--model", "mixtral-8x22b", "--model", "mixtral-8x7b"])
    main(["profile", "--model", "mixtral-8x7b"])
    assert measured == [["mixtral-8x7b"], ["mixtral-8x7b", "mixtral-8x22b"]]
    assert "has no numbers of mixtral-8x22b" in capsys.readouterr().err


def test_a_disk_is_added_without_measuring_the_rest_again(measured, tmp_path):
    main(["profile"])
    main(["profile", "--disk", str(tmp_path)])
    assert len(measured) == 1
    assert load_profile(cache_path()).disk == DiskProfile(str(tmp_path), 2e9)


def test_json_is_the_profile(tmp_path, capsys):
    path = tmp_path / "to" / "p.json"
    assert main(["profile", "--json", str(path)]) == 0
    assert load_profile(path) == load_profile(cache_path())
    assert f"wrote {path}" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path, capsys):
    (tmp_path / "cache").write_text("")
    assert main(["profile"]) == 0
    found = capsys.readouterr()
    assert "the profile is not kept: cannot write" in found.err
    assert "Decode attention on the CPU" in found.out


def test_an_interrupt_leaves_no_file(monkeypatch, tmp_path, capsys):
    def interrupted(*_: object, **__: object) -> Profile:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lightning.profiling.measure.measure", interrupted)
    assert main(["profile", "--json", str(tmp_path / "p.json")]) == 130
    assert not list(tmp_path.iterdir())
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model", "mixtral-8x8b"],
            "'mixtral-8x8b' is neither a path nor a known model; did you mean mixtral-8x7b",
        ),
        (["--json", "/proc/nothing/p.json"], "cannot write /proc/nothing/p.json"),
    ],
)
def test_errors_say_the_value_and_the_remedy(argv, message, capsys):
    assert main(["profile", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_size_that_is_none_is_refused_by_its_flag(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["profile", "--gpu-memory", "much"])
    assert "--gpu-memory: 'much' is not a size; write 16GiB" in capsys.readouterr().err


def test_help_tells_what_is_measured_and_where_it_goes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["profile", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "less than a minute",
        "cache directory",
        "--refresh",
        "--disk",
        "--json",
        "--gpu-memory",
        "--model",
    ):
        assert words in text


@pytest.mark.parametrize("profile", [PROFILE, CPU_PROFILE], ids=["gpu", "cpu"])
def test_tables_have_every_number_under_a_header(profile, capsys):
    found = list(grids(profile))
    for grid in found:
        assert {len(row) for row in grid.rows} == {len(grid.header)}, grid.title
        lines = to_text(grid).splitlines()
        assert len({len(line) for line in lines[1:]}) == 1
    text = "\n".join(to_text(grid) for grid in found)
    assert ("Prefill attention" in text) == (profile.gpu is not None)
    for words in ("Host: A CPU, 16 cores, attention by avx512", "memory read", "disk of /data", "2.5 GB/s"):
        assert words in text


def test_without_rich_the_tables_are_plain(monkeypatch, capsys):
    import builtins

    true = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return true(name, *args, **kwargs)

    save_profile(PROFILE, cache_path())
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert main(["profile"]) == 0
    assert to_text(next(iter(grids(PROFILE)))) in capsys.readouterr().out


def test_the_file_is_what_json_readers_expect(tmp_path):
    main(["profile", "--json", str(tmp_path / "p.json")])
    values = json.loads((tmp_path / "p.json").read_text())
    assert values["version"] == 1
    assert values["gpu"]["link"]["h2d"]["sizes"] == [2**20, 2**26]


def test_without_a_terminal_each_part_is_a_line_that_says_when_it_begins(monkeypatch, capsys):
    now = iter([10.0, 10.25, 72.5])
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    with profile.show_parts() as report:
        report("host memory", 0, 22)
        report("sweeps", 1, 22)
    assert capsys.readouterr().err == "  0.2 s 1/22 host memory\n 62.5 s 2/22 sweeps\n"
