"""Small arrays reach the GPU whole, beside copies of pages, and never as they were a pass ago."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lightning.runtime.upload import Uploader

pytestmark = pytest.mark.gpu
DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def test_what_is_put_is_on_the_device_after_it_is_sent():
    uploader, random = Uploader(torch.device("cuda"), capacity=4096), np.random.default_rng(0)
    pages = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    frame, copies = pages.to("cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(copies):
            frame.copy_(pages, non_blocking=True)
        uploader.clear()
        values = [
            random.integers(0, 2**31 - 1, size=random.integers(0, 400)) for _ in range(random.integers(1, 9))
        ]
        put = [uploader.put(v, DTYPES[i % 4]) for i, v in enumerate(values)]
        uploader.send()
        for i, (tensor, expected) in enumerate(zip(put, values, strict=True)):
            assert torch.equal(tensor.cpu(), torch.from_numpy(expected).to(DTYPES[i % 4]))
    torch.cuda.synchronize()
