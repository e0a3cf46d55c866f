"""A policy that runs, from sizes alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.memory import HEAD_ROWS, memory_use
from moe_lightning.pipeline.baselines import SCHEDULES
from moe_lightning.pipeline.shape import layers_on_cpu
from moe_lightning.policy import Policy
from moe_lightning.units import GIB, MIB, format_bytes

_BLOCK_SIZE = 16
_WORKSPACE = GIB  # activations, logits, one checkpoint tensor per reader
_MAX_SEQS = 256
_MAX_STREAMED_SEQS = 2048  # a pass costs what its copies cost, however many ride on it
_PREFILL_TOKENS = 2048
_STREAMED_PREFILL_TOKENS = 8192  # so that a batch fills up within few passes
_CHUNK_TOKENS = 512
_STREAMED_CHUNK_TOKENS = 2048
PAGE_BYTES = 32 * MIB  # enough to saturate a link, small enough to let hidden states pass between
# What the last of so many layers does.
_EVERY = {
    "kv_every": "keeps its KV on the GPU",
    "cpu_every": "has its experts computed on the CPU",
}
_RING_LAYERS = 1.5  # pages of the next layer arrive while the experts of this one still read theirs


@dataclass(frozen=True)
class Memory:
    """Bytes that a policy may use; `gpu` is None where the dense work runs on the CPU over host memory."""

    host: int
    gpu: int | None


def default_policy(
    spec: ModelSpec,
    dtype_bytes: int,
    memory: Memory,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
) -> tuple[Policy, int]:
    """A policy that fits, and the longest sequence it can run.

    Raises:
        NoFeasiblePolicyError: the weights or one sequence do not fit.
        ConfigError: max_model_len is more than the model was made for.
    """
    length = min(max_model_len or spec.max_position, spec.max_position)
    if max_model_len and max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the model's {spec.max_position} positions; lower it"
        )
    num_seqs = max_num_seqs or (_MAX_SEQS if memory.gpu is None else _MAX_STREAMED_SEQS)
    policy = _with_pages(spec, dtype_bytes, memory, _draft(spec, dtype_bytes, memory, num_seqs, length))
    on_host = (
        _all_bytes(spec, dtype_bytes)
        if memory.gpu is None
        else memory_use(spec, dtype_bytes, policy).host.total
    )
    num_blocks = _num_blocks(spec, dtype_bytes, memory.host - on_host - _WORKSPACE, num_seqs, length)
    capacity = num_blocks * _BLOCK_SIZE
    if capacity < (max_model_len or min(length, _BLOCK_SIZE)):
        raise NoFeasiblePolicyError(
            f"{spec.architecture} needs {format_bytes(on_host + _WORKSPACE)} of host memory and KV for one "
            f"sequence of {length} tokens ({format_bytes(spec.kv_bytes_per_token(dtype_bytes) * length)}); "
            f"{format_bytes(memory.host)} is there",
            "Lower max_model_len or free host memory",
        )
    length = min(length, capacity)
    rows = max(_PREFILL_TOKENS if memory.gpu is None else _STREAMED_PREFILL_TOKENS, length)
    return replace(policy, num_blocks=num_blocks, prefill_tokens=rows), length


def _draft(spec: ModelSpec, dtype_bytes: int, memory: Memory, num_seqs: int, length: int) -> Policy:
    """The policy without places for experts and KV."""
    is_cpu = memory.gpu is None
    return Policy(
        max_num_seqs=num_seqs,
        micro_batch_size=max(1, min(HEAD_ROWS, num_seqs // 4)),
        group_size=2**16,  # one sweep over the experts for the whole pass
        look_ahead=8,  # no attention waits for what the GPU does with an earlier one
        prefill_tokens=max(_PREFILL_TOKENS if is_cpu else _STREAMED_PREFILL_TOKENS, length),
        chunk_tokens=_CHUNK_TOKENS if is_cpu else _STREAMED_CHUNK_TOKENS,
        pages_per_expert=1 if is_cpu else pages_per_expert(spec, dtype_bytes),
        resident_pages=(0,) * spec.num_layers,
        num_frames=0,
        num_blocks=0,
        block_size=_BLOCK_SIZE,
    )


def load_policy(path: str, base: Policy) -> Policy:
    """The policy with values of a JSON file in place of some of its own.

    Raises:
        ConfigError: the file is missing, no JSON object, or has values that are no policy's.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"policy file {path} cannot be read: {error}; give a JSON file") from error
    if not isinstance(values, dict):
        raise ConfigError(f'policy file {path} holds no JSON object; give one, such as {{"num_blocks": 512}}')
    try:
        return override(base, values)
    except ConfigError as error:
        raise ConfigError(f"policy file {path}: {error}") from error


