"""transformers with accelerate's CPU offload: each layer's weights come to the GPU when it is their turn.

Needs torch, transformers and accelerate (requirements-accelerate.txt), nothing else; runs on a CPU too, for tests.

    python benchmarks/peers/accelerate_offload.py --gpu-memory 24GiB --gen-len 128 --json accelerate.json

All decoder layers are offloaded: what GPU memory they would take holds sequences instead, of which each pass serves
as many as fit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from common import Setting, Times, cap, run, setting
from hugging_face import build, fill, run_batch


def load(s: Setting) -> Any:
    """The model with random weights in host memory; embedding, norm and head on the GPU."""
    with init_empty_weights(include_buffers=False):
        model = build(s)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = parameter.new_empty(parameter.shape, device="cpu")
            fill(filled)
            setattr(module, name, type(parameter)(filled, requires_grad=False))
    model.tie_weights()
    for layer in model.model.layers:
        cpu_offload(layer, execution_device=s.device)
    for part in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head):
        part.to(s.device)
    return model


def recover(model: Any) -> None:
    """After a pass that failed: weights that it had brought to the GPU leave again."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hasattr(hook, "tied_pointers_to_remove"):  # its weights have been on the GPU
            hook.post_forward(module, None)


def main(argv: list[str] | None = None) -> int:
    s = setting(__doc__, argv)
    cap(s)
    model = load(s)

    def measure(size: int) -> Times:
        try:
            return run_batch(model, s, size)
        except torch.OutOfMemoryError:
            recover(model)
            raise

    run("transformers + accelerate", s, ("transformers", "accelerate"), measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
