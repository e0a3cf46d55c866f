"""The ablation of `moe-lightning bench schedules` as the simulation sees it: for a profile, or a datasheet.

python benchmarks/predict_schedules.py --profile benchmarks/results/profile_h100.json --card h100 \
        --gpu-memory 24GiB --host-memory 125GiB --gen-len 128
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from math import ceil
from pathlib import Path

from moe_lightning.bench.models import spec_of
from moe_lightning.bench.variants import VARIANTS, Variant, paper_plan, policy_of
from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile import Profile
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.default_policy import Memory
from moe_lightning.perf.paper_model import PaperMachine
from moe_lightning.perf.passes import Passes
from moe_lightning.perf.planner import problem_of, search
from moe_lightning.perf.rates import DatasheetRates, MeasuredRates, Rates
from moe_lightning.perf.workload import Workload, num_decoding
from moe_lightning.policy import Policy
from moe_lightning.units import GIB, parse_bytes

_CONTEXT = GIB * 7 // 8  # the driver's and the kernels'


def predicted(
    variant: Variant, policy: Policy, spec: ModelSpec, rates: Rates, work: Workload
) -> tuple[float, float]:
    """Seconds of a full pass, and generated tokens/s."""
    n = num_decoding(policy, work)

    def seconds(decode: int, prefill: int, context: float) -> float:
        passes = Passes(
            spec, "bfloat16", policy, rates, context, work.mean_prompt, token_prompt=work.token_prompt
        )
        return passes.steady(decode, prefill)[0]

    if not variant.in_batches:
        prompts = min(round(n * work.mean_prompt / work.gen_len), policy.prefill_tokens)
        pass_s = seconds(n, prompts, work.mean_context)
        return pass_s, n / pass_s
    pass_s = seconds(n, 0, work.mean_prompt + work.gen_len / 2 + 1)
    most = min(n + policy.prefill_tokens, round(n * work.mean_prompt))
    ramp_s = n * work.mean_prompt / most * seconds(0, most, work.mean_prompt + 1)
    return pass_s, n * work.gen_len / (ramp_s + (work.gen_len - 1) * pass_s)


def main() -> None:
    args = _arguments()
    spec, work = spec_of(args.model), workload(args.workload, args.gen_len)
    rates: Rates = DatasheetRates(preset(args.card))
    if args.profile:
        rates = MeasuredRates(Profile.from_json(json.loads(args.profile.read_text(encoding="utf-8"))))
    usable = args.host_memory - max(3 * GIB, ceil(0.03 * args.host_memory))
    memory = Memory(usable, args.gpu_memory - _CONTEXT)
    problem = problem_of(spec, "bfloat16", memory, work)
    ours = {
        packs: search(spec, "bfloat16", memory, rates, work, packs=packs).policy for packs in (True, False)
    }
    machine = PaperMachine.of(preset(args.card))
    machine = replace(machine, gpu_memory=args.gpu_memory, host_memory=args.host_memory)
    paper, first = paper_plan(spec, machine, work), 0.0
    print(
        "| variant | experts | sequences | micro-batches of | pages resident | pass, s | tokens/s | ratio |"
    )
    print("| --- " * 8 + "|")
    for variant in VARIANTS.values():
        policy = policy_of(variant, ours[variant.packs], problem, paper)
        pass_s, rate = predicted(variant, policy, spec, rates, work)
        first = first or rate
        resident = sum(policy.resident_pages) / (
            spec.num_layers * spec.experts.num_experts * policy.pages_per_expert
        )
        sizes = f"{num_decoding(policy, work):,} | {policy.micro_batch_size} | {resident:.0%}"
        experts = "packed" if policy.packed else "plain"
        print(f"| {variant.what} | {experts} | {sizes} | {pass_s:.2f} | {rate:,.0f} | {rate / first:.2f} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", type=Path, help="default: the card's datasheet")
    add("--card", default="h100", help="preset that the paper's planner takes its rates from")
    add("--model", default="mixtral-8x7b")
    add("--workload", default="mtbench", choices=WORKLOADS)
    add("--gen-len", type=int, default=128)
    add("--gpu-memory", type=parse_bytes, default=24 * GIB)
    add("--host-memory", type=parse_bytes, default=125 * GIB)
    return parser.parse_args()


if __name__ == "__main__":
    main()
