"""The CPU lane beside CUDA streams: in order, counted, and right again after an interrupt."""

from __future__ import annotations

import threading
import time

import pytest

from moe_lightning.runtime.cuda_executor import _CpuLane
from moe_lightning.runtime.stream_counter import StreamCounter


@pytest.fixture
def lane():
    return _CpuLane(StreamCounter(in_stream=False))


def test_tasks_run_in_order_and_each_number_means_all_before_it(lane):
    done = []
    numbers = [lane.put(lambda i=i: (time.sleep(1e-3), done.append(i))) for i in range(20)]
    assert numbers == sorted(set(numbers))
    lane.counter.wait_here(numbers[9])
    assert done[:10] == list(range(10))
    lane.wait()
    assert done == list(range(20))


def test_a_number_lost_to_an_interrupt_shifts_no_other(lane):
    """Ctrl-C may come between counting a task and handing it over."""
    done = []
    lane.put(lambda: done.append("a"))
    lane._num_put += 1
    number = lane.put(lambda: (time.sleep(0.05), done.append("b")))
    lane.counter.wait_here(number)
    assert done == ["a", "b"]
    lane.wait()


def test_threads_end_with_their_lanes():
    def running():
        return {thread for thread in threading.enumerate() if thread.name == "lane-cpu"}

    before = running()
    lanes = [_CpuLane(StreamCounter(in_stream=False)) for _ in range(5)]
    done = []
    for number, lane in enumerate(lanes):
        lane.put(lambda number=number: done.append(number))
        lane.wait()
    mine = running() - before
    assert len(mine) == 5
    del lane
    lanes.clear()
    for thread in mine:
        thread.join(60)
    assert not running() & mine
    assert done == list(range(5))


def test_a_count_beyond_32_bits_is_seen_by_the_driver_as_the_next():
    counter = StreamCounter(in_stream=False)
    counter.raise_to(2**31 - 1)
    assert counter._words[0] == 2**31 - 1
    counter.raise_to(2**31)
    assert counter._words[0] == -(2**31)
    assert counter.value == 2**31
