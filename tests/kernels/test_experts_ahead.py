"""Small calls stand for all sweeps over experts: each kernel that these run is compiled by one of those."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from moe_lightning.kernels import ops
from moe_lightning.kernels.expert_config import ExpertsShape, select
from moe_lightning.pipeline.shape import experts_in

pytest.importorskip("triton")
from moe_lightning.kernels import experts_ahead
from moe_lightning.kernels.expert_sort import CHUNK
from moe_lightning.kernels.experts_ahead import compile_experts, small_calls

MIXTRAL = ExpertsShape(1, 2, 8, 4096, 1024, 14, 2, (9, 0))
QWEN = ExpertsShape(1, 8, 128, 2048, 768, 1, 2, (9, 0))
ONE = ExpertsShape(1, 1, 4, 1024, 512, 1, 4, (8, 9))  # an expert a token, in float32
SWEEPS = {1: (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 4: (256, 1024, 8192)}


def kernels(shape, config, num_tokens, num_experts, room):
    """What of a call its kernels are compiled for, as `ExpertsCall` and `sort_slots` have it."""
    shares = min(config.split_k, room * shape.itemsize // 4 // num_tokens)
    return replace(config, split_k=max(1, shares)), num_tokens * shape.top_k > CHUNK, num_experts


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN, ONE])
def test_each_kernel_of_the_sweeps_is_run_by_a_call_of_few_tokens(shape):
    room = max(SWEEPS[1])
    wanted = {
        kernels(
            shape, select(replace(shape, num_tokens=count)), count, shape.num_experts // num_parts, room
        )
        for num_parts, counts in SWEEPS.items()
        for count in counts
    }  # fmt: skip
    groups = small_calls(SWEEPS, shape, room)
    calls = [call for calls in groups for call in calls]
    assert {kernels(shape, c.config, c.num_tokens, c.num_experts, c.room) for c in calls} == wanted
    assert len(calls) == len(wanted) < sum(map(len, SWEEPS.values()))
    assert max(c.num_tokens for c in calls) == CHUNK // shape.top_k + 1
    assert all(c.num_tokens <= c.room <= 8 * c.num_tokens for c in calls), "workspaces stay small"


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN, ONE])
def test_threads_have_configurations_of_their_own(shape):
    groups = small_calls(SWEEPS, shape, max(SWEEPS[1]))
    configs = [{call.config for call in calls} for calls in groups]
    assert all(len(some) == 1 for some in configs)
    assert len(set.union(*configs)) == len(groups)


def test_kernels_are_run_whatever_frames_hold_and_until_that_is_stopped(device, monkeypatch):
    frames = torch.full((5, 3 * 24 * 48), float("nan"), device=device)
    table = torch.tensor([4, 0, 1, 2], dtype=torch.int32, device=device)
    calls, real = [], experts_ahead.experts_
    monkeypatch.setattr(experts_ahead, "experts_", lambda *call: [calls.append(call), real(*call)])
    stopped = threading.Event()
    sweeps = {1: (1, 100), 2: (7,)}
    compile_experts(frames, table, 2, 48, 2, sweeps, room=100, num_threads=2, stopped=stopped)
    assert frames.isnan().all() and calls
    stopped.set()
    calls.clear()
    compile_experts(frames, table, 2, 48, 2, sweeps, room=100, num_threads=2, stopped=stopped)
    assert not calls


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 3])
def test_after_that_no_call_compiles(parts, monkeypatch):
    """Shapes of Mixtral's, whose configurations were measured on Hopper; two of its pages an expert."""
    device, hidden, rows = torch.device("cuda"), 4096, 7168
    frames = torch.zeros((16, 3 * rows * hidden), dtype=torch.bfloat16, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device)
    ops.compile_experts(frames, table, 2, hidden, 2, {parts: range(1, 2049)})
    compiled = []
    knobs = pytest.importorskip("triton").knobs

    def note(**found):
        compiled.append(found["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    workspace = ops.experts_workspace(2048, 2, 8, hidden, 2 * rows, torch.bfloat16, device)
    for count in (1, 2, 3, 15, 16, 33, 64, 100, 350, 512, 1000, 2048):
        x = torch.zeros((count, hidden), dtype=torch.bfloat16, device=device)
        ids = torch.zeros((count, 2), dtype=torch.int64, device=device)
        weights = torch.zeros((count, 2), device=device)
        for part in range(parts):
            ops.experts_(x.clone(), x, ids, weights, frames, table, 2, workspace, experts_in(8, parts, part))
    assert not compiled
