"""The profile of this machine on disk: one file, used as long as the machine is the same."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moe_lightning.errors import ConfigError
from moe_lightning.hardware.host import cpu_name, total_memory
from moe_lightning.hardware.machine import Machine, changes
from moe_lightning.hardware.profile import REMEDY, Profile


def cache_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this machine's profile lies: in the user's cache directory, by host name, since homes are shared."""
    base = environment.get("XDG_CACHE_HOME", "")
    # The specification tells to ignore a relative path.
    directory = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return directory / "moe-lightning" / f"profile-{platform.node() or 'localhost'}.json"


def read_cache(path: Path, machine: Machine) -> tuple[Profile | None, str]:
    """The cached profile, or None with the reason why it is not used."""
    if not path.exists():
        return None, f"no profile at {path}"
    try:
        profile = load_profile(path)
    except ConfigError as error:
        return None, str(error)
    different = changes(profile.machine, machine)
    if different:
        return None, f"{path} is of another machine or set-up: {'; '.join(different)}"
    if not profile.is_complete:
        return None, f"{path} is of an earlier version, which measured less"
    return profile, ""


def changes_here(profile: Profile) -> list[str]:
    """What shows, without torch, that a profile is not of the machine that this runs on."""
    here = replace(
        profile.machine,
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        host_memory_bytes=total_memory(),
    )
    return changes(profile.machine, here)


def load_profile(path: Path) -> Profile:
    """The profile in a file, of whatever machine.

    Raises:
        ConfigError: the file cannot be read or holds no profile of this version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); {REMEDY}") from error
    return Profile.from_json(values, str(path))


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all.

    Raises:
        ConfigError: the path cannot be written.
    """
    text = json.dumps(profile.to_json(), indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another path") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # after an interrupt too
        temporary.unlink(missing_ok=True)
