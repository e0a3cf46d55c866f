"""Sweeps over a share of the experts, timed by a clock that counts their work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from efforts import SHAPE, TINY, OnCpu

from moe_lightning.kernels import ops
from moe_lightning.profiling import gpu


@pytest.fixture
def swept(monkeypatch):
    """The experts that each call swept, with its tokens."""
    calls = []

    def experts_(hidden, x, ids, weights, frames, table, pages_per_expert, workspace, only=None):
        calls.append((len(x), only))

    def task_seconds(points, load):
        assert load == "load"
        for works in points:
            for work in works:
                work()
        return [float(number) for number in range(1, len(points) + 1)]

    monkeypatch.setattr(ops, "experts_", experts_)
    monkeypatch.setattr(ops, "experts_workspace", lambda *_: None)
    monkeypatch.setattr(gpu, "task_seconds", task_seconds)
    return calls


def test_shares_of_the_experts_are_swept_as_passes_do_each_time_others(swept):
    effort = replace(TINY, tokens=(1, 16, 100), part_tokens=(16, 100, 1000), expert_parts=(2, 4, 3))
    with OnCpu():
        found = gpu.ExpertsBench(SHAPE, torch.float32, effort).measure("load")
    assert [part.share for part in found.parts] == [1 / 4, 1 / 2], "3 does not divide 4 experts"
    assert all(part.times.sizes == (16, 100) for part in found.parts), "1,000 tokens were not swept whole"
    curves = (found.times, *(part.times for part in found.parts))
    assert [curve.seconds for curve in curves] == [(1, 2, 3), (4, 5), (6, 7)]
    assert [only for tokens, only in swept if tokens == 1] == [None] * 4
    quarters = [only for tokens, only in swept if tokens == 16 and only is not None and len(only) == 1]
    assert quarters == [range(n, n + 1) for n in range(4)]
    halves = {only for tokens, only in swept if only is not None and len(only) == 2}
    assert halves == {range(2), range(2, 4)}


def test_one_expert_has_no_parts(swept):
    with OnCpu():
        found = gpu.ExpertsBench(replace(SHAPE, num_experts=1, top_k=1), torch.float32, TINY).measure("load")
    assert found.parts == ()


def test_what_has_no_room_beside_the_pages_is_not_swept_but_the_fewest_tokens_are(swept):
    row = (2 * (SHAPE.hidden_size + SHAPE.intermediate_size) + 2 * SHAPE.hidden_size) * 4
    with OnCpu():
        few = gpu.ExpertsBench(SHAPE, torch.float32, replace(TINY, gpu_bytes=20 * row)).measure("load")
        fewest = gpu.ExpertsBench(SHAPE, torch.float32, replace(TINY, gpu_bytes=0)).measure("load")
    assert few.times.sizes == (1, 16) and fewest.times.sizes == (1,)
