"""When a cached profile is used, and that no half of one is ever there."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.machine import GpuIdentity, Machine
from moe_lightning.hardware.profile_cache import cache_path, load_profile, read_cache, save_profile
from profiles import CPU_PROFILE, GPU, MACHINE, PROFILE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    saved = tmp_path / "new" / "profile.json"
    save_profile(PROFILE, saved)
    return saved


def other(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value + "x"


CHANGES = {
    **{
        f.name: replace(MACHINE, **{f.name: other(getattr(MACHINE, f.name))})
        for f in fields(Machine)
        if f.name != "gpu"
    },
    **{
        f"gpu {f.name}": replace(MACHINE, gpu=replace(GPU, **{f.name: other(getattr(GPU, f.name))}))
        for f in fields(GpuIdentity)
    },
}  # fmt: skip


def test_the_same_machine_gets_what_was_saved(path: Path) -> None:
    assert read_cache(path, MACHINE) == (PROFILE, "")
    assert load_profile(path) == PROFILE


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_of_the_machine_makes_the_cache_useless_and_is_named(name: str, path: Path) -> None:
    profile, reason = read_cache(path, CHANGES[name])
    assert profile is None
    assert reason.startswith(f"{path} is of another machine or set-up: {name.replace('_', ' ')} was ")
    assert reason.count(" was ") == 1


def test_a_gpu_that_is_gone_or_new_is_a_change(path: Path) -> None:
    assert "gpu name was A GPU and is none" in read_cache(path, replace(MACHINE, gpu=None))[1]
    save_profile(CPU_PROFILE, path)
    assert "gpu name was none and is A GPU" in read_cache(path, MACHINE)[1]


def test_one_that_an_earlier_version_made_is_measured_again_but_may_be_handed_in(path: Path) -> None:
    assert PROFILE.gpu
    prefill = tuple(replace(p, store=None) for p in PROFILE.gpu.prefill)
    gpu = replace(PROFILE.gpu, prefill=prefill, small=())
    values = json.loads(json.dumps(replace(PROFILE, gpu=gpu).to_json()))
    del values["gpu"]["small"]
    for attention in values["gpu"]["prefill"]:
        del attention["store"]
    for experts in values["gpu"]["experts"]:
        del experts["parts"]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert read_cache(path, MACHINE) == (None, f"{path} is of an earlier version, which measured less")
    small = tuple(replace(found, is_whole=False) for found in PROFILE.gpu.small)
    save_profile(replace(PROFILE, gpu=replace(PROFILE.gpu, small=small)), path.with_name("kernels alone"))
    assert read_cache(path.with_name("kernels alone"), MACHINE)[0] is None
    assert load_profile(path).gpu == replace(gpu, experts=tuple(replace(e, parts=()) for e in gpu.experts))


def test_without_a_file_there_is_nothing_to_use(tmp_path: Path) -> None:
    assert read_cache(tmp_path / "none.json", MACHINE) == (None, f"no profile at {tmp_path / 'none.json'}")


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', "[]", '{"version": 0}', "[" * 10**5, "NaN"])
def test_a_damaged_or_foreign_file_is_no_crash_and_no_profile(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    profile, reason = read_cache(path, MACHINE)
    assert profile is None
    assert str(path) in reason
    with pytest.raises(ConfigError, match="give a file that `moe-lightning profile --json PATH`"):
        load_profile(path)


def test_a_file_that_is_handed_in_may_be_of_any_machine_but_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.json: No such file"):
        load_profile(tmp_path / "absent.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_whatever_interrupts_writing_the_old_file_stays_and_no_other(
    error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        save_profile(CPU_PROFILE, path)
    assert load_profile(path) == PROFILE
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/profile\.json: .*; choose another path"):
        save_profile(PROFILE, tmp_path / "file" / "profile.json")


def test_files_are_plain_json_that_others_may_read(path: Path) -> None:
    assert json.loads(path.read_text())["machine"]["cpu"] == "A CPU"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_cache_is_where_the_user_has_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"profile-{os.uname().nodename}.json"
    assert cache_path({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "moe-lightning" / name
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = tmp_path / "home" / ".cache" / "moe-lightning" / name
    assert (
        cache_path({})
        == cache_path({"XDG_CACHE_HOME": ""})
        == cache_path({"XDG_CACHE_HOME": "a/b"})
        == expected
    )
