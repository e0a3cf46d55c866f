"""Kernels run under Triton's interpreter on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Relative error of a result, ||out - reference|| / ||reference||, that rounding to the dtype explains.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(
    params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    """Where the test's tensors are."""
    on_gpu = torch.cuda.is_available()
    if request.param == "cuda" and not on_gpu:
        pytest.skip("needs a CUDA device")
    if request.param == "interpreter" and on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 tests the interpreter")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    """Dtype of weights and activations."""
    return request.param


@pytest.fixture
def dot_dtype(device, dtype):
    """A dtype whose products the device computes: the interpreter multiplies the bits of bfloat16 as integers."""
    if device.type == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 products")
    return dtype


@pytest.fixture
def assert_close():
    """Compares with a reference in float32 or wider; an element that is not a number never passes."""

    def check(out, reference, dtype, factor=1.0):
        out, reference = out.double().cpu(), reference.double().cpu()
        assert out.shape == reference.shape
        assert out.isfinite().all()
        error = (out - reference).norm() / reference.norm().clamp(min=1e-30)
        assert error <= factor * TOLERANCES[dtype], f"relative error {error:.2e}"

    return check
