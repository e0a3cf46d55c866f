"""Attention is timed as passes call it: unequal lengths, blocks anywhere, one micro-batch after the other."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from efforts import TINY

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.profiling import attention
from moe_lightning.profiling.attention import AttentionBench, block_tables, spread_lengths
from moe_lightning.profiling.effort import FULL


@pytest.mark.parametrize("mean", [16, 140, 2048])
def test_lengths_are_unequal_in_any_order_and_as_long_as_asked_on_average(mean):
    lengths = spread_lengths(512, mean)
    assert lengths.double().mean().item() == pytest.approx(mean, rel=0.02)
    assert 1 <= lengths.min() < 0.5 * mean and lengths.max() > 2 * mean
    assert not torch.equal(lengths, lengths.sort().values)


def test_a_sequences_blocks_are_as_many_as_it_needs_and_nobody_elses():
    lengths, order = torch.tensor([1, 16, 17, 40]), torch.randperm(20)
    tables = block_tables(lengths, order)
    assert tables.shape == (4, 3)
    counts = (1, 1, 2, 3)
    used = [block for row, count in zip(tables.tolist(), counts, strict=True) for block in row[:count]]
    assert used == order[:7].tolist()
    assert all(not any(row[count:]) for row, count in zip(tables.tolist(), counts, strict=True))


class Kernel:
    """Notes what it is called with."""

    def __init__(self):
        self.calls = []

    def attend(self, out, q, k, v, kv, tables, lengths):
        self.calls.append((q, kv, tables, lengths))


@pytest.fixture
def clock(monkeypatch):
    """Each call of attention takes 1 s; its pause none."""

    def seconds_in_turn(works, budget, before, after):
        for _ in range(2):
            for number, work in enumerate(works):
                before(number)
                work()
                after()
        return [6.0] * len(works)

    monkeypatch.setattr(attention, "seconds_in_turn", seconds_in_turn)


def test_calls_are_of_a_layers_micro_batches_all_over_its_memory(clock):
    kernel, memory = Kernel(), torch.zeros(2**22, dtype=torch.uint8)
    bench = AttentionBench(kernel, memory, (8, 2, 64), torch.bfloat16, TINY)
    assert bench._seconds(bench._layers_of([spread_lengths(8, 33)]), 0.1) == [1.0], "those of a layer, by six"
    found = [(q.data_ptr(), kv.data_ptr(), tables) for q, kv, tables, _ in kernel.calls]
    assert len({q for q, _, _ in found}) == 6 and len({kv for _, kv, _ in found[:6]}) == 1
    assert found[0][0] == found[6][0]
    num_blocks = kernel.calls[0][1].shape[0]
    assert num_blocks == 2**22 // 4 // (16 * 2 * 2 * 64 * 2), "a quarter of little memory"
    blocks = torch.cat([tables.flatten() for _, _, tables in found])
    assert blocks.max() > 0.8 * num_blocks and not torch.equal(found[0][2], found[1][2])


def test_each_turn_is_a_layer_in_memory_of_its_own_until_all_memory_was_read(clock):
    kernel, memory = Kernel(), torch.zeros(26 * 2**20 + 5, dtype=torch.uint8)
    bench = AttentionBench(kernel, memory[:-5], (8, 2, 64), torch.bfloat16, TINY)
    for _ in range(3):  # what is measured next goes on where this ended
        bench._seconds(bench._layers_of([bench.lengths(33)]), 0.1)
    caches = [kv for _, kv, _, _ in kernel.calls]
    assert [len({kv.data_ptr() for kv in caches[n : n + 6]}) for n in range(0, 36, 6)] == [1] * 6
    starts = [kv.data_ptr() - memory.data_ptr() for kv in caches[::6]]
    size = caches[0].nbytes
    assert starts == [0, size, 2 * size, 3 * size, 0, size]
    assert 6 * TINY.call_bytes <= size <= (memory.nbytes - 5) / 4 < size + 16 * 512
    for _, kv, tables, lengths in kernel.calls:
        blocks = sum(-(-length // 16) for length in lengths.tolist())
        assert int(tables.max()) < len(kv) and blocks <= len(kv) / 6


def test_copies_go_on_before_each_layer_and_count_while_it_runs_and_the_bytes_are_those_that_were_read(
    clock, monkeypatch
):
    kernel, memory = Kernel(), torch.zeros(2**22, dtype=torch.uint8)
    seen = []

    class Beside:
        def keep_up(self, num_bytes):
            seen.append(num_bytes)

        def watch(self):
            seen.append(len(kernel.calls))

        def watched(self):
            seen.append(len(kernel.calls))

    monkeypatch.setattr(attention.time, "sleep", lambda _: seen.append("pause"))
    bench = AttentionBench(kernel, memory, (8, 2, 64), torch.bfloat16, TINY)
    call = TimeCurve((1, 1000), (0.1, 0.1))
    found = bench._rates(bench._contexts(), call, Beside())
    short, long = (kernel.calls[n][3] for n in (0, 6))
    sizes = [6 * len(lengths) * 12 * 64 * 2 for lengths in (short, long)] * 2
    assert seen == [x for n, size in enumerate(sizes) for x in ("pause", size, 6 * n, 6 * n + 6)]
    assert (len(short), len(long)) == (2**22 // 24 // (16 * 512), 2**22 // 24 // (48 * 512))
    bytes_read = [int(lengths.sum()) * 2 * 2 * 64 * 2 for lengths in (short, long)]
    assert found.sizes == (16, 33) and found.rates == pytest.approx([size / 0.9 for size in bytes_read])


def test_contexts_take_turns_and_each_reads_other_layers_in_each_round(clock):
    kernel, memory = Kernel(), torch.zeros(2**22, dtype=torch.uint8)
    bench = AttentionBench(kernel, memory, (8, 2, 64), torch.bfloat16, TINY)
    bench._rates(bench._contexts(), TimeCurve((1, 1000), (0.1, 0.1)))
    layers = [(len(lengths), kv.data_ptr()) for _, kv, _, lengths in kernel.calls[::6]]
    counts = [count for count, _ in layers]
    assert counts == counts[:2] * 2 and counts[0] != counts[1]
    assert layers[0][1] != layers[2][1] and layers[1][1] != layers[3][1]


def test_beside_copies_one_waits_for_them_as_a_launcher_does(clock, monkeypatch):
    class Beside:
        def __init__(self):
            self.is_open, self.waited = False, threading.Event()

        def __enter__(self):
            self.is_open = True

        def __exit__(self, *_):
            self.is_open = False

        def wait(self):
            assert self.is_open
            self.waited.set()

        def keep_up(self, num_bytes):
            assert self.is_open and num_bytes > 0
            assert self.waited.wait(10)

        def watch(self):
            assert self.is_open

        def watched(self):
            assert self.is_open

    bench = AttentionBench(Kernel(), torch.zeros(2**22, dtype=torch.uint8), (8, 2, 64), torch.bfloat16, TINY)
    copies, make = Beside(), bench.layer

    def layer(lengths):
        assert not copies.is_open, "copies would stand still until it is made"
        return make(lengths)

    monkeypatch.setattr(bench, "layer", layer)
    found = bench.measure(copies)
    assert copies.waited.is_set() and not copies.is_open
    assert found.rate_under_copies is not None and found.rate_under_copies.sizes == TINY.contexts
    assert bench.measure(None).rate_under_copies is None


@pytest.mark.parametrize(
    ("elapsed_s", "done", "point_s"), [(8.0, 0, 0.2), (16.0, 1, 0.125), (21.0, 2, 0.1), (40.0, 0, 0.1)]
)
def test_attention_is_measured_for_a_shorter_time_where_the_machine_was_slow_before(elapsed_s, done, point_s):
    four = (1, 2, 3, 4)
    effort = replace(TINY, point_s=0.2, attention_s=22.0, num_seqs=four, contexts=four, geometries=four[:3])
    assert effort.paced(elapsed_s, done).point_s == pytest.approx(point_s)


def test_a_full_profile_has_time_for_all_of_its_attention():
    assert all(FULL.paced(8.0 + 4.4 * done, done) == FULL for done in range(len(FULL.geometries)))
