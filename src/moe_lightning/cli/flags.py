"""Flags and environment variables of the engine's settings."""

from __future__ import annotations

import os
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, NoReturn, TypeVar

from moe_lightning.config import EngineConfig
from moe_lightning.errors import ConfigError
from moe_lightning.units import format_bytes, parse_bytes, parse_count

_T = TypeVar("_T")
ENVIRONMENT_PREFIX = "MOE_LIGHTNING_"


def environment_name(setting: str) -> str:
    """The environment variable that stands in for a flag that is not given."""
    return ENVIRONMENT_PREFIX + setting.upper()


def add_engine_flags(parser: ArgumentParser) -> None:
    """Add a flag for each field of `EngineConfig`."""
    group = add_settings(parser, EngineConfig, "engine", "max_num_seqs")
    group.add_argument("--trust-remote-code", nargs=0, action=_RefuseRemoteCode, help="refused")


def add_settings(parser: ArgumentParser, settings: type[Any], title: str, example: str) -> Any:
    """Add a flag for each field of a dataclass of settings; the group of them. `example` is one of the flags."""
    group = parser.add_argument_group(
        title, f"each also as an environment variable, such as {environment_name(example)}"
    )
    for setting in _public(settings):
        # A default of None tells "not given" from "given the default": the environment comes in between.
        group.add_argument(
            "--" + _flag(setting).replace("_", "-"),
            *setting.metadata.get("aliases", ()),
            dest=_flag(setting),
            type=_argument_type(setting),
            metavar=_metavar(setting),
            help=_help(setting),
        )
    return group


def engine_config(args: Namespace, environment: Mapping[str, str] | None = None) -> EngineConfig:
    """Settings from the flags, else from the environment, else the defaults.

    Raises:
        ConfigError: a value cannot be used, or there is no model.
    """
    config: EngineConfig = settings_of(EngineConfig, args, environment)
    if not config.model:
        raise ConfigError(f"no model is given; give --model DIR or set {environment_name('model')}")
    return config


def settings_of(settings: type[_T], args: Namespace, environment: Mapping[str, str] | None = None) -> _T:
    """A dataclass of settings from the flags, else from the environment, else the defaults.

    Raises:
        ConfigError: a value cannot be used.
    """
    environment = os.environ if environment is None else environment
    values = {}
    for setting in _public(settings):
        name = environment_name(_flag(setting))
        if getattr(args, _flag(setting)) is not None:
            values[setting.name] = getattr(args, _flag(setting))
        elif environment.get(name):
            try:
                values[setting.name] = _parse(setting, environment[name])
            except ConfigError as e:
                raise ConfigError(f"environment variable {name}: {e}") from e
    return settings(**values)


def add_count(parser: ArgumentParser, flag: str, text: str, default: int | None = None) -> None:
    """Add a flag for a count of at least 1, with its help."""
    parser.add_argument(flag, type=positive_count, default=default, metavar="N", help=text)


def positive_count(text: str) -> int:
    """A count of at least 1, as an argparse type."""
    try:
        count = parse_count(text)
    except ConfigError as e:
        raise ArgumentTypeError(str(e)) from e
    if count < 1:
        raise ArgumentTypeError(f"{text!r} is too small; give at least 1")
    return count


def _public(settings: type[Any]) -> list[Field[Any]]:
    """The fields that users may set: those that say what they are for."""
    return [setting for setting in fields(settings) if "help" in setting.metadata]


def _flag(setting: Field[Any]) -> str:
    """What users call a field, if that is not its name."""
    return str(setting.metadata.get("flag", setting.name))


def _parse(setting: Field[Any], text: str) -> Any:
    choices = setting.metadata.get("choices")
    if choices and text not in choices:
        raise ConfigError(f"{text!r} is not known; choose one of {', '.join(choices)}")
    parse = setting.metadata.get("parse")
    return parse(text) if parse else text


def _argument_type(setting: Field[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return _parse(setting, text)
        except ConfigError as e:
            raise ArgumentTypeError(str(e)) from e

    return parse


def _metavar(setting: Field[Any]) -> str:
    if "metavar" in setting.metadata:
        return str(setting.metadata["metavar"])
    if choices := setting.metadata.get("choices"):
        return "{" + ",".join(choices) + "}"
    parse = setting.metadata.get("parse")
    return "SIZE" if parse is parse_bytes else "N" if parse is parse_count else "PATH"


def _help(setting: Field[Any]) -> str:
    text = str(setting.metadata["help"]).replace("%", "%%")
    if setting.default in (None, "", ()):
        return text
    default: Any = setting.default
    return f"{text} (default: {format_bytes(default) if _metavar(setting) == 'SIZE' else default})"


class _RefuseRemoteCode(Action):
    """Says why code in a checkpoint is not run."""

    def __call__(self, parser: ArgumentParser, *_: object) -> NoReturn:
        parser.error("--trust-remote-code: code that comes with a checkpoint is never run; remove the flag")
