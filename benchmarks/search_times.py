"""How long the planner's search takes, and what it finds: for every model, over memories and answer lengths.

    python benchmarks/search_times.py --profile benchmarks/results/profile_h100.json --out times.json configs/*.json
    python benchmarks/search_times.py --before before.json --out times.json ...    # and says which plans got worse
    python benchmarks/search_times.py --requests 10000 ...                         # of jobs of so many requests

A config whose architecture is not supported is planned as a Mixtral of its sizes: a search of as many layers,
experts and pages. Seconds are those of the processor, so that other programs on the machine do not count. A model
that fits into none of the memories gets the smallest larger ones that hold it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

from moe_lightning.bench.machine import facts
from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.errors import ConfigError, MoELightningError, NoFeasiblePolicyError
from moe_lightning.hardware.profile import Profile
from moe_lightning.models.hf_config import HFConfig
from moe_lightning.models.known import KNOWN_MODELS
from moe_lightning.models.registry import resolve, spec_from_config
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.planner import search
from moe_lightning.perf.rates import MeasuredRates
from moe_lightning.units import GIB

_GPU, _LARGE_GPU = (16, 24), (48, 80, 160)  # GiB
_HOST, _LARGE_HOST = (64, 128, 256), (512, 1024, 2048)
_GEN = (32, 128, 512)
_BOUND_S, _WORSE = 5.0, 0.002
Row = dict[str, Any]

# Where configs have what Mixtral's has under its own name.
_NAMES = {
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "kv_n_heads"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_local_experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "moe_top_k"),
    "max_position_embeddings": ("max_position_embeddings", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}


def as_mixtral(config: dict[str, Any], name: str) -> ModelSpec:
    """A Mixtral of a config's sizes; a latent KV cache as two heads of 128, about as many bytes."""
    flat = config | config.get("ffn_config", {}) | config.get("attn_config", {})
    values: dict[str, Any] = {
        ours: next(flat[k] for k in theirs if k in flat) for ours, theirs in _NAMES.items()
    }
    if "kv_lora_rank" in flat:
        values |= {"num_key_value_heads": 2, "head_dim": 128}
    elif "head_dim" in flat:
        values["head_dim"] = flat["head_dim"]
    usual = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "dtype": "bfloat16", "hidden_act": "silu"}
    return spec_from_config(HFConfig({"architectures": ["MixtralForCausalLM"], **usual, **values}, name))


def models(paths: list[Path]) -> Iterator[tuple[str, ModelSpec]]:
    """The known models, then those of the files."""
    for name in KNOWN_MODELS:
        yield name, resolve(name)
    for path in paths:
        try:
            yield path.name, resolve(str(path))
        except MoELightningError:
            yield path.name, as_mixtral(json.loads(path.read_text(encoding="utf-8")), path.name)


def cells(spec: ModelSpec, rates: MeasuredRates, lengths: str, requests: int | None = None) -> Iterator[Row]:
    """A row for each of the memories that hold the model, or for the smallest larger ones."""
    usual = [
        row for gpu in _GPU for host in _HOST for row in _rows(spec, rates, lengths, requests, gpu, host)
    ]
    if usual:
        yield from usual
        return
    for gpu in (*_GPU, *_LARGE_GPU):
        for host in (*_HOST, *_LARGE_HOST):
            if found := list(_rows(spec, rates, lengths, requests, gpu, host)):
                yield from found
                return


def _rows(
    spec: ModelSpec, rates: MeasuredRates, lengths: str, requests: int | None, gpu: int, host: int
) -> Iterator[Row]:
    for gen in _GEN:
        gc.collect()
        gc.freeze()  # what earlier searches remember is in no user's process: the collector need not look at it
        start = time.process_time()
        try:
            found = search(
                spec, "bfloat16", Memory(host * GIB, gpu * GIB), rates, workload(lengths, gen, requests)
            )  # fmt: skip
        except (ConfigError, NoFeasiblePolicyError):
            continue
        seconds = time.process_time() - start
        yield {
            "gpu": gpu, "host": host, "gen": gen, "seconds": seconds, "tokens_per_s": found.tokens_per_s,
        }  # fmt: skip


def summary(rows: list[Row], before: list[Row] | None) -> str:
    """A line for each model; with what was found before, how much the plans differ."""
    key = ("model", "gpu", "host", "gen")
    old = {tuple(row[k] for k in key): row for row in before or []}
    lines = [
        "| model | searches | median s | most s | before, most s | plans, worst | best |",
        "| --- " * 7 + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model]
        pairs = [(row, old[found]) for row in of if (found := tuple(row[k] for k in key)) in old]
        changes = [row["tokens_per_s"] / was["tokens_per_s"] - 1 for row, was in pairs] or [0.0]
        most = max((was["seconds"] for _, was in pairs), default=float("nan"))
        lines.append(
            f"| {model} | {len(of)} | {statistics.median(row['seconds'] for row in of):.2f} "
            f"| {max(row['seconds'] for row in of):.2f} | {most:.2f} | {min(changes):+.2%} | {max(changes):+.2%} |"
        )
    worse = sum(
        row["tokens_per_s"] < (1 - _WORSE) * old[found]["tokens_per_s"]
        for row in rows if (found := tuple(row[k] for k in key)) in old
    )  # fmt: skip
    slow = sum(row["seconds"] > _BOUND_S for row in rows)
    falls = list(falls_with_more_memory(rows))
    lines.append(
        f"\n{len(rows)} searches, {slow} over {_BOUND_S:g} s, {worse} plans worse by over {_WORSE:.1%}; "
        f"{len(falls)} pairs in which more memory is slower by over that, {max(falls, default=0):.1%} at most"
    )
    return "\n".join(lines)


def falls_with_more_memory(rows: list[Row]) -> Iterator[float]:
    """By how much each plan that has as much or more of both memories than another one is slower."""
    for less, more in permutations(rows, 2):
        same = all(less[name] == more[name] for name in ("model", "gen"))
        if same and less["gpu"] <= more["gpu"] and less["host"] <= more["host"]:
            fall = 1 - more["tokens_per_s"] / less["tokens_per_s"]
            if fall > _WORSE:
                yield fall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="*", help="config.json files, beside the known models")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--workload", default="mtbench", choices=WORKLOADS)
    parser.add_argument("--requests", type=int, help="of a job; default: as many as keep the machine busy")
    parser.add_argument("--only", help="part of the models' names")
    args = parser.parse_args()
    rates = MeasuredRates(Profile.from_json(json.loads(args.profile.read_text(encoding="utf-8"))))
    about, rows = facts(), list[Row]()
    for name, spec in models(args.config):
        if args.only and args.only not in name:
            continue
        found = [{"model": name, **row} for row in cells(spec, rates, args.workload, args.requests)]
        rows += found
        print(
            f"{name}: {len(found)}, {max((row['seconds'] for row in found), default=0):.2f} s at most",
            flush=True,
        )
        args.out.write_text(
            json.dumps(
                about | {"workload": args.workload, "requests": args.requests, "searches": rows}, indent=1
            )
            + "\n",
            encoding="utf-8",
        )
    before = json.loads(args.before.read_text(encoding="utf-8"))["searches"] if args.before else None
    print(summary(rows, before))


if __name__ == "__main__":
    main()
