"""The subject `schedules` of the verb `bench`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from dataclasses import asdict, replace

from moe_lightning.bench.variants import VARIANTS
from moe_lightning.cli.bench_flags import add_workload_flags, setting, tell, write_json
from moe_lightning.cli.flags import add_count, add_engine_flags

_DESCRIPTION = (
    "The paper's ablation on one engine: CGOPipe as in the paper, then with continuous admission, with one sweep "
    "over the experts a pass and with our planner's policy; and the schedules that the paper compares it with. A "
    "few full passes of each; ratios are those to the first."
)


def add_subject(subjects: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subject with its flags."""
    parser = subjects.add_parser(
        "schedules", help="the paper's ablation", description=_DESCRIPTION, allow_abbrev=False
    )
    add_workload_flags(parser)
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="may be repeated (default: all, in this order)"
    )
    add_count(parser, "--passes", "to measure of each (default: %(default)s)", default=4)
    add_engine_flags(parser)
    parser.set_defaults(measure=_run)


def _run(args: Namespace) -> int:
    config, spec, work = setting(args)
    work = replace(work, gen_lens=None)  # a batch ends as a whole, as in the paper
    from moe_lightning.bench.machine import facts  # imports torch
    from moe_lightning.bench.schedules import measure
    from moe_lightning.bench.schedules_report import to_json, to_text
    from moe_lightning.bench.session import Session
    from moe_lightning.engine.plan import machine_of, measured_rates

    session = Session(config, spec)
    rows = []
    variants = [VARIANTS[name] for name in args.variant or VARIANTS]
    plan = session.plan(work)
    device, dtype = plan.device, plan.dtype
    rates, machine = measured_rates(device, dtype), machine_of(device)
    for row in measure(session, plan, work, variants, rates, machine, num_passes=args.passes, show=tell):
        rows.append(row)
        tell(f"{row.variant.name}: {row.tokens_per_s:.1f} tokens/s")
        if args.json:  # each as soon as there is one: the run may be cut off
            result = {"settings": asdict(config), "workload": asdict(work), "rows": to_json(rows)}
            write_json(args.json, facts() | result)
    if rows:
        print(to_text(rows))
    return 0 if len(rows) == len(variants) else 1
