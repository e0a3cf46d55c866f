"""What a pass leaves behind."""

import gc

import pytest
import torch

from checkpoints import load
from moe_lightning import SamplingParams


def tensors(objects):
    return [found for found in objects if issubclass(type(found), torch.Tensor)]


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_a_pass_leaves_no_tensors_to_the_garbage_collector(mixtral, executor):
    llm = load(mixtral, executor=executor)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    llm.generate(["the fox"], params, use_tqdm=False)
    gc.collect()
    earlier = tensors(gc.get_objects())  # of other tests: as long as they are kept, none becomes garbage
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        llm.generate(["the fox"], params, use_tqdm=False)
        gc.collect()
        left = [type(found).__name__ for found in tensors(gc.garbage)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert earlier and not left
