"""Host arenas: exact sizes, slices that no copy crosses, contents that preparing leaves alone."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lightning.memory import arena as arenas
from moe_lightning.memory import pinning
from moe_lightning.memory.arena import HostArena
from stopped_pool import stopped


def test_an_arena_has_exactly_the_bytes_of_its_rows():
    assert HostArena((7, 3, 5), torch.bfloat16).num_bytes == 7 * 3 * 5 * 2
    assert HostArena((0, 5), torch.float32).num_bytes == 0


@given(num_rows=st.integers(0, 300), row=st.sampled_from([1, 3, 64, 1000, 4096, 5000, 8192]))
def test_slices_cover_every_row_once_and_begin_on_pages(num_rows, row):
    before = arenas._SLICE_BYTES
    arenas._SLICE_BYTES = 40_000
    try:
        slices = HostArena((num_rows, row), torch.uint8).slices()
    finally:
        arenas._SLICE_BYTES = before
    assert [r for start, stop in slices for r in range(start, stop)] == list(range(num_rows))
    assert all(start * row % mmap.PAGESIZE == 0 for start, _ in slices)


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(arenas, "_SLICE_BYTES", 4 * 4096)


def test_preparing_keeps_what_is_there_and_reports_each_row_once(small_slices):
    arena, seen, mutex = HostArena((50, 4096), torch.uint8), [], threading.Lock()
    arena.tensor[7] = 9

    def note(start, stop):
        with mutex:
            seen.extend(range(start, stop))

    arena.prepare(pin=False, num_threads=4, on_rows=note)
    assert sorted(seen) == list(range(50))
    assert arena.tensor[7].eq(9).all()
    assert arena.tensor.sum() == 9 * 4096


def test_an_error_of_one_thread_stops_the_others_and_is_raised(small_slices, monkeypatch):
    arena, is_stopped = HostArena((400, 4096), torch.uint8), stopped(arenas, monkeypatch)
    seen = []

    def fail(start, stop):
        seen.append(start)
        if len(seen) > 1:  # begun before the first error was heard of
            is_stopped.wait()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        arena.prepare(pin=False, num_threads=1, on_rows=fail)
    assert len(seen) <= 2 < len(arena.slices())


def test_memory_that_is_locked_is_unlocked_before_it_is_gone(small_slices, monkeypatch):
    locked, events = set(), []

    def lock(rows):
        locked.add(rows.data_ptr())

    def unlock(addresses):
        events.append(len(addresses))
        locked.difference_update(addresses)
        addresses.clear()

    monkeypatch.setattr(pinning, "lock", lock)
    monkeypatch.setattr(pinning, "unlock", unlock)
    arena = HostArena((50, 4096), torch.uint8)
    arena.prepare(pin=True, num_threads=4)
    assert arena.is_pinned
    assert len(locked) == len(arena.slices())
    view = arena.tensor[3]
    del arena
    assert not events, "a view still needs the memory"
    del view
    assert not locked


def test_one_refusal_leaves_nothing_locked_and_an_arena_that_works(small_slices, monkeypatch):
    locked = set()

    def lock(rows):
        if len(locked) == 3:
            return "cudaHostRegister returns error 2"
        locked.add(rows.data_ptr())
        return None

    def unlock(addresses):
        locked.difference_update(addresses)
        addresses.clear()

    monkeypatch.setattr(pinning, "lock", lock)
    monkeypatch.setattr(pinning, "unlock", unlock)
    arena = HostArena((50, 4096), torch.uint8)
    arena.prepare(pin=True, num_threads=1)
    assert not arena.is_pinned
    assert arena.refusal == "cudaHostRegister returns error 2"
    assert not locked
    arena.tensor[49] = 1


def test_memory_of_a_preferred_node_is_memory_like_any_other():
    arena = HostArena((50, 4096), torch.uint8)
    arena.prepare(pin=False, node=0)
    arena.tensor.fill_(7)
    assert arena.tensor.sum() == 50 * 4096 * 7
    pinning.prefer_node(arena.tensor, 1023)  # there is no such node, and that is no error
