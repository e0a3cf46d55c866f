"""A profile of a machine without a GPU, of tiny sizes: complete, plausible, within its bounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from efforts import SHAPE, TINY

from moe_lightning.bench import timing
from moe_lightning.engine import identity
from moe_lightning.engine.identity import this_machine
from moe_lightning.errors import ConfigError
from moe_lightning.hardware.profile import Profile
from moe_lightning.kernels import cpu_experts
from moe_lightning.profiling import arena, host
from moe_lightning.profiling.arena import HostMemory
from moe_lightning.profiling.measure import measure, measure_disk
from moe_lightning.profiling.shapes import shape_named

OTHER = replace(SHAPE, name="other", num_experts=8, top_k=3)


@pytest.fixture(scope="module", autouse=True)
def no_gpu():
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def reports() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def profile(reports) -> Profile:
    return measure([SHAPE, OTHER], TINY, report=lambda *args: reports.append(args))


def test_everything_that_a_cpu_does_is_measured(profile):
    assert profile.gpu is None
    assert profile.machine == this_machine()
    assert [(a.num_heads, a.num_kv_heads, a.dtype) for a in profile.host.attention] == [
        (8, 2, "bfloat16"), (4, 4, "bfloat16"), (8, 2, "float32"), (4, 4, "float32"),
    ]  # fmt: skip
    assert [(e.shape.name, e.dtype) for e in profile.host.experts] == [
        ("tiny", "bfloat16"), ("tiny", "float32"), ("other", "bfloat16"), ("other", "float32"),
    ]  # fmt: skip
    assert profile.host.flops.keys() == {"bfloat16", "float32"}
    assert all(a.rate_under_copies is None for a in profile.host.attention)
    assert profile.has(SHAPE)


def test_it_goes_through_json(profile):
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_every_part_is_reported_and_the_number_of_parts_was_known(profile, reports):
    total = reports[0][2]
    assert [(done, of) for _, done, of in reports] == [(done, total) for done in range(total)]


def test_rates_are_those_of_a_computer(profile):
    """Wide bounds: what is wrong by a unit or a thousandfold is outside."""
    assert 1e7 < profile.host.read < 1e13
    assert all(1e6 < flops < 1e15 for flops in profile.host.flops.values())
    for a in profile.host.attention:
        assert all(1e5 < rate < 1e13 for rate in a.rate.rates)
        assert 1e-7 < a.call.seconds_at(8) < 1
    assert profile.took_s < 300, "no test takes longer"


def test_attention_reads_memory_that_holds_numbers(monkeypatch):
    memory = HostMemory(TINY, has_gpu=False)
    memory.fill(torch.bfloat16)
    values = memory.read.view(torch.bfloat16)
    assert values.isfinite().all()
    assert values.float().std().item() == pytest.approx(1, rel=0.05)


def test_host_memory_stays_within_its_bounds(monkeypatch):
    assert HostMemory(TINY, has_gpu=False).read.nbytes <= TINY.host_bytes
    monkeypatch.setattr(arena, "available_memory", lambda: 40 * 2**20)
    memory = HostMemory(TINY, has_gpu=False)
    assert memory.read.nbytes + memory.copied.nbytes == 10 * 2**20, "a quarter of what is free"


def test_too_little_memory_is_said_with_what_is_free(monkeypatch):
    monkeypatch.setattr(arena, "available_memory", lambda: 20 * 2**20)
    with pytest.raises(
        ConfigError, match=r"takes 8\.0 MiB of host memory .* 20\.0 MiB is free\. End other programs"
    ):
        measure([SHAPE], TINY)


def test_experts_count_as_often_as_they_are_met(monkeypatch):
    monkeypatch.setattr(host, "median_seconds", lambda work, budget, before: (before(), work(0), 0.25)[2])
    turns = []
    effort = replace(TINY, cpu_experts_s=10.0)
    found = host.experts(SHAPE, torch.float32, effort, lambda: turns.append(1))
    assert len(turns) == 2, "copies were kept up"
    assert found.times.seconds == pytest.approx((2 * 0.25, 4 * 0.25), rel=1e-4)


class Recording:
    """In place of the CPU's kernels."""

    def __init__(self):
        self.calls = []

    def experts(self, out, x, ids, weights, pages, pages_per_expert):
        addresses = [page.data_ptr() for page in pages]
        self.calls.append(
            (len(x), len(ids.unique()), len(set(addresses)), pages_per_expert, pages[0].numel())
        )


