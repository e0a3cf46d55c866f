"""A checkpoint's config.json, read so that nothing in it is guessed or overlooked."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lightning.errors import ConfigError, UnsupportedModelError

DTYPES = ("bfloat16", "float16", "float32")
_MISSING: Any = object()


@dataclass(frozen=True)
class HFConfig:
    """The values of a config.json; a key that is null counts as missing, but for `optional_int`.

    Getters raise `UnsupportedModelError` with key and value when a value is missing, of another type or out of
    range.

    Attributes:
        values: the file's content.
        source: where it came from, for messages.
        generation: content of the generation_config.json beside it, if there is one.
    """

    values: dict[str, Any]
    source: str
    generation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> HFConfig:
        """The config in a checkpoint directory, or the config file itself.

        Raises:
            ConfigError: there is none, or it is no JSON object.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        # Another suffix is weights, most likely: reading gigabytes to find no JSON helps nobody.
        if not file.is_file() or file.suffix != ".json":
            raise ConfigError(f"{path} is no model: it has no config.json; give a checkpoint directory")
        generation = file.parent / "generation_config.json"
        return cls(_read(file), str(file), _read(generation) if generation.is_file() else {})

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int = _MISSING, low: int = 1) -> int:
        """An integer of `low` or more."""
        value = self._get(key, default)
        if not _is_int(value) or value < low:
            raise self._wrong(key, value, f"an integer of {low} or more")
        return int(value)

    def number(self, key: str, default: float = _MISSING) -> float:
        """A positive, finite number."""
        value = self._get(key, default)
        is_number = _is_int(value) or isinstance(value, float)
        if not is_number or not 0 < value <= sys.float_info.max:  # nan compares false
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = _MISSING) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str = _MISSING) -> str:
        """A text."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def optional_int(self, key: str, missing: int | None = None) -> int | None:
        """A positive integer, None where the file says null, `missing` where it says nothing."""
        if key not in self.values:
            return missing
        return self.integer(key) if self.has(key) else None

    def section(self, key: str) -> HFConfig | None:
        """A nested object with getters of its own; None if it is empty, null or missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return HFConfig(value, f"{self.source}: {key}") if value else None

    def require(self, key: str, expected: Any) -> None:
        """Make sure that a value the model code relies on is the one it knows, null or missing."""
        value = self.values.get(key)
        if value is not None and value != expected:
            raise self._wrong(key, value, "null" if expected is None else repr(expected))

    @property
    def architecture(self) -> str:
        """The first of `architectures`."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise self._wrong("architectures", names, "a list such as ['MixtralForCausalLM']")
        return names[0]

    @property
    def dtype(self) -> str:
        """What the weights are stored in, one of `DTYPES`; float32 if the file does not say."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        name = self.text(key, "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise self._wrong(key, name, f"one of {', '.join(DTYPES)}")
        return name

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text, if there is one."""
        return self.integer("bos_token_id", low=0) if self.has("bos_token_id") else None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer; generation_config.json knows better than config.json, unless it is silent."""
        value = self.generation.get("eos_token_id")
        if value is None:
            value = self.values.get("eos_token_id")
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(_is_int(token) and token >= 0 for token in ids):
            raise self._wrong("eos_token_id", value, "a token id or a list of them")
        return tuple(ids)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise UnsupportedModelError(
                f"{self.source}: {key} is missing; take the config.json that came with the weights"
            )
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> UnsupportedModelError:
        text = repr(value)
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        return UnsupportedModelError(
            f"{self.source}: {key}={shown} is not supported; only {wanted} is. "
            "Use a checkpoint that has it, or see docs/adding-a-model.md"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no JSON object; download it again")
    return values
