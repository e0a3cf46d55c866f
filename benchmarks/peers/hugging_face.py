"""A model of transformers with random weights, and its passes, for the runners that offload one."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from common import Setting, Times
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TILE = 2**24


def config(s: Setting) -> Any:
    """Of transformers; experts one after the other: its other ways copy weights or run out of memory."""
    values = s.config_values()
    model_type = values["architectures"][0].removesuffix("ForCausalLM").lower()
    found = CONFIG_MAPPING[model_type](**values)
    found._attn_implementation = "sdpa"
    if hasattr(found, "num_local_experts"):
        found._experts_implementation = "eager"
    return found


def build(s: Setting) -> torch.nn.Module:
    """The model, nothing of it initialized; the caller says where parameters are made."""
    dtype = torch.bfloat16 if s.device.type == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config(s), dtype=dtype).eval()


@torch.no_grad()
def fill(parameter: torch.Tensor) -> None:
    """Random numbers, one tile of them over and over: zeros would be faster than what a model holds."""
    flat = parameter.view(-1)
    if parameter.dim() == 1:
        flat.fill_(1.0)
        return
    for start in range(0, len(flat), _TILE):
        part = flat[start : start + _TILE]
        torch.mul(_tile(parameter.dtype)[: len(part)], parameter.shape[-1] ** -0.5, out=part)


@cache
def _tile(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).to(dtype)


def run_batch(model: Any, s: Setting, size: int) -> Times:
    """Prompts, then decode passes."""
    ids = torch.randint(3, model.config.vocab_size, (size, s.prompt_len), device=s.device)
    first, *rest = [seconds for seconds, _ in passes(model, s, ids, 1 + min(s.passes, s.work.gen_len - 1))]
    return Times(first, tuple(rest))


@torch.inference_mode()
def passes(model: Any, s: Setting, ids: torch.Tensor, count: int) -> list[tuple[float, torch.Tensor]]:
    """Seconds of each pass and the tokens [B, 1] that it gives.

    The cache has room for whole answers from the start: what runs here would run to its end.

    Args:
        model: of transformers.
        s: says how long answers are.
        ids: [B, T], prompts of one length.
        count: passes, the first over the prompts.
    """
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + s.work.gen_len)
    found, position = [], 0
    for _ in range(count):
        _wait(s)
        start = time.perf_counter()
        places = torch.arange(position, position + ids.shape[1], device=s.device)
        out = model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=places,
            position_ids=places[None].expand(len(ids), -1),
        )  # fmt: skip
        position += ids.shape[1]
        ids = out.logits[:, -1:].argmax(-1)
        _wait(s)
        found.append((time.perf_counter() - start, ids))
    return found


def _wait(s: Setting) -> None:
    if s.device.type == "cuda":
        torch.cuda.synchronize()
