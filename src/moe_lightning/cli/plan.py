"""The verb `plan`: the policy for a model on a machine, and what it is predicted to do."""

from __future__ import annotations

import json
import math
import shutil
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lightning.cli.flags import add_count
from moe_lightning.errors import ConfigError, NoFeasiblePolicyError
from moe_lightning.hardware.presets import preset
from moe_lightning.hardware.profile import Profile
from moe_lightning.hardware.profile_cache import cache_path, changes_here, load_profile
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.models.from_headers import resolve_to_plan
from moe_lightning.models.spec import ModelSpec
from moe_lightning.units import GIB, parse_bytes

SUMMARY = "find how a model would run on a machine, before anything is downloaded"
DESCRIPTION = (
    "Finds the policy for a model on a machine from the model's config.json or name alone, and says what it is "
    "predicted to do. `--plot` draws the machine's rooflines with the model's operators on them."
)


_HOST_SHARE = 0.95  # of a machine's host memory: the system has the rest
_HARDWARE, _PROMPT, _ANSWER = "l4", 77, 32
# Flags of which one says already what the other would, and why.
_APART = (
    ("input", "avg_prompt_len", "the file has its prompts"),
    ("input", "gen_len", "the file says how long answers may be"),
    ("input", "num_requests", "the file has its requests"),
    ("profile", "hardware", "the profile is of a machine"),
    ("profile", "cpu_mem_bdw", "the profile has that rate"),
)
_NOT_PAPERS = ("input", "num_requests", "max_model_len")


@dataclass(frozen=True)
class Answer:
    """What a cost model says: for people, as far as it is known; for programs; the drawing's micro-batch size."""

    text: Iterable[str]
    values: Callable[[], dict[str, Any]]
    micro_batch_size: int


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="checkpoint (its weights alone will do), config.json or a name such as mixtral-8x7b",
    )
    add(
        "--cost-model",
        choices=tuple(_COST_MODELS),
        default="ours",
        help="ours simulates the schedule; paper is the closed form of arXiv 2411.11217 (default: ours)",
    )
    add(
        "--hardware",
        metavar="NAME",
        help=f"machine, such as t4, l4, h100-sxm, or this: what `profile` measured (default: {_HARDWARE})",
    )
    add(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="GPU memory, such as 16GiB (default: all of the machine's)",
    )
    add("--host-memory", type=_size, metavar="SIZE", help="host memory (default: all of the machine's)")
    add("--cpu-mem-bdw", type=rate, metavar="GIB/S", help="bandwidth of host memory (default: the machine's)")
    add_count(parser, "--avg-prompt-len", f"tokens of a prompt (default: {_PROMPT})")
    add_count(parser, "--gen-len", f"tokens of an answer (default: {_ANSWER})")
    add(
        "--input",
        type=Path,
        metavar="FILE",
        help="plan for this batch file instead; a token is taken for four bytes of text",
    )
    add_count(parser, "--num-requests", "requests of the job (default: what fills KV memory twice)")
    longest = "tokens of the longest sequence, such as 16k (default: the longest of the job)"
    add_count(parser, "--max-model-len", longest)
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="rates that `moe-lightning profile --json FILE` measured, instead of --hardware",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    add("--plot", type=Path, metavar="FILE", help="draw the rooflines (.svg or .png); needs matplotlib")


def run(args: Namespace) -> int:
    """Print the plan, and draw it where that was asked for.

    Raises:
        ConfigError: a value cannot be used, or the drawing cannot be made.
        NoFeasiblePolicyError: the model does not fit the machine.
    """
    _check_together(args)
    if args.plot:  # what cannot be drawn is said before the search
        from moe_lightning.perf.roofline_plot import check_plot_path

        check_plot_path(args.plot)
    (spec, notes), profile = resolve_to_plan(args.model), _profile(args)
    hardware = _machine(args, profile)
    answer = _COST_MODELS[args.cost_model](spec, hardware, profile, args, notes)
    if args.plot:
        _plot(args, spec, hardware, answer.micro_batch_size)
    if args.json:
        print(json.dumps(answer.values(), indent=1))
    else:
        for text in answer.text:
            print(text, flush=True)
    return 0


def _check_together(args: Namespace) -> None:
    """Refuse flags that would be without effect, then fill in what was not given."""
    for one, other, why in _APART:
        if getattr(args, one) and getattr(args, other):
            raise ConfigError(f"{_flag(other)} with {_flag(one)}: {why}; leave one of them out")
    if (args.hardware or "").lower() == "this" and args.cpu_mem_bdw:
        raise ConfigError("--cpu-mem-bdw with --hardware this: that rate was measured; leave one of them out")
    for name in _NOT_PAPERS:
        if args.cost_model == "paper" and getattr(args, name):
            raise ConfigError(f"--cost-model paper does not count with {_flag(name)}; leave one of them out")
    args.hardware = args.hardware or _HARDWARE
    args.avg_prompt_len = args.avg_prompt_len or _PROMPT
    args.gen_len = args.gen_len or _ANSWER


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _profile(args: Namespace) -> Profile | None:
    """What was measured, where that is to count."""
    if args.profile:
        return load_profile(args.profile)
    if args.hardware.lower() != "this":
        return None
    try:
        profile = load_profile(cache_path())
    except ConfigError as error:
        raise ConfigError(f"--hardware this: {error}. Run `moe-lightning profile` here first") from error
    different = changes_here(profile)
    if different:
        raise ConfigError(
            f"--hardware this: {cache_path()} is of another machine or set-up: {'; '.join(different)}. "
            "Run `moe-lightning profile` here again, or hand it in as --profile to plan for that machine"
        )
    return profile


