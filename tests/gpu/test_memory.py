"""What a GPU run takes of memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from shapes import write_config

from moe_lightning.memory.arena import HostArena
from moe_lightning.memory.mapped import device_view
from moe_lightning.runtime.cuda_executor import CudaExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

RUN = """
import json, sys, threading, time
import torch
from moe_lightning import LLM, SamplingParams
from moe_lightning.hardware.gpu_memory import device_bytes, pci_bus_id, process_bytes
address = pci_bus_id(0)
before = device_bytes(address)[0]
peak, done = 0, False
def watch():
    global peak
    while not done:
        held = process_bytes(address) or device_bytes(address)[0] - before
        peak = max(peak, held)
        time.sleep(0.005)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
llm = LLM(sys.argv[1], load_format="dummy", device="cuda", gpu_memory=int(sys.argv[2]), max_model_len=512,
          max_num_seqs=256, host_memory="20GiB")
prompts = [[3 + (i * 7 + j) % 1000 for j in range(1 + i % 300)] for i in range(300)]
llm.generate(prompts, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=6, ignore_eos=True), use_tqdm=False)
done = True
thread.join()
p = llm.policy
print(json.dumps({"peak": peak, "resident": sum(p.resident_pages), "frames": p.num_frames}))
"""


@pytest.mark.parametrize("gib", [6, 7, 16])
def test_the_driver_reports_no_more_than_the_cap_and_most_of_it_is_used(gib, tmp_path):
    model = write_config(tmp_path, num_layers=2)
    command = [sys.executable, "-c", RUN, str(model), str(gib * 2**30)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(gib, found)
    assert found["peak"] <= gib * 2**30
    if gib < 8:  # two layers take no more than that
        assert found["peak"] >= 0.75 * gib * 2**30


def test_engines_that_follow_each_other_take_no_more_memory_each():
    """cuBLAS sets memory aside for each stream that it has seen, and never gives it back."""
    held = []
    for _ in range(4):
        executor = CudaExecutor(torch.device("cuda", 0))
        with executor.scope():
            x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
            x @ x
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held == [held[0]] * 4


def test_locked_memory_is_one_memory_on_both_sides():
    arena = HostArena((3, 1000, 64), torch.bfloat16)
    arena.prepare(pin=True)
    assert arena.is_pinned, arena.refusal
    view = device_view(arena.tensor, torch.device("cuda"))
    view[1, 7] = 3.0
    torch.cuda.synchronize()
    assert arena.tensor[1, 7].eq(3).all()
    arena.tensor[2] = 5.0
    assert view[2].eq(5).all().item()


def test_an_arena_can_be_dropped_and_made_again():
    for _ in range(3):
        arena = HostArena((64, 4 * 2**20), torch.uint8)
        arena.prepare(pin=True)
        assert arena.is_pinned, arena.refusal
        del arena
