"""The published artifact's way to start a server: its flags, and the plan in its terms."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace

from moe_lightning.cli import serve
from moe_lightning.cli.flags import engine_config, settings_of
from moe_lightning.cli.plan import rate
from moe_lightning.errors import MoELightningError, NoFeasiblePolicyError
from moe_lightning.hardware.spec import HardwareSpec
from moe_lightning.units import GIB

_PROMPT, _ANSWER = 77, 32  # of the artifact's MTBench runs


def main(argv: Sequence[str] | None = None) -> int:
    """Print the artifact's plan and serve; the exit status."""
    parser = ArgumentParser(
        prog="python -m moe_lightning.launch_server",
        description="Prints the plan of the paper's cost model and serves the model. " + serve.DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cpu-mem-bdw", type=rate, metavar="GIB/S", help="bandwidth of host memory (default: the machine's)"
    )
    serve.add_flags(parser)
    args = parser.parse_args(argv)
    try:
        return _launch(args)
    except MoELightningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _launch(args: Namespace) -> int:
    from moe_lightning.server.batch_limits import BatchLimits
    from moe_lightning.server.config import ServerConfig

    args.model = args.model_dir or args.model
    if args.avg_prompt_len is None and args.gen_len is None:
        args.avg_prompt_len, args.gen_len = _PROMPT, _ANSWER
    config, server = engine_config(args), settings_of(ServerConfig, args)
    assert server.avg_prompt_len is not None
    assert server.gen_len is not None
    print(paper_plan(config.model, this_hardware(), args.cpu_mem_bdw, server.avg_prompt_len, server.gen_len))
    sys.stdout.flush()
    return serve.serve(config, server, settings_of(BatchLimits, args))


def this_hardware() -> HardwareSpec:
    """What was measured here, else the datasheet of the GPU, else the paper's machine with this host's memory."""
    import torch

    from moe_lightning.engine.identity import this_machine
    from moe_lightning.hardware.host import total_memory
    from moe_lightning.hardware.presets import preset, preset_of_card
    from moe_lightning.hardware.profile_cache import cache_path, read_cache

    found, _ = read_cache(cache_path(), this_machine())
    if found is not None and found.gpu is not None:
        return found.hardware_spec()
    known = preset_of_card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    hardware = known or preset("paper-s2")
    return replace(hardware, cpu=replace(hardware.cpu, memory_bytes=total_memory()))


def paper_plan(
    model: str, hardware: HardwareSpec, cpu_gib_per_s: float | None, prompt_len: int, gen_len: int
) -> str:
    """The plan of the paper's cost model as its artifact prints it, or why there is none."""
    from moe_lightning.models.registry import resolve
    from moe_lightning.perf.paper_model import PaperMachine, PaperWorkload, plan_paper
    from moe_lightning.perf.paper_report import format_plan

    if cpu_gib_per_s:
        hardware = replace(hardware, cpu=replace(hardware.cpu, bandwidth=cpu_gib_per_s * GIB))
    head = f"the paper's cost model for {hardware.gpu.name}, prompts of {prompt_len}, answers of {gen_len} tokens:"
    try:
        plan = plan_paper(resolve(model), PaperMachine.of(hardware), PaperWorkload(prompt_len, gen_len))
    except NoFeasiblePolicyError as error:  # another machine than the one that serves can be too small
        return f"{head}\nno plan: {error.problem}"
    return f"{head}\n{format_plan(plan)}"
