"""What is made of the measurements of a GPU, none of which is made here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from efforts import SHAPE, TINY

from moe_lightning.errors import ConfigError
from moe_lightning.profiling import gpu_machine
from moe_lightning.profiling.steps import Steps
from profiles import LANES, LINK, PROFILE

OTHER = replace(SHAPE, name="other")
RATES = {"tiny": 46e9, "other": 48e9}


@pytest.fixture
def kernels(monkeypatch):
    """Calls `_kernels` for two shapes with these loads; the profile of the GPU, and the steps."""

    class Bench:
        def __init__(self, shape, dtype, effort):
            self.name = shape.name

        def measure(self, load):
            return PROFILE.gpu.experts[0]

        def page_rate(self, load):
            return RATES[self.name] if load == "load" else None

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_machine.gpu, "memory_rate", lambda effort: 2e12)
    monkeypatch.setattr(gpu_machine.gpu, "product_flops", lambda dtype, effort: 5e14)
    monkeypatch.setattr(gpu_machine.gpu, "ExpertsBench", Bench)
    monkeypatch.setattr(gpu_machine, "dense", lambda *_: list(PROFILE.gpu.dense))
    monkeypatch.setattr(gpu_machine, "small_kernels", lambda *_: PROFILE.gpu.small[0])
    monkeypatch.setattr(gpu_machine, "prefill", lambda *_: PROFILE.gpu.prefill[0])
    monkeypatch.setattr(gpu_machine, "decode", lambda *_: PROFILE.gpu.decode[0])

    def measured(*loads):
        steps = Steps(99, lambda *_: None)
        found = gpu_machine._kernels([SHAPE, OTHER], loads, TINY, torch.bfloat16, LINK, LANES, steps)
        return found, steps.begun

    return measured


def test_pages_come_as_beside_the_sweeps_of_all_shapes_on_average(kernels):
    found, _ = kernels("load", "load")
    assert found.link == replace(LINK, h2d_beside_attention=47e9)
    assert kernels("load", "no page came")[0].link.h2d_beside_attention == 46e9
    assert kernels(None, None)[0].link == LINK, "as beside attention alone"


def test_the_number_of_steps_is_known_before(kernels, monkeypatch):
    shapes, totals = [SHAPE, OTHER], []

    def stop(shapes, effort, dtype, steps):
        totals.append(steps.total)
        return None, None

    monkeypatch.setattr(gpu_machine, "require_gpu", lambda: torch.bfloat16)
    monkeypatch.setattr(gpu_machine, "_all", stop)
    monkeypatch.setattr(gpu_machine, "_within_budget", lambda effort, _: nullcontext(effort))
    gpu_machine.measure_gpu_machine(shapes, TINY, None, lambda *_: None)
    of_kernels = kernels(None, None)[1]
    # Host memory, three kinds of copies, reads, the CPU's products, each geometry, each model's experts, the lanes.
    assert totals == [1 + 3 + 1 + 1 + len(TINY.geometries) + len(shapes) + 1 + of_kernels]


def test_where_host_memory_is_refused_nobody_waits_for_kernels(monkeypatch):
    compiled = []

    class Bench:
        def __init__(self, shape, dtype, effort):
            self.name = shape.name

        def compile(self, stopped):
            compiled.append((self.name, stopped.wait(30)))

    def refuse(effort, has_gpu):
        raise ConfigError("too little host memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_machine.gpu, "ExpertsBench", Bench)
    monkeypatch.setattr(gpu_machine, "HostMemory", refuse)
    with pytest.raises(ConfigError, match="too little"):
        gpu_machine._all([SHAPE, OTHER], TINY, torch.bfloat16, Steps(99, lambda *_: None))
    assert compiled in ([("tiny", True)], []), "stopped, before it began perhaps"


def test_all_kernels_are_compiled_before_anything_is_measured(monkeypatch):
    compiled, order = [], []

    class Bench:
        def __init__(self, shape, dtype, effort):
            self.name = shape.name

        def compile(self, stopped):
            compiled.append(self.name)

    class Memory:
        def __init__(self, effort, has_gpu):
            pass

        def fill(self, dtype):
            pass

    def host_and_link(*_):
        order.append(list(compiled))
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_machine.gpu, "ExpertsBench", Bench)
    monkeypatch.setattr(gpu_machine, "HostMemory", Memory)
    monkeypatch.setattr(gpu_machine, "_host_and_link", host_and_link)
    with pytest.raises(InterruptedError):
        gpu_machine._all([SHAPE, OTHER], TINY, torch.bfloat16, Steps(99, lambda *_: None))
    assert order == [["tiny", "other"]]
