"""Profiles made by hand."""

from __future__ import annotations

from dataclasses import replace

from moe_lightning.hardware.curve import RateCurve, TimeCurve
from moe_lightning.hardware.kernel_times import (
    DecodeProfile,
    DenseProfile,
    ExpertsProfile,
    ModelShape,
    PartTimes,
    PrefillProfile,
    SmallKernels,
)
from moe_lightning.hardware.machine import GpuIdentity, Machine
from moe_lightning.hardware.profile import (
    AttentionProfile,
    DiskProfile,
    GpuProfile,
    HostProfile,
    LaneProfile,
    LinkProfile,
    Profile,
)

GPU = GpuIdentity("A GPU", "GPU-1", 24 * 2**30, "550.1", "12.8", "3.6.0")
MACHINE = Machine("A CPU", 16, 16, "avx512", 125 * 2**30, "0.1.0+abc", "2.11.0", GPU)
MIXTRAL = ModelShape("mixtral-8x7b", 4096, 14336, 8, 2, 14, 32, 8, 128, 32000)
QWEN = ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, 1, 32, 4, 128, 151936)


def attention(
    num_heads: int, num_kv_heads: int, rate: float = 80e9, dtype: str = "bfloat16"
) -> AttentionProfile:
    contexts = (64.0, 512.0)
    return AttentionProfile(
        num_heads, num_kv_heads, 128, dtype, RateCurve(contexts, (0.8 * rate, rate)),
        RateCurve(contexts, (0.7 * rate, 0.9 * rate)), TimeCurve((1.0, 1024.0), (3e-5, 4e-4)),
    )  # fmt: skip


LANES = LaneProfile(
    gpu_launch_s=2e-5, gpu_kernel_launch_s=5e-6, h2d_launch_s=1.5e-5, d2h_launch_s=1.6e-5, cpu_launch_s=3e-5,
    gpu_gap_s=2e-6, h2d_gap_s=3e-6, d2h_gap_s=3e-6, stream_handover_s=6e-6, cpu_round_trip_s=4e-5,
    h2d_hop=TimeCurve((65536.0, 1048576.0), (1e-5, 3e-5)), d2h_hop=TimeCurve((65536.0, 1048576.0), (1.1e-5, 3e-5)),
)  # fmt: skip
LINK = LinkProfile(
    is_pinned=True, h2d=TimeCurve((2.0**20, 2.0**26), (2.3e-5, 1.22e-3)),
    d2h=TimeCurve((2.0**20, 2.0**26), (2.4e-5, 1.23e-3)),
    h2d_beside_d2h=47e9, d2h_beside_h2d=46e9, h2d_beside_attention=52e9,
)  # fmt: skip
PROFILE = Profile(
    machine=MACHINE,
    created="2026-01-02T03:04:05+00:00",
    took_s=41.5,
    host=HostProfile(
        read=100e9, read_under_copies=96e9, flops={"bfloat16": 3.6e12, "float32": 1.5e12},
        attention=(attention(32, 32), attention(32, 8), attention(32, 4)),
        experts=(
            ExpertsProfile(
                replace(MIXTRAL, pages_per_expert=1), "bfloat16", TimeCurve((1.0, 64.0, 4096.0), (9e-3, 4e-2, 0.8))
            ),
        ),
    ),
    gpu=GpuProfile(
        memory=3e12, flops={"bfloat16": 7.9e14, "float32": 5e13},
        experts=(
            ExpertsProfile(
                MIXTRAL, "bfloat16", TimeCurve((64.0, 8192.0), (1.05e-3, 8.6e-3)),
                (PartTimes(0.125, TimeCurve((64.0, 8192.0), (2e-4, 1.2e-3))),),
            ),
            ExpertsProfile(QWEN, "bfloat16", TimeCurve((64.0, 8192.0), (4e-4, 1.4e-3))),
        ),
        dense=(
            DenseProfile("qkv of mixtral-8x7b", 4096, 6144, "bfloat16", TimeCurve((1.0, 512.0), (2e-5, 5e-5))),
            DenseProfile("head of mixtral-8x7b", 4096, 32000, "bfloat16", TimeCurve((1.0, 512.0), (9e-5, 3e-4))),
        ),
        prefill=(
            PrefillProfile(
                32, 8, 128, "bfloat16", RateCurve((64.0, 4096.0), (5e13, 4e14)),
                TimeCurve((2.0**20, 2.0**23), (1e-4, 3.7e-4)),
            ),
        ),
        link=LINK, lanes=LANES,
        decode=(DecodeProfile(32, 8, 128, "bfloat16", RateCurve((64.0, 2048.0), (1e12, 2e12))),),
        small=(
            SmallKernels(
                MIXTRAL, "bfloat16", TimeCurve((1.0, 512.0), (2.8e-5, 6.4e-5)),
                TimeCurve((1.0, 512.0), (2.8e-5, 6.3e-5)), is_whole=True,
            ),
        ),
    ),
    disk=DiskProfile("/data", 2.5e9),
)  # fmt: skip
CPU_PROFILE = replace(
    PROFILE,
    machine=replace(MACHINE, gpu=None),
    gpu=None,
    host=replace(
        PROFILE.host, read_under_copies=None,
        experts=(ExpertsProfile(replace(MIXTRAL, pages_per_expert=1), "float32", TimeCurve((1.0,), (0.1,))),),
    ),
)  # fmt: skip