def _machine(args: Namespace, profile: Profile | None) -> HardwareSpec:
    """The machine with the sizes and rates that were given."""
    hardware = profile.hardware_spec() if profile else preset(args.hardware)
    gpu, cpu = hardware.gpu, hardware.cpu
    gpu = replace(gpu, memory_bytes=args.gpu_memory or gpu.memory_bytes)
    cpu = replace(
        cpu,
        memory_bytes=args.host_memory or cpu.memory_bytes,
        bandwidth=args.cpu_mem_bdw * GIB if args.cpu_mem_bdw else cpu.bandwidth,
    )
    return replace(hardware, gpu=gpu, cpu=cpu)


def _plan_ours(
    spec: ModelSpec, hardware: HardwareSpec, profile: Profile | None, args: Namespace, notes: tuple[str, ...]
) -> Answer:
    from moe_lightning.cli.plan_job import job_of
    from moe_lightning.cli.plan_table import to_text
    from moe_lightning.perf.rates import DatasheetRates, MeasuredRates
    from moe_lightning.perf.report import Machine, plan

    found = Machine(
        hardware.gpu.name,
        MeasuredRates(profile) if profile else DatasheetRates(hardware),
        hardware.gpu.memory_bytes,
        args.host_memory or int(_HOST_SHARE * hardware.cpu.memory_bytes),
    )
    job, dtype = job_of(args, args.max_model_len or spec.max_position), _dtype(spec, hardware)
    if dtype != spec.dtype:
        notes += (f"{hardware.gpu.name} has no rate for {spec.dtype}, so this plan is in {dtype}",)
    notes += job.notes
    report = plan(spec, dtype, found, job.workload, job.longest)
    columns = shutil.get_terminal_size((100, 0)).columns if sys.stdout.isatty() else 100
    text = to_text(report, notes, is_terminal=sys.stdout.isatty(), width=columns)
    return Answer(
        text, lambda: {**report.to_json(), "notes": list(notes)}, report.planned.policy.micro_batch_size
    )


def _plan_paper(
    spec: ModelSpec, hardware: HardwareSpec, _: Profile | None, args: Namespace, notes: tuple[str, ...]
) -> Answer:
    from moe_lightning.perf.paper_model import PaperMachine, PaperWorkload, plan_paper
    from moe_lightning.perf.paper_report import format_plan

    workload = PaperWorkload(args.avg_prompt_len, args.gen_len)
    try:
        plan = plan_paper(spec, PaperMachine.of(hardware), workload)
    except NoFeasiblePolicyError as e:
        remedy = "Raise --gpu-memory or --host-memory, lower --avg-prompt-len, or name a larger --hardware"
        raise NoFeasiblePolicyError(e.problem, remedy) from e
    return Answer([*(f"note: {note}" for note in notes), format_plan(plan)], plan.to_json, plan.ubs)


_Model = Callable[[ModelSpec, HardwareSpec, Profile | None, Namespace, tuple[str, ...]], Answer]
_COST_MODELS: dict[str, _Model] = {
    "ours": _plan_ours,
    "paper": _plan_paper,
}


def _dtype(spec: ModelSpec, hardware: HardwareSpec) -> str:
    """The checkpoint's, where the card computes in it."""
    return spec.dtype if spec.dtype in hardware.gpu.flops else "float16"


def _plot(args: Namespace, spec: ModelSpec, hardware: HardwareSpec, micro_batch_size: int) -> None:
    from moe_lightning.perf.roofline import gpu_over_host
    from moe_lightning.perf.roofline_plot import chart_of, draw_roofline

    dtype = _dtype(spec, hardware)
    title = f"{args.model} on {hardware.gpu.name}, {dtype}"
    draw_roofline(args.plot, chart_of(spec, gpu_over_host(hardware, dtype), dtype, title, micro_batch_size))
    print(f"wrote {args.plot}", file=sys.stderr)


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ConfigError as e:
        raise ArgumentTypeError(str(e)) from e
    if size < 1:
        raise ArgumentTypeError(f"{text!r} leaves nothing to run in; give a size such as 16GiB")
    return size


def rate(text: str) -> float:
    """A bandwidth in GiB/s, as an argparse type."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ArgumentTypeError(f"{text!r} is no bandwidth; give GiB/s above 0, such as 76")
    return found
