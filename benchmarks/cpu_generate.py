"""Generation on this machine's CPU: this engine beside transformers' own generate, same prompts, same run.

Each engine runs in a process of its own, so that peak memory is its own. Transformers is given every batch size
and experts implementation listed below; its best counts.

    python benchmarks/cpu_generate.py --model .cache/demo-model --json benchmarks/results/cpu_generate.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NUM_PROMPTS = 64
NEW_TOKENS = 64
PEER_VARIANTS = [(64, "default"), (64, "eager"), (64, "grouped_mm"), (64, "batched_mm"), (16, "default")]
ROOT = Path(__file__).resolve().parent.parent


def prompt_ids(model: str) -> list[list[int]]:
    """The demo prompts through the chat template, repeated to NUM_PROMPTS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = []
    for line in (ROOT / "examples" / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        body = json.loads(line)["body"]
        text = body.get("prompt")
        if text is None:
            text = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return (ids * (NUM_PROMPTS // len(ids) + 1))[:NUM_PROMPTS]


def run_ours(model: str) -> dict[str, Any]:
    from moe_lightning import LLM, SamplingParams

    llm = LLM(model, dtype="float32")
    ids = prompt_ids(model)
    # As transformers' min_new_tokens: the end of a text is never chosen, not passed over.
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    llm.generate([ids[0]], SamplingParams(max_tokens=2, temperature=0))  # warm-up
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": i} for i in ids], params)
    seconds = time.perf_counter() - start
    generated = sum(len(o.outputs[0].token_ids) for o in outputs)
    block = llm.policy.block_size
    held = sum(-(-(len(i) + NEW_TOKENS) // block) * block for i in ids)
    return {
        "engine": "moe-lightning",
        "seconds": seconds,
        "generated_tokens": generated,
        "prompt_tokens": sum(map(len, ids)),
        "weights_bytes": llm.spec.num_parameters * 4,
        "kv_bytes": held * llm.spec.kv_bytes_per_token(4),
        "token_ids": [list(o.outputs[0].token_ids) for o in outputs],
    }


def run_transformers(model: str, batch_size: int, experts: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    more = {} if experts == "default" else {"experts_implementation": experts}
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **more).eval()
    ids = prompt_ids(model)
    generate(peer, [ids[0]], 2)  # warm-up
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours of like length: less padding
    tokens: list[list[int]] = [[] for _ in ids]
    start = time.perf_counter()
    for first in range(0, len(ids), batch_size):
        members = order[first : first + batch_size]
        for i, answer in zip(members, generate(peer, [ids[i] for i in members], NEW_TOKENS), strict=True):
            tokens[i] = answer
    seconds = time.perf_counter() - start
    return {
        "engine": "transformers",
        "batch_size": batch_size,
        "experts_implementation": experts,
        "seconds": seconds,
        "generated_tokens": sum(map(len, tokens)),
        "prompt_tokens": sum(map(len, ids)),
        "token_ids": tokens,
    }


def generate(peer: Any, ids: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of exactly new_tokens tokens, from left-padded prompts."""
    import torch

    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    out = peer.generate(
        padded, attention_mask=mask, do_sample=False, pad_token_id=0,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens,
    )  # fmt: skip
    return [row[width:].tolist() for row in out]


def child(model: str, *args: str) -> dict[str, Any] | None:
    """One engine's run in its own process; None if it failed."""
    command = [sys.executable, __file__, "--model", model, "--child", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"  {' '.join(args)}: failed with exit code {done.returncode}")
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rate = found["generated_tokens"] / found["seconds"]
    print(
        f"  {' '.join(args):32} {rate:8.1f} tokens/s, peak memory {found['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
    return found


def compare(model: str) -> dict[str, Any]:
    import torch

    print(f"{NUM_PROMPTS} prompts, {NEW_TOKENS} new tokens each, float32, {torch.get_num_threads()} threads")
    ours = child(model, "ours")
    peers = [p for size, experts in PEER_VARIANTS if (p := child(model, "transformers", str(size), experts))]
    ours_again = child(model, "ours")
    if ours is None or ours_again is None or not peers:
        raise SystemExit("a run failed; nothing to compare")
    best = min(peers, key=lambda p: p["seconds"])
    same = sum(a == b for a, b in zip(ours["token_ids"], best["token_ids"], strict=True))
    for run in (ours, ours_again, *peers):
        run["tokens_per_s"] = run["generated_tokens"] / run["seconds"]
        del run["token_ids"]
    slower = min(ours, ours_again, key=lambda r: r["tokens_per_s"])
    beside = slower["peak_rss_bytes"] - slower["weights_bytes"] - slower["kv_bytes"]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "workload": {
            "prompts": NUM_PROMPTS,
            "new_tokens": NEW_TOKENS,
            "prompt_tokens": ours["prompt_tokens"],
        },
        "ours": [ours, ours_again],
        "transformers": peers,
        "ratio_to_best_peer": slower["tokens_per_s"] / best["tokens_per_s"],
        "equal_answers": f"{same} of {NUM_PROMPTS}",
        "memory_beside_weights_and_kv_bytes": beside,
    }


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/demo-model")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        engine, *rest = args.child
        found = (
            run_ours(args.model) if engine == "ours" else run_transformers(args.model, int(rest[0]), rest[1])
        )
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found))
        return
    result = compare(args.model)
    print(f"ratio to the best transformers run: {result['ratio_to_best_peer']:.2f}; "
          f"equal answers: {result['equal_answers']}; memory beside weights and KV: "
          f"{result['memory_beside_weights_and_kv_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
