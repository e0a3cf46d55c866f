"""What an engine will run: model, device, precision and policy, before any memory is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_lightning.config import EngineConfig
from moe_lightning.engine.gpu_budget import cap_gpu_memory
from moe_lightning.engine.identity import this_machine
from moe_lightning.errors import ConfigError
from moe_lightning.hardware.host import available_memory
from moe_lightning.hardware.presets import preset, preset_of_card
from moe_lightning.hardware.profile_cache import cache_path, read_cache
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.memory import checkpoint
from moe_lightning.memory.layout import PageLayout, Placement
from moe_lightning.memory.packable import is_packable
from moe_lightning.models import registry
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import Memory, default_policy, load_policy
from moe_lightning.perf.outlook import Prediction
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates, Rates
from moe_lightning.perf.workload import Workload
from moe_lightning.pipeline.shape import check_ring, layers_on_cpu
from moe_lightning.policy import Policy
from moe_lightning.units import GIB


@dataclass(frozen=True)
class Plan:
    """How a model will run; `max_model_len` is the longest sequence that the policy can hold.

    `prediction` says what the policy should reach where it was searched for, by `rates` and for `workload`.
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    policy: Policy
    max_model_len: int
    prediction: Prediction | None = None
    rates: Rates | None = None
    workload: Workload | None = None


def make_plan(
    config: EngineConfig,
    policy: Policy | None = None,
    workload: Workload | None = None,
    longest: int | None = None,
    spec: ModelSpec | None = None,
) -> Plan:
    """The plan of an engine's settings; no weights are read, and the model need not be downloaded.

    Args:
        config: the settings.
        policy: instead of the one that the settings lead to.
        workload: what will be computed: on a GPU the policy is the one that should be fastest for it.
        longest: tokens that no request of it exceeds; default: those of the workload's longest.
        spec: instead of the one that `config.model` names.

    Raises:
        ConfigError, UnsupportedModelError, NoFeasiblePolicyError: the model cannot run as asked.
    """
    spec = spec or registry.resolve(config.model)
    device, dtype = _device(config), _dtype(config.dtype, spec)
    gpu = cap_gpu_memory(device, config.gpu_memory) if device.type == "cuda" else config.gpu_memory
    if policy is not None:
        _check_pages(policy, spec, dtype)
        return Plan(spec, device, dtype, policy, _longest(config, spec, policy))
    memory = Memory(config.host_memory or usable_host_memory(device), gpu)
    prediction = rates = None
    if workload is not None and device.type == "cuda":
        rates = measured_rates(device, dtype)
        planned = search(
            spec, str(dtype).removeprefix("torch."), memory, rates, workload,
            max_model_len=config.max_model_len or _within(longest, spec), max_num_seqs=config.max_num_seqs,
            packs=dtype is torch.bfloat16 and _packs(config, spec),
        )  # fmt: skip
        policy, prediction = planned.policy, planned.prediction
        length = _longest(config, spec, policy)
    else:
        policy, length = default_policy(
            spec, dtype.itemsize, memory, config.max_model_len, config.max_num_seqs
        )
    if config.policy:
        policy = load_policy(config.policy, policy)
        length = min(length, policy.prefill_tokens, policy.num_blocks * policy.block_size)
        _check_pages(policy, spec, dtype)
    return Plan(spec, device, dtype, policy, length, prediction, rates, workload)


def _packs(config: EngineConfig, spec: ModelSpec) -> bool:
    """Whether experts may be packed: by the settings, and by some of the checkpoint's."""
    if config.packing == "off":
        return False
    if config.load_format == "dummy" or not Path(config.model).is_dir():
        return True
    return is_packable(checkpoint.open_model(Path(config.model), spec))


def _longest(config: EngineConfig, spec: ModelSpec, policy: Policy) -> int:
    """Tokens of the longest request that may come and that the policy runs."""
    most = config.max_model_len or spec.max_position
    return min(most, policy.prefill_tokens, policy.num_blocks * policy.block_size)


def _within(length: int | None, spec: ModelSpec) -> int | None:
    return None if length is None else min(length, spec.max_position)


def usable_host_memory(device: torch.device) -> int:
    """Bytes for weights and KV, of which a job that streams turns each GiB into speed."""
    free = available_memory()
    return int(0.8 * free) if device.type == "cpu" else free - max(3 * GIB, int(0.03 * free))


def machine_of(device: torch.device) -> HardwareSpec:
    """The datasheet of a machine with such a GPU; of one with an L4 for others, and for a CPU that plays a GPU."""
    known = None if device.type == "cpu" else preset_of_card(torch.cuda.get_device_name(device))
    return known or preset("l4")


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """What was measured here, if `profile` has; else what usually is reached of a like GPU's datasheet."""
    found, _ = read_cache(cache_path(), this_machine())
    if found is not None and found.gpu is not None:
        return MeasuredRates(found)
    known = machine_of(device)
    # Turing emulates bfloat16, slower than this: but a plan for it is a plan.
    rates = {str(dtype).removeprefix("torch."): known.gpu.flops["float16"], **known.gpu.flops}
    return DatasheetRates(replace(known, gpu=replace(known.gpu, flops=rates)))


def _check_pages(policy: Policy, spec: ModelSpec, dtype: torch.dtype) -> None:
    if policy.packed and dtype is not torch.bfloat16:
        raise ConfigError(f"packed=True with {dtype}: only bfloat16 weights can be packed; leave it out")
    layout = PageLayout.of(spec, policy.pages_per_expert)
    Placement(layout.pages_per_layer, policy.resident_pages, policy.num_frames, layers_on_cpu(policy))
    if not 1 <= policy.expert_parts <= layout.num_experts:
        raise ConfigError(
            f"expert_parts={policy.expert_parts}: a layer has {layout.num_experts} experts; give 1 to as many"
        )
    check_ring(policy, layout.num_experts)


def checkpoint_directory(config: EngineConfig) -> Path | None:
    """Where the weights are; None if they are made up.

    Raises:
        ConfigError: the model is known, but not there.
    """
    if config.load_format == "dummy":
        return None
    path = Path(config.model)
    if not path.is_dir():
        raise ConfigError(
            f"{config.model!r} is no checkpoint directory; download the model and give its directory"
        )
    return path


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU; use device='cpu' or install a CUDA torch")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = torch.cuda.current_device()
    if number:  # threads that lock memory begin with the first GPU, and would lock it for that one
        raise ConfigError(
            f"GPU {number} is the current one, and only the first that a process sees can be used; set "
            f"CUDA_VISIBLE_DEVICES={number} instead"
        )
    return torch.device("cuda", 0)


def _dtype(name: str, spec: ModelSpec) -> torch.dtype:
    chosen = spec.dtype if name == "auto" else name
    found = getattr(torch, chosen, None)
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype {chosen!r} cannot be run; choose float32, float16 or bfloat16")
    return found  # type: ignore[no-any-return]
