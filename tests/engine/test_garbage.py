"""What a pass leaves behind."""

import gc

import pytest
import torch

from checkpoints import load
from moe_lightning import SamplingParams


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_a_pass_leaves_no_tensors_to_the_garbage_collector(mixtral, executor):
    llm = load(mixtral, executor=executor)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    llm.generate(["the fox"], params, use_tqdm=False)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        llm.generate(["the fox"], params, use_tqdm=False)
        gc.collect()
        left = [type(found).__name__ for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left
