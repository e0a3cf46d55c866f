"""A plan as a page for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_lightning.perf.alternatives import Alternative
from moe_lightning.perf.attending import SCHEDULE
from moe_lightning.perf.memory import DeviceUse, HostUse
from moe_lightning.perf.report import Report
from moe_lightning.perf.sizing import Choice
from moe_lightning.perf.trials import Planned
from moe_lightning.policy import Policy
from moe_lightning.units import counted, format_bytes, format_duration, format_rate

_WIDTH = 100
_BAR = 36
# A layer's tasks, of one micro-batch and one chunk of prompts, took one thread that long at least in passes of 128
# experts on an H100's host (`benchmarks/results/launching_h100.json`).
_LAUNCH_S = 2.3e-3
_BOUND = 0.8  # of a pass that the lane works which holds it back
_LEAST_SHARE = 0.01  # of the hardware limit that is said: it is one for as many sequences as memory holds
_LANES = {
    "gpu": "GPU", "h2d": "copies to the GPU", "back": "attention's outputs back", "d2h": "copies from the GPU",
}  # fmt: skip
_DEVICE = {
    "weights": "other weights", "resident": "experts resident", "ring": "ring of frames",
    "unpacked": "experts unpacked",
    "activations": "activations", "workspace": "experts' workspace", "tables": "tables", "uploads": "small arrays",
    "staging": "KV on its way", "kv": "KV cache",
}  # fmt: skip
_SCHEDULES = {"cgopipe": "CGOPipe", SCHEDULE: "FlexGen"}
_HOST = {
    "experts": "experts streamed", "cpu_experts": "experts of the CPU",
    "kv": "KV cache", "rows": "rows of sequences", "uploads": "small arrays",
}  # fmt: skip


def to_text(
    report: Report, notes: tuple[str, ...] = (), *, is_terminal: bool = False, width: int = _WIDTH
) -> Iterator[str]:
    """The page, section by section as they are known; in colours for a terminal.

    Args:
        report: what is said.
        notes: what to know of the model beside.
        is_terminal: letters may be coloured.
        width: columns; more than 100 are not used.
    """
    console = Console(
        width=min(width, _WIDTH), force_terminal=is_terminal, no_color=not is_terminal, highlight=False
    )
    for section in _page(report, notes):
        with console.capture() as captured:
            console.print(section)
        yield "\n".join(line.rstrip() for line in captured.get().splitlines())


def _page(report: Report, notes: tuple[str, ...]) -> Iterator[RenderableType]:
    machine = report.machine
    yield Text.assemble(
        (report.spec.architecture, "bold"), f" in {report.dtype} ", ("fits", "bold green"), f" {machine.name}: ",
        f"{format_bytes(machine.gpu_memory)} of GPU memory, {format_bytes(machine.host_memory)} of host memory",
    )  # fmt: skip
    yield from (Text(f"note: {note}", style="yellow") for note in notes)
    yield _section("what it reaches", _speeds(report))
    yield _section("seconds of a pass", _lanes(report))
    yield _section("memory", _memory(report))
    yield _section("policy", Text(_policy(report)))
    if report.planned.runners_up:
        yield _section("next best", _runners_up(report.planned))
    yield _section("why not", _left_out(report))
    yield _section("what if", _what_ifs(report))  # last, as it is searched for


def _section(title: str, content: RenderableType) -> RenderableType:
    return Group(Text(), Text(title, style="bold cyan"), Padding(content, (0, 0, 0, 2)))


def _grid(*justify: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for side in justify:
        table.add_column(justify=side, overflow="fold")  # type: ignore[arg-type]
    return table


def _speeds(report: Report) -> Table:
    p, work = report.planned.prediction, report.workload
    share = p.tokens_per_s / report.limit.tokens_per_s if report.limit else 0.0
    of_limit = f", {share:.0%} of the hardware limit" if share >= _LEAST_SHARE else ""
    answers = f"{work.gen_len}"
    if work.gen_lens:
        answers = f"{min(work.gen_lens):,} to {max(work.gen_lens):,}, {work.mean_answer:,.0f} on average"
    table = _grid("left", "right", "left")
    table.add_row(
        "whole job", format_rate(p.job_tokens_per_s),
        f"tokens/s generated; prompts of {work.mean_prompt:.0f} tokens, answers of {answers}", style="bold",
    )  # fmt: skip
    full = "memory full" if p.prefill_tokens else "all at once"
    table.add_row(full, format_rate(p.tokens_per_s), f"tokens/s generated{of_limit}")
    beside = ""
    if p.prefill_tokens:
        table.add_row("", format_rate(p.prefill_tokens_per_s), "prompt tokens/s beside them")
        ride = "rides" if p.prefill_tokens == 1 else "ride"
        beside = f", {counted(p.prefill_tokens, 'prompt token')} {ride} along"
    if p.job_s is not None and work.num_requests:
        table.add_row("the job", format_duration(p.job_s), f"for {counted(work.num_requests, 'request')}")
    decode = f"{counted(p.num_seqs, 'sequence')} decode{'s' if p.num_seqs == 1 else ''}"
    table.add_row("a pass", f"{p.pass_s:.{_decimals(report)}f} s", decode + beside)
    if p.pass_s < _LAUNCH_S * report.spec.num_layers:
        table.add_row(
            "",
            "",
            "launching tasks may take longer than so short a pass: that is not counted",
            style="yellow",
        )
    return table


def _lanes(report: Report) -> Table:
    table, prediction = _grid("left", "right", "left"), report.planned.prediction
    for lane, seconds in prediction.lane_s.items():
        is_busiest = lane == report.bottleneck
        bar = Text(
            "█" * round(_BAR * min(1.0, seconds / prediction.pass_s)), style="red" if is_busiest else "blue"
        )
        if is_busiest:
            is_bound = seconds >= _BOUND * prediction.pass_s
            bar.append(
                "  the bottleneck" if is_bound else "  the busiest; lanes wait for each other", style="bold"
            )
        name = _LANES.get(lane) or _of_cpu(report.planned.policy)
        table.add_row(name, f"{seconds:.{_decimals(report)}f}", bar)
    return table


def _decimals(report: Report) -> int:
    """Of seconds in a pass: passes of small models take milliseconds."""
    return 2 if report.planned.prediction.pass_s >= 1 else 3


def _of_cpu(policy: Policy) -> str:
    """What the CPU computes."""
    if not policy.cpu_every:
        return "CPU attention"
    return "CPU experts" if policy.kv_every == 1 else "CPU attention, experts"


def _memory(report: Report) -> Table:
    use, machine = report.memory, report.machine
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("GPU", "host"):
        table.add_column(column)
        table.add_column(justify="right")
    device = [*_parts(use.device, _DEVICE), ("during a pass, at most", format_bytes(use.during_pass.total))]
    device.append(("driver and kernels", format_bytes(machine.gpu_memory - (machine.memory.gpu or 0))))
    host = [*_parts(use.host, _HOST), ("the engine, about", format_bytes(use.host_bytes - use.host.total))]
    for row in range(max(len(device), len(host))):
        left, right = (side[row] if row < len(side) else ("", "") for side in (device, host))
        table.add_row(*left, *right)
    gpu = use.gpu_bytes + machine.gpu_memory - (machine.memory.gpu or 0)
    table.add_section()
    table.add_row(
        "in all", f"{format_bytes(gpu)} of {format_bytes(machine.gpu_memory)}",
        "", f"{format_bytes(use.host_bytes)} of {format_bytes(machine.host_memory)}", style="bold",
    )  # fmt: skip
    return table


def _parts(use: DeviceUse | HostUse, names: dict[str, str]) -> list[tuple[str, str]]:
    """Those of a mebibyte or more."""
    sizes = [(names[field.name], getattr(use, field.name)) for field in fields(use)]
    return [(name, format_bytes(size)) for name, size in sizes if size >= 2**20]


def _policy(report: Report) -> str:
    policy, spec = report.planned.policy, report.spec
    pages = spec.experts.num_experts * policy.pages_per_expert * spec.num_layers
    resident = sum(policy.resident_pages) / pages
    num_seqs = report.planned.prediction.num_seqs
    micro_batches = -(-num_seqs // policy.micro_batch_size)
    more = f", {policy.max_num_seqs:,} while they are short" if policy.max_num_seqs > num_seqs else ""
    rest = (
        f"; the rest comes through {counted(policy.num_frames, 'frame')}, "
        f"{'a part' if policy.expert_parts > 1 else 'a layer'} at a time"
        if policy.num_frames
        else ""
    )
    them = counted(micro_batches, "micro-batch", "micro-batches")
    on_cpu = f"; the CPU computes those of {_layers(policy.cpu_every)}" if policy.cpu_every else ""
    kept = f", in GPU memory for {_layers(policy.kv_every)}" if policy.kv_every else ""
    crossing = ", which cross the link to the GPU for attention" if policy.schedule == SCHEDULE else ""
    return (
        f"{counted(num_seqs, 'sequence')} in {them} of {policy.micro_batch_size:,}{more}; prompts "
        f"in chunks of {policy.chunk_tokens:,} tokens, up to {policy.max_num_seqs + policy.prefill_tokens:,} rows "
        f"a pass; {resident:.0%} of the experts resident{rest}{on_cpu}; {policy.num_blocks:,} KV blocks of "
        f"{policy.block_size} tokens{kept}{crossing}"
    )


def _layers(every: int) -> str:
    return "all layers" if every == 1 else f"one layer in {every}"


def _runners_up(planned: Planned) -> Table:
    table = _grid("right", "right", "left")
    for other in planned.runners_up:
        table.add_row(
            f"{format_rate(other.tokens_per_s)} tokens/s", f"{other.tokens_per_s / planned.tokens_per_s - 1:+.1%}",
            _difference(planned, other),
        )  # fmt: skip
    return table


def _difference(planned: Planned, runner_up: Planned) -> str:
    """Choices of another plan that are not the best one's."""
    best, other = planned.choice, runner_up.choice
    here, there = (_SCHEDULES[plan.policy.schedule] for plan in (planned, runner_up))
    changed = [f"{there}'s schedule, not {here}'s"] if here != there else []
    changed += [
        f"{field.name.replace('_', ' ')} {getattr(other, field.name):g}, not {getattr(best, field.name):g}"
        for field in fields(Choice)
        if getattr(best, field.name) != getattr(other, field.name)
    ]
    return "; ".join(changed)


def _what_ifs(report: Report) -> Table:
    table, now = _grid("left", "right", "right"), report.planned.tokens_per_s
    for name, reached in report.what_ifs.items():
        if reached is None:
            table.add_row(name, Text("it does not fit", style="red"), "")
        else:
            style = "green" if reached > now else "red"
            table.add_row(
                name, f"{format_rate(reached)} tokens/s", Text(f"{reached / now - 1:+.0%}", style=style)
            )
    return table


def _gain(alternative: Alternative) -> str:
    if alternative.gain is None:
        return "does not fit"
    return f"{alternative.gain:+.0%}"


def _left_out(report: Report) -> Table:
    table = _grid("left", "right", "left")
    for each in report.left_out:
        table.add_row(f"{each.name} ({each.symbol})", _gain(each), each.reason)
    return table
