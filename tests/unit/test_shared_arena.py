"""Engines that follow each other find host memory brought in, and weights where no KV was."""

from __future__ import annotations

import pytest
import torch

from moe_lightning.errors import ConfigError
from moe_lightning.memory.shared_arena import SharedArena

ROW = 4096  # elements: a page of float32 takes four of the system's


def filled(part):
    rows = []

    def fill(start, stop):
        for row in range(start, stop):
            part.tensor[row] = row + 1.0
            rows.append(row)

    part.prepare(pin=False, num_threads=2, on_rows=fill)
    return sorted(rows)


def test_the_second_engine_fills_only_rows_that_held_kv():
    shared = SharedArena(10 * ROW * 4)
    first = shared.pages((6, ROW), torch.float32)
    blocks = shared.blocks((4, 2, ROW // 2), torch.float32)
    assert filled(first) == list(range(6))
    blocks.prepare(pin=False)
    blocks.tensor.fill_(-1.0)
    assert first.tensor[:, 0].tolist() == [1, 2, 3, 4, 5, 6], "KV lies elsewhere"

    second = shared.pages((8, ROW), torch.float32)
    assert second.tensor.data_ptr() == first.tensor.data_ptr()
    assert filled(second) == [6, 7]
    shared.blocks((2, ROW), torch.float32).tensor.fill_(-1.0)
    assert second.tensor[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]

    fewer = shared.pages((3, ROW), torch.float32)
    assert filled(fewer) == []
    assert filled(shared.pages((5, ROW), torch.float32)) == [3, 4], "KV may have been there"


def test_a_filling_that_failed_is_done_again_from_the_start():
    shared = SharedArena(4 * ROW * 4)
    part = shared.pages((4, ROW), torch.float32)

    def fail(start, stop):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        part.prepare(pin=False, on_rows=fail)
    assert filled(shared.pages((4, ROW), torch.float32)) == [0, 1, 2, 3]


def test_pages_of_another_size_begin_anew():
    shared = SharedArena(4 * ROW * 4)
    assert filled(shared.pages((4, ROW), torch.float32)) == [0, 1, 2, 3]
    assert filled(shared.pages((8, ROW // 2), torch.float32)) == list(range(8))


def test_what_does_not_fit_is_an_error_with_a_remedy():
    shared = SharedArena(4 * ROW * 4)
    shared.pages((3, ROW), torch.float32)
    with pytest.raises(ConfigError, match=r"take 80\.0 KiB of a shared arena of 64\.0 KiB; give all engines"):
        shared.blocks((2, ROW), torch.float32)


def test_what_no_engine_has_used_is_told_from_what_one_has():
    shared = SharedArena(10 * ROW * 4)
    shared.pages((6, ROW), torch.float32)
    assert shared.filled_before(shared.blocks((1, ROW), torch.float32).tensor) == 0
    shared.pages((4, ROW), torch.float32)
    assert shared.filled_before(shared.blocks((6, ROW), torch.float32).tensor) == 3 * ROW
    assert shared.filled_before(shared.blocks((2, ROW), torch.float32).tensor) == 2 * ROW


def test_where_a_packed_page_was_there_is_no_number():
    shared = SharedArena(10 * ROW * 4)

    def filled_of(pages, rows):
        shared.pages((pages, ROW * 4), torch.uint8)
        return shared.filled_before(shared.blocks((rows, ROW), torch.float32).tensor)

    assert filled_of(4, 4) == 0
    assert filled_of(6, 3) == 2 * ROW, "KV before, but for its last row"
    assert filled_of(7, 2) == 2 * ROW
    assert filled_of(5, 5) == 0, "two rows of pages come first"
    assert filled_of(5, 5) == 5 * ROW
    shared.pages((8, ROW * 4), torch.uint8)  # of an engine whose KV nobody fills
    assert filled_of(5, 5) == 0
