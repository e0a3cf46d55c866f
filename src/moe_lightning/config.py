"""What a user may set. Command-line flags, environment variables and `LLM` keywords all derive from here."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from numbers import Integral
from typing import Any

from moe_lightning.errors import ConfigError
from moe_lightning.units import parse_bytes, parse_count

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
EXECUTORS = ("auto", "serial", "threads")
LOAD_FORMATS = ("auto", "dummy")
PACKINGS = ("auto", "off")


def parse_optional(text: str) -> str | None:
    """A text, or None for ``none``: how a flag says what a keyword says by leaving it out."""
    return None if text.lower() == "none" else text


def setting(default: Any, help_text: str, **extra: Any) -> Any:
    """A field with what flags and environment variables need to know of it."""
    return field(default=default, metadata={"help": help_text, **extra})


def _later(default: Any, help_text: str, **extra: Any) -> Any:
    """A setting that only takes its default so far; it is there so that what other engines take is understood."""
    return setting(default, f"{help_text}; only {default or 'none'} so far", is_fixed=True, **extra)


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; none but `model` is needed.

    Raises:
        ConfigError: a value cannot be used; the message names the setting and the remedy.
    """

    model: str = setting(
        "", "checkpoint directory: config.json, safetensors, tokenizer", aliases=("--model-path",)
    )
    tokenizer: str | None = setting(None, "tokenizer directory, if it is not the checkpoint's own")
    dtype: str = setting("auto", "precision of weights and KV; auto takes the checkpoint's", choices=DTYPES)
    tensor_parallel_size: int = _later(
        1, "GPUs that share each layer", parse=parse_count, aliases=("-tp", "--tp-size")
    )
    quantization: str | None = _later(
        None, "how weights are compressed", parse=parse_optional, aliases=("-q",), metavar="METHOD"
    )
    kv_cache_dtype: str = _later(
        "auto", "precision of the KV cache; auto takes that of dtype", metavar="TYPE"
    )
    max_model_len: int | None = setting(
        None, "longest prompt plus answer in tokens, such as 16k; default: what the model and the memory allow",
        parse=parse_count,
    )  # fmt: skip
    max_num_seqs: int | None = setting(
        None,
        "sequences that decode at once, if memory holds them; default: as planned; on a CPU alone 256",
        parse=parse_count,
    )
    gpu_memory: int | None = setting(
        None,
        "GPU memory that the process may use, such as 16GiB; default: nearly all that is free. On device cpu, the "
        "size of a GPU that the CPU plays; default: none",
        parse=parse_bytes,
    )
    host_memory: int | None = setting(
        None,
        "host memory for weights and KV, such as 100GiB; default: 97 % of what is free, 80 % on device cpu",
        parse=parse_bytes,
    )
    device: str = setting(
        "auto", "where the dense work runs; auto takes cuda where torch sees a GPU, else cpu", choices=DEVICES
    )
    executor: str = setting(
        "auto",
        "how the lanes run: serial is one after the other, threads at once; auto: at once on cuda, serial on cpu",
        choices=EXECUTORS,
    )
    load_format: str = setting(
        "auto",
        "auto reads safetensors; dummy makes random weights of the model's shapes",
        choices=LOAD_FORMATS,
    )
    packing: str = setting(
        "auto",
        "auto keeps bfloat16 experts that stream to a GPU in three quarters of their bytes, exactly; off never",
        choices=PACKINGS,
    )
    policy: str | None = setting(None, "JSON file with policy values that replace the default ones")
    seed: int = setting(0, "seed of all random draws that have none of their own", parse=parse_count)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, parse = getattr(self, f.name), f.metadata.get("parse")
            if parse and isinstance(value, str):
                value = parse(value)
            if parse in (parse_bytes, parse_count):
                value = _integer(f, value)
            _check_value(f, value)
            object.__setattr__(self, f.name, value)
        for name in ("max_model_len", "max_num_seqs", "gpu_memory", "host_memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"{name}={value} leaves nothing to run in; give a positive value or leave it out"
                )


def _integer(setting: Field[Any], value: Any) -> int | None:
    if value is None and setting.default is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        example = "16GiB" if setting.metadata["parse"] is parse_bytes else "16k"
        raise ConfigError(f"{setting.name}={value!r}: give an integer, or a text such as {example!r}")
    return int(value)


def _check_value(setting: Field[Any], value: Any) -> None:
    choices = setting.metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{setting.name}={value!r} is not known; choose one of {', '.join(choices)}")
    if setting.metadata.get("is_fixed") and value != setting.default:
        raise ConfigError(
            f"{setting.name}={value!r} is not supported yet; leave it out: only {setting.default!r} is"
        )
