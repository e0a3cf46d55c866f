"""What a user may set. Command-line flags, environment variables and `LLM` keywords all derive from here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.units import parse_bytes, parse_count

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
EXECUTORS = ("auto", "serial", "threads")
LOAD_FORMATS = ("auto", "dummy")


def _setting(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; none but `model` is needed.

    Raises:
        ConfigError: a value cannot be used; the message names the setting and the remedy.
    """

    model: str = _setting(
        "", "checkpoint directory: config.json, safetensors, tokenizer", aliases=("--model-path",)
    )
    tokenizer: str | None = _setting(None, "tokenizer directory, if it is not the checkpoint's own")
    dtype: str = _setting("auto", "precision of weights and KV; auto takes the checkpoint's", choices=DTYPES)
    max_model_len: int | None = _setting(
        None, "longest prompt plus answer in tokens, such as 16k; default: what the model and the memory allow",
        parse=parse_count,
    )  # fmt: skip
    max_num_seqs: int | None = _setting(
        None, "sequences that decode at once; default: chosen by the planner", parse=parse_count
    )
    gpu_memory: int | None = _setting(None, "GPU memory to use at most, such as 16GiB", parse=parse_bytes)
    host_memory: int | None = _setting(
        None,
        "host memory for weights and KV, such as 100GiB; default: 80 % of what is free",
        parse=parse_bytes,
    )
    device: str = _setting(
        "auto", "where the dense work runs; auto: cuda where there is one", choices=DEVICES
    )
    executor: str = _setting(
        "auto", "how lanes run: one after the other, or at once on threads", choices=EXECUTORS
    )
    load_format: str = _setting(
        "auto",
        "auto reads safetensors; dummy makes random weights of the model's shapes",
        choices=LOAD_FORMATS,
    )
    policy: str | None = _setting(None, "JSON file with policy values that replace the planner's")
    seed: int = _setting(0, "seed of all random draws that have none of their own", parse=parse_count)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigError(f"{f.name}={value!r} is not known; choose one of {', '.join(choices)}")
            parse = f.metadata.get("parse")
            if parse and isinstance(value, str):
                object.__setattr__(self, f.name, parse(value))
        for name in ("max_model_len", "max_num_seqs", "gpu_memory", "host_memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"{name}={value} leaves nothing to run in; give a positive value or leave it out"
                )