def override(base: Policy, values: dict[str, Any]) -> Policy:
    """The policy with some values replaced.

    Raises:
        ConfigError: a name or a value is no policy's.
    """
    for name, value in values.items():
        _check_value(base, name, value)
    if "resident_pages" in values:
        return replace(base, **{**values, "resident_pages": tuple(values["resident_pages"])})
    changed = replace(base, **values)
    on_cpu = layers_on_cpu(changed)
    resident = tuple(0 if layer in on_cpu else count for layer, count in enumerate(base.resident_pages))
    return replace(changed, resident_pages=resident)


def _check_value(base: Policy, name: str, value: object) -> None:
    known = {f.name: getattr(base, f.name) for f in fields(Policy)}
    if name not in known:
        raise ConfigError(f"a policy has no {name!r}; it has {', '.join(known)}")
    if name == "schedule":
        if not isinstance(value, str) or value not in SCHEDULES:
            raise ConfigError(f"schedule={value!r} is not known; choose one of {', '.join(SCHEDULES)}")
    elif name == "resident_pages":
        layers = len(base.resident_pages)
        if (
            not isinstance(value, list | tuple)
            or len(value) != layers
            or not all(_is_int(v, 0) for v in value)
        ):
            raise ConfigError(
                f"resident_pages={value!r}: give a list of {layers} integers, one for each layer"
            )
    elif isinstance(getattr(base, name), bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: give true or false")
    elif name in _EVERY and isinstance(value, int) and value > len(base.resident_pages):
        raise ConfigError(
            f"{name}={value}: the last of so many layers {_EVERY[name]}, and there are "
            f"{len(base.resident_pages)}; give no more, or 0"
        )
    else:
        least = 0 if name in ("look_ahead", "num_frames", *_EVERY) else 1
        if not _is_int(value, least):
            raise ConfigError(f"{name}={value!r}: give an integer of {least} or more")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _with_pages(spec: ModelSpec, dtype_bytes: int, memory: Memory, draft: Policy) -> Policy:
    """The policy with resident pages of each layer and a ring."""
    layers, per_layer = spec.num_layers, spec.experts.num_experts * draft.pages_per_expert
    if memory.gpu is None:
        return replace(draft, resident_pages=(per_layer,) * layers)
    fixed = memory_use(spec, dtype_bytes, draft).gpu_bytes
    page_bytes = _expert_bytes(spec, dtype_bytes) // draft.pages_per_expert
    frames = (memory.gpu - fixed) // page_bytes
    if frames >= per_layer * layers:
        return replace(draft, resident_pages=(per_layer,) * layers)
    if frames < per_layer:
        raise NoFeasiblePolicyError(
            f"{spec.architecture} needs {format_bytes(fixed + per_layer * page_bytes)} of GPU memory to stream one "
            f"layer at a time; {format_bytes(max(0, memory.gpu))} is allowed",
            "Raise gpu_memory or lower max_num_seqs",
        )
    # resident * layers + ring, with a ring of _RING_LAYERS * (per_layer - resident), fills all frames.
    resident = int((frames - _RING_LAYERS * per_layer) / max(layers - _RING_LAYERS, 1))
    resident = min(max(resident, 0), per_layer)
    return replace(draft, resident_pages=(resident,) * layers, num_frames=frames - resident * layers)


def pages_per_expert(spec: ModelSpec, dtype_bytes: int, page_bytes: int = PAGE_BYTES) -> int:
    """The fewest equal slices of an expert that are no larger than a page should be."""
    intermediate_size, expert_bytes = spec.experts.intermediate_size, _expert_bytes(spec, dtype_bytes)
    for pages in range(1, intermediate_size + 1):
        if intermediate_size % pages == 0 and expert_bytes // pages <= page_bytes:
            return pages
    return intermediate_size


def _num_blocks(spec: ModelSpec, dtype_bytes: int, free: int, num_seqs: int, length: int) -> int:
    wanted = num_seqs * -(-length // _BLOCK_SIZE)
    return max(0, min(wanted, free // (spec.kv_bytes_per_token(dtype_bytes) * _BLOCK_SIZE)))


def _expert_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    return 3 * spec.hidden_size * spec.experts.intermediate_size * dtype_bytes


def _all_bytes(spec: ModelSpec, dtype_bytes: int) -> int:
    return spec.num_parameters * dtype_bytes
