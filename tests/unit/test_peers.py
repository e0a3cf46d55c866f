"""Runners of other systems: the same model, lengths and form of results as ours; the largest batch that fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import common
import deepspeed_zero3
import hugging_face
import vllm_offload

TINY = {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 120, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def flags(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return [
        f"--model={path}", "--gen-len=6", "--batches=2,8,4", f"--json={tmp_path / 'out' / 'result.json'}",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def model_of(s):
    torch.manual_seed(0)
    return hugging_face.build(s)


def test_passes_give_the_tokens_of_transformers_own_generate(flags):
    s = common.setting(None, flags)
    model = model_of(s)
    assert model.config._experts_implementation == "eager"
    ids = torch.randint(3, 120, (3, 7))
    found = hugging_face.passes(model, s, ids, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat([tokens for _, tokens in found], dim=1), expected[:, 7:])


def test_the_largest_batch_that_fits_counts_and_those_before_it_are_told(flags, tmp_path):
    s = common.setting(None, flags)
    tried = []

    def run_batch(size):
        tried.append(size)
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")
        return common.Times(2.0, (1.0, 3.0, 1.0))

    result = common.run("peer", s, ("torch", "not-there"), run_batch)
    assert tried == [8, 4]
    assert result["runs"][0] == {
        "batch_size": 8, "error": "CUDA out of memory. Tried to allocate 1.00 GiB",
    }  # fmt: skip
    assert result["runs"][1]["tokens_per_s"] == 4 * 6 / (2.0 + 5 * 1.0)
    assert result["runs"][1]["is_extrapolated"]
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["runs"][1]["batch_size"] == 4 and written["workload"]["gen_len"] == 6
    assert written["packages"]["torch"] and written["packages"]["not-there"] is None
    assert written["prompt_len"] == 76


def test_offloaded_passes_give_the_tokens_of_the_model_itself(flags):
    pytest.importorskip("accelerate")
    import accelerate_offload

    s = common.setting(None, flags)
    model = accelerate_offload.load(s)
    assert {p.device.type for p in model.model.layers.parameters()} == {"meta"}
    plain = hugging_face.build(s)
    for parameter in plain.parameters():
        hugging_face.fill(parameter.data)
    ids = torch.randint(3, 120, (3, 7))
    found, expected = (hugging_face.passes(m, s, ids, 4) for m in (model, plain))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))

    def fail(*args):
        raise torch.OutOfMemoryError

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    attention = model.model.layers[0].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        hugging_face.passes(model, s, ids, 1)
    accelerate_offload.recover(model)
    assert {p.device.type for p in model.model.layers.parameters()} == {"meta"}
    hook.remove()
    attention.remove()
    again = hugging_face.passes(model, s, ids, 1)
    assert torch.equal(again[0][1], expected[0][1])


def test_runners_that_need_a_gpu_say_so(flags):
    for runner in (deepspeed_zero3, vllm_offload):
        with pytest.raises(SystemExit, match="needs a GPU"):
            runner.main(flags)


def test_vllm_offloads_as_few_layers_as_the_cap_allows():
    s = common.setting(None, ["--model=mixtral-8x7b", "--gpu-memory=24GiB"])
    weights, total = 87 * 2**30, 80 * 2**30
    found = vllm_offload.offload_flags(s, weights, total)
    layer = weights / 32
    on_gpu = (32 - found["offload_num_in_group"] + 2) * layer
    assert on_gpu <= 0.8 * 24 * 2**30 < on_gpu + layer
    assert found["offload_group_size"] == 32 and found["gpu_memory_utilization"] == pytest.approx(0.3)


def test_deepspeed_keeps_parameters_in_pinned_host_memory():
    zero = deepspeed_zero3.deepspeed_config(4096)["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_param"] == {"device": "cpu", "pin_memory": True}
