"""On a GPU a pass must launch without waiting: a wait in one lane stalls the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lightning.kernels import ops
from moe_lightning.kernels.prefill_plan import PrefillPlan
from moe_lightning.kernels.reference import Segment
from moe_lightning.models.spec import RouterSpec
from moe_lightning.runtime.sampler import prompt_logprobs, sample
from moe_lightning.runtime.sampling_batch import RowSampling, build_sampling_batch
from moe_lightning.runtime.upload import Uploader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def no_waiting():
    """Turns every wait of the host for the GPU into an error."""

    def start():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


def test_sampling_does_not_wait(no_waiting):
    rows = [
        RowSampling(temperature=0),
        RowSampling(top_k=5, top_p=0.9, min_p=0.01, uniform=0.3, num_logprobs=3),
        RowSampling(
            repetition_penalty=1.2, prompt_ids=[1, 2], output_ids=[3], forbidden_ids=[7], uniform=0.9
        ),
        RowSampling(temperature=0, allowed=np.full(-(-5000 // 32), 1, dtype=np.int32)),
    ]
    uploader = Uploader(torch.device("cuda"))
    batch = build_sampling_batch(rows, 5000, uploader)
    uploader.send()
    logits = torch.randn(4, 5000, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([1, 2, 3, 4], device="cuda")
    no_waiting()
    sampled, scored = sample(logits, batch), prompt_logprobs(logits, ids, 2)
    torch.cuda.set_sync_debug_mode("default")
    assert sampled.token_ids.shape == scored.token_ids.shape == (4,)
    assert sampled.token_ids[3] % 32 == 0


def test_sampling_gives_the_tokens_of_the_cpu():
    rows = [RowSampling(temperature=0.7, top_p=0.9, uniform=i / 64) for i in range(64)]
    logits = torch.randn(64, 3000)
    uploader = Uploader(torch.device("cuda"))
    batch = build_sampling_batch(rows, 3000, uploader)
    uploader.send()
    there = sample(logits.cuda(), batch).token_ids.cpu()
    here = sample(logits, build_sampling_batch(rows, 3000)).token_ids
    assert (there == here).float().mean() > 0.98  # an exponential may differ in its last bit


def test_a_layers_kernels_can_be_captured_in_a_graph():
    tokens, hidden_size, heads, kv_heads, head_dim, num_experts, rows = 200, 256, 4, 2, 64, 8, 128
    device, dtype = torch.device("cuda"), torch.float16
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype)
    x, weight = torch.empty_like(hidden), torch.rand(hidden_size, device=device, dtype=dtype)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    out = torch.empty(tokens, heads * head_dim, device=device, dtype=dtype)
    cos, sin = (torch.rand(tokens, 1, head_dim, device=device, dtype=dtype) for _ in range(2))
    q, k, v = qkv.view(tokens, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    segments = [Segment(0, 0, 150), Segment(150, 150, tokens)]
    plan = PrefillPlan.of(segments, lambda values, dtype: torch.as_tensor(values, dtype=dtype, device=device))
    logits = torch.randn(tokens, num_experts, device=device, dtype=dtype)
    router = RouterSpec(top_k=2)
    ids = torch.empty(tokens, 2, device=device, dtype=torch.int64)
    weights = torch.empty(tokens, 2, device=device)
    frames = torch.randn(num_experts, 3 * rows * hidden_size, device=device, dtype=dtype) / 16
    table = torch.randperm(num_experts, device=device, dtype=torch.int32)
    workspace = ops.experts_workspace(tokens, 2, num_experts, hidden_size, rows, dtype, device)

    def layer():
        ops.rms_norm(hidden, weight, 1e-5, out=x)
        ops.rotate_(qkv, cos, sin, heads + kv_heads)
        ops.prefill_attention(q, k, v, plan, None, out)
        ops.route(logits, router, ids, weights)
        ops.experts_(hidden, x, ids, weights, frames, table, 1, workspace)

    first, first_qkv = hidden.clone(), qkv.clone()
    layer()
    expected = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait inside a capture is an error
        layer()
    hidden.copy_(first)
    qkv.copy_(first_qkv)
    graph.replay()
    assert torch.equal(hidden, expected)