def test_beside_a_gpu_the_kernel_has_as_many_experts_as_are_met_and_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(host, "median_seconds", lambda work, *_: (work(0), work(1), 0.25)[2])
    shape, size = replace(SHAPE, pages_per_expert=2), 3 * SHAPE.hidden_size * SHAPE.intermediate_size
    for room, one, sixteen in ((8, 2, 4), (3, 2, 3), (1, 1, 1)):
        kernel = Recording()
        effort = replace(TINY, cpu_experts_s=10.0, pool_bytes=4 * size * room)
        found = host.experts(shape, torch.float32, effort, kernel=kernel)
        assert (
            kernel.calls
            == [(one, one, 2 * one, 2, size // 2)] * 2
            + [(8 * sixteen, sixteen, 2 * sixteen, 2, size // 2)] * 2
        )
        assert found.times.seconds == pytest.approx((2 / one * 0.25, 4 / sixteen * 0.25), rel=1e-4)
        assert found.shape == replace(shape, pages_per_expert=1)


def test_batches_that_would_take_too_long_are_left_out():
    slow = replace(TINY, cpu_experts_s=1e-9)
    assert host.experts(SHAPE, torch.float32, slow).times.sizes == (1,)


def test_the_experts_that_are_timed_are_those_of_the_cpu_path(monkeypatch):
    calls = []
    true = cpu_experts.experts

    def experts(x, *others):
        calls.append(len(x))
        return true(x, *others)

    monkeypatch.setattr(cpu_experts, "experts", experts)
    host.experts(SHAPE, torch.float32, replace(TINY, cpu_experts_s=10.0))
    assert set(calls) == {1, 8}, "rows of one of four experts, for 1 and 16 tokens that visit two each"


def test_turns_go_on_until_their_time_is_up_but_not_for_ever_where_one_takes_long(monkeypatch):
    now = 0.0

    def clock() -> float:
        return now

    def work(turn: int) -> None:
        nonlocal now
        turns.append(turn)
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    for seconds, least, most in ((1e-4, 10, 12), (5e-4, 4, 4), (1.0, 2, 2)):
        turns: list[int] = []
        assert timing.median_seconds(work, 1e-3) == pytest.approx(seconds)
        assert least <= len(turns) <= most, "one more than are counted"
        assert turns == list(range(len(turns)))


def test_kernels_are_others_when_one_of_their_files_is(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(identity.kernels, "__path__", [str(tmp_path)])
    found = []
    for text in ("a", "b", "a"):
        (tmp_path / "kernel.py").write_text(text)
        found.append(identity.kernels_digest.__wrapped__())
    assert found[0] == found[2] != found[1]


def test_a_disk_is_read_and_one_that_cannot_be_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("moe_lightning.hardware.inspection._DISK_BYTES", 16 * 2**20)
    found = measure_disk(tmp_path)
    assert found.path == str(tmp_path)
    assert found.read > 0
    with pytest.raises(ConfigError, match=r"cannot measure the disk of .*absent: No such file.*--disk"):
        measure_disk(tmp_path / "absent")


@pytest.mark.parametrize("name", ["mixtral-8x7b", "Qwen3-30B-A3B", "llama-3.1-8b"])
def test_known_names_have_shapes(name):
    assert shape_named(name).num_heads == 32


def test_a_config_is_a_shape_and_an_unknown_name_an_error(mixtral):
    shape = shape_named(str(mixtral))
    assert shape.name == Path(mixtral).name
    assert shape.num_experts > 1
    with pytest.raises(ConfigError, match="neither a path nor a known model"):
        shape_named("qwen9")
