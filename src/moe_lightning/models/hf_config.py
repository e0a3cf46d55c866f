"""A checkpoint's config.json, read so that nothing in it is guessed or overlooked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lightning.errors import ConfigError, UnsupportedModelError

_MISSING = object()


@dataclass(frozen=True)
class HFConfig:
    """The values of a config.json; `source` names it in messages. `generation` is generation_config.json.

    Getters raise `UnsupportedModelError` with key and value when a value is missing or of another type.
    """

    values: dict[str, Any]
    source: str
    generation: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> HFConfig:
        """The config in a checkpoint directory, or the config file itself.

        Raises:
            ConfigError: there is none, or it is no JSON object.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"{path} is no model: it has no config.json; give a checkpoint directory")
        generation = file.parent / "generation_config.json"
        return cls(_read(file), str(file), _read(generation) if generation.is_file() else {})

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """An integer."""
        return self._get(key, int, default)  # type: ignore[no-any-return]

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number."""
        return float(self._get(key, (int, float), default))

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        return self._get(key, bool, default)  # type: ignore[no-any-return]

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A text."""
        return self._get(key, str, default)  # type: ignore[no-any-return]

    def optional_int(self, key: str) -> int | None:
        """An integer, or None if it is null or missing."""
        return self.integer(key) if self.has(key) else None

    def require(self, key: str, *allowed: Any) -> None:
        """Make sure that a value the model code relies on is one of those it knows; the first if missing."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            raise UnsupportedModelError(f"{self.source}: {key}={value!r} is not supported; only {known} is")

    @property
    def architecture(self) -> str:
        """The first of `architectures`."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise UnsupportedModelError(f"{self.source}: architectures={names!r} names no model class")
        return names[0]

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters as transformers 5 writes them, whichever version wrote the file."""
        new = self.values.get("rope_parameters")
        if isinstance(new, dict):
            return new
        scaling = self.values.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise UnsupportedModelError(f"{self.source}: rope_scaling={scaling!r} is no object")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        return {**scaling, "rope_type": kind, "rope_theta": self.values.get("rope_theta", 10000.0)}

    @property
    def dtype(self) -> str:
        """What the weights are stored in; float32 if the file does not say."""
        return str(self.values.get("dtype") or self.values.get("torch_dtype") or "float32")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; generation_config.json knows better than config.json."""
        value = self.generation.get("eos_token_id", self.values.get("eos_token_id"))
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in ids):
            raise UnsupportedModelError(
                f"{self.source}: eos_token_id={value!r} is no token id or list of them"
            )
        return tuple(ids)

    def _get(self, key: str, kind: Any, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise UnsupportedModelError(f"{self.source}: {key} is missing; is the file complete?")
            return default
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind):
            wanted = "number" if isinstance(kind, tuple) else kind.__name__
            raise UnsupportedModelError(f"{self.source}: {key}={value!r} should be of type {wanted}")
        return value


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no JSON object; download it again")
    return values
