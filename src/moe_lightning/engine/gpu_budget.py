"""How much GPU memory an engine may take so that the process stays below what the user allows."""

from __future__ import annotations

import torch

from moe_lightning.errors import NoFeasiblePolicyError
from moe_lightning.hardware.gpu_memory import pci_bus_id, process_bytes
from moe_lightning.units import MIB, format_bytes

_CONTEXT = 640 * MIB  # where the driver does not tell: a context with cuBLAS on a large GPU
_KERNELS = 256 * MIB  # modules that are loaded later, as kernels are first called
_FREE_SHARE = 0.95  # of what is free, without a limit from the user


# What a limit leaves to tensors, as first measured: kernels loaded since then have room set aside already.
_budgets: dict[tuple[torch.device, int], int] = {}
_contexts: dict[torch.device, int] = {}


def cap_gpu_memory(device: torch.device, allowed: int | None) -> int:
    """Bytes that tensors may take; from now on the allocator refuses more.

    Args:
        device: the GPU.
        allowed: bytes of the whole process, context included; None for nearly all that is free.

    Raises:
        NoFeasiblePolicyError: nothing would be left.
    """
    if allowed is not None and (device, allowed) in _budgets:
        budget = _budgets[device, allowed]
        _let_tensors_take(budget, device)
        return budget
    torch.zeros((64, 64), device=device) @ torch.zeros(
        (64, 64), device=device
    )  # creates context and cuBLAS handle
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    context = _contexts.setdefault(device, context_bytes(device))
    is_given = allowed is not None
    if allowed is None:
        allowed = int(_FREE_SHARE * free) + context
    budget = min(allowed, total) - context - _KERNELS
    if budget <= 0:
        raise NoFeasiblePolicyError(
            f"gpu_memory={format_bytes(allowed)} leaves nothing beside the driver's context "
            f"({format_bytes(context)}) and kernels ({format_bytes(_KERNELS)}); raise gpu_memory"
        )
    if is_given:
        _budgets[device, allowed] = budget
    _let_tensors_take(budget, device)
    return budget


def _let_tensors_take(budget: int, device: torch.device) -> None:
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def context_bytes(device: torch.device) -> int:
    """GPU memory that the process holds beside what its tensors reserve."""
    held = process_bytes(pci_bus_id(device.index))
    return _CONTEXT if held is None else max(0, held - torch.cuda.memory_reserved(device))
