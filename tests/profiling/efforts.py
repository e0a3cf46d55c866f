"""Efforts that take seconds, and a GPU that is none."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode

from moe_lightning.hardware.kernel_times import ModelShape
from moe_lightning.profiling.effort import Effort
from moe_lightning.units import KIB, MIB

TINY = Effort(
    point_s=0.002, gpu_point_s=0.002, host_bytes=768 * MIB, gpu_bytes=512 * MIB, call_bytes=MIB, pool_bytes=MIB,
    pause_s=0.0,
    copy_sizes=(64 * KIB, 256 * KIB, MIB), hop_sizes=(4 * KIB, 64 * KIB), contexts=(16, 33), num_seqs=(1, 8),
    geometries=((8, 2, 64), (4, 4, 32)), tokens=(1, 16, 100), cpu_tokens=(1, 16), rows=(1, 16), prompts=(16, 100),
    chunk_tokens=(100, 300), gpu_product=256, cpu_products=(64,), cpu_experts_s=0.05, chain=8,
)  # fmt: skip
SHAPE = ModelShape("tiny", 64, 128, 4, 2, 2, 8, 2, 64, 500)


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
