"""Whether a checkpoint's experts can be packed, by a look at some of them."""

from __future__ import annotations

import torch

from moe_lightning.errors import NotPackableError
from moe_lightning.kernels.packing import pack
from moe_lightning.memory.checkpoint import Tensors, read_tensor
from moe_lightning.models.spec import EXPERT_ROLES
from moe_lightning.perf.page_size import segment_bytes

_LOOKED_AT = 2**23  # values of a tensor


def is_packable(tensors: Tensors) -> bool:
    """Whether the first expert of the first, middle and last layer can be packed; others are like them as a rule.

    Raises:
        CheckpointError: a file cannot be read.
    """
    experts = [
        (tensor, stored) for tensor, stored in tensors if tensor.role in EXPERT_ROLES and tensor.expert == 0
    ]
    last = max((tensor.layer for tensor, _ in experts), default=0)
    try:
        for tensor, stored in experts:
            if tensor.layer in (0, last // 2, last):
                values = read_tensor(stored).view(-1)[:_LOOKED_AT].to(torch.bfloat16)
                pack(values, torch.empty(segment_bytes(values.numel()), dtype=torch.uint8))
    except NotPackableError:
        return False
    return True
