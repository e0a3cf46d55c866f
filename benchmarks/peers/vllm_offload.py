"""vLLM with its prefetching weight offload, where vLLM is installed (requirements-vllm.txt).

Its wheel has some 400 MB: it has to be installed on the machine already. Runs on a GPU only. The last layers are
kept in host memory and fetched ahead: as many as have to be, so that a fifth of the cap is left for KV.

    python benchmarks/peers/vllm_offload.py --gpu-memory 24GiB --gen-len 128 --json vllm.json
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Setting, Times, run, setting

_KV_SHARE = 0.2  # of the cap; vLLM keeps KV on the GPU


def offload_flags(s: Setting, weight_bytes: int, total_memory: int) -> dict[str, Any]:
    """One group of all layers, of which as few as possible are offloaded."""
    layers = s.config_values()["num_hidden_layers"]
    allowed = s.gpu_memory or total_memory
    resident = max(0.0, (1 - _KV_SHARE) * allowed - 2 * weight_bytes / layers)  # two layers are on their way
    offloaded = min(layers, math.ceil(layers * max(0.0, 1 - resident / weight_bytes)))
    return {
        "offload_group_size": layers, "offload_num_in_group": offloaded, "offload_prefetch_step": 1,
        "gpu_memory_utilization": min(0.95, allowed / total_memory),
    }  # fmt: skip


def load(s: Setting) -> Any:
    """An engine over random weights."""
    import torch
    from vllm import LLM

    from moe_lightning.bench.models import spec_of

    values = s.config_values()
    directory = Path(tempfile.mkdtemp())
    (directory / "config.json").write_text(json.dumps(values))
    weight_bytes = 2 * spec_of(str(directory)).num_parameters
    total = torch.cuda.get_device_properties(0).total_memory
    return LLM(
        str(directory), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
        max_model_len=s.prompt_len + s.work.gen_len, max_num_seqs=max(s.batches),
        **offload_flags(s, weight_bytes, total),
    )  # fmt: skip


def run_batch(llm: Any, s: Setting, size: int) -> Times:
    """Whole answers: prompts alone once, and then with so many tokens that the difference is decode passes."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [3 + (17 * i + j) % 30000 for j in range(s.prompt_len)]} for i in range(size)
    ]

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    prefill_s, passes = seconds(1), min(s.passes, s.work.gen_len - 1)
    each = (seconds(1 + passes) - prefill_s) / passes
    return Times(prefill_s, (each,) * passes)


def main(argv: list[str] | None = None) -> int:
    s = setting(__doc__, argv)
    if s.device.type != "cuda":
        sys.exit("vLLM's offload needs a GPU")
    llm = load(s)
    run("vLLM, prefetch offload", s, ("vllm",), lambda size: run_batch(llm, s, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
