"""DeepSpeed ZeRO-3 inference with parameters offloaded to pinned host memory.

Needs torch, transformers, accelerate and deepspeed (requirements-deepspeed.txt). deepspeed is a source
distribution; built as a wheel without its operations it is pure Python, 2 MB, which is how it gets to a machine
without a network:

    export DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1
    pip wheel --no-deps --no-build-isolation --wheel-dir wheels deepspeed hjson py-cpuinfo msgpack einops

There: ``pip install --no-index --no-deps wheels/*.whl``; what else it imports (ninja, pydantic, psutil, tqdm,
packaging) comes with most installations of torch and transformers, else goes along. Without a CUDA toolkit set
DS_IGNORE_CUDA_DETECTION=1. Runs on a GPU only.

    python benchmarks/peers/deepspeed_zero3.py --gpu-memory 24GiB --gen-len 128 --json deepspeed.json

Pinned memory comes in powers of two, so that 87 GiB of weights take up to 100. After a batch that did not fit,
weights that it had gathered may stay on the GPU: then name one that fits, such as --batches 512.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from common import Setting, cap, run, setting
from hugging_face import build, run_batch

_ALONE = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
}


def deepspeed_config(hidden_size: int) -> dict[str, Any]:
    """ZeRO-3 with parameters in host memory, as its documentation recommends for inference."""
    return {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": 2 * hidden_size * hidden_size,
            "stage3_param_persistence_threshold": hidden_size,
            "stage3_max_live_parameters": 2 * hidden_size * hidden_size,
        },
        "train_batch_size": 1,
        "wall_clock_breakdown": False,
    }


def load(s: Setting) -> Any:
    """The model, its weights made piece by piece on the GPU, as transformers draws them, and moved to the host."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    deepspeed.init_distributed()
    values = deepspeed_config(s.config_values()["hidden_size"])
    # As long as it lives, transformers puts parameters where it says when it makes a model.
    _kept.append(HfDeepSpeedConfig(values))
    engine = deepspeed.initialize(model=build(s), config=values)[0]
    engine.module.eval()
    return engine.module


_kept: list[Any] = []


def main(argv: list[str] | None = None) -> int:
    s = setting(__doc__, argv)
    if s.device.type != "cuda":
        sys.exit("DeepSpeed's ZeRO-3 needs a GPU")
    cap(s)
    model = load(s)
    run("DeepSpeed ZeRO-3", s, ("deepspeed", "transformers"), lambda size: run_batch(model, s, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
