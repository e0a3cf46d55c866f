"""The verb `doctor`: what this machine has, what it lacks, what that costs."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from moe_lightning.hardware.gpu_memory import device_bytes, pci_bus_id
from moe_lightning.hardware.inspection import Finding, Verdict, disk_finding, host_findings
from moe_lightning.units import MIB, format_bytes

SUMMARY = "tell what this machine has for streaming a model, and what each shortage costs"
DESCRIPTION = (
    "Looks at GPU, driver, CPU, memory, huge pages, page-locking, NUMA and disk, and says of each shortage what it "
    "costs and what helps. The exit status is 0; 1 if something is missing that a model larger than the GPU needs."
)
_MARKS = {Verdict.GOOD: "green", Verdict.SLOW: "yellow", Verdict.BAD: "red"}


def add_flags(parser: ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument(
        "--disk",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where checkpoints lie: its disk is read (default: the current directory)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Namespace) -> int:
    """Print what was found; the exit status."""
    findings = [*host_findings(), *gpu_findings(), attention_finding(), disk_finding(args.disk)]
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print_table(findings)
    return 1 if any(finding.verdict is Verdict.BAD for finding in findings) else 0


def gpu_findings() -> Iterator[Finding]:
    """GPU, driver and page-locking, as torch sees them."""
    import torch

    if not torch.cuda.is_available():
        advice = "everything runs on the CPU; install a CUDA build of torch if there is a GPU"
        yield Finding("GPU", f"none that torch {torch.__version__} sees", Verdict.BAD, advice)
        return
    p = torch.cuda.get_device_properties(0)
    memory = device_bytes(pci_bus_id(0))
    used = f", {format_bytes(memory[0])} used" if memory else ""
    name = f"{p.name}, {format_bytes(p.total_memory)}{used}, compute capability {p.major}.{p.minor}"
    old = (p.major, p.minor) < (7, 5)
    advice = "older than Turing (7.5): kernels are not tested on it" if old else ""
    yield Finding("GPU", name, Verdict.SLOW if old else Verdict.GOOD, advice)
    yield Finding("CUDA", f"torch {torch.__version__} for CUDA {torch.version.cuda}")
    yield _page_locking()


def _page_locking() -> Finding:
    import torch

    from moe_lightning.memory.arena import HostArena

    arena = HostArena((16, 16 * MIB), torch.uint8)
    arena.prepare(pin=True)
    if arena.refusal:
        advice = (
            "weights go through a staging buffer, at about a third of the link's rate; see `locking limit`"
        )
        return Finding("page-locking", arena.refusal, Verdict.SLOW, advice)
    rates = []
    on_gpu = torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for row in arena.tensor:
            on_gpu.copy_(row, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(arena.num_bytes / start.elapsed_time(end) * 1e3)
    value = f"works; the link to the GPU copies {max(rates) / 1e9:.1f} GB/s"
    if max(rates) >= 10e9:
        return Finding("page-locking", value)
    advice = "PCIe 3 x16 gives 12, PCIe 4 25, PCIe 5 55 GB/s; tokens/s are proportional: is the slot x16?"
    return Finding("page-locking", value, Verdict.SLOW, advice)


def attention_finding() -> Finding:
    """Which instructions the CPU's attention uses."""
    from moe_lightning.kernels.cpu_kernels import CpuKernels

    isa = CpuKernels(1).isa
    advice = (
        "attention over the KV cache may be slower than memory; CPUs with AVX2 or AVX-512 keep up with it"
    )
    return Finding("CPU attention", isa, *((Verdict.SLOW, advice) if isa == "scalar" else ()))


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        mark = f"[{_MARKS[finding.verdict]}]{finding.verdict.value}[/]"
        table.add_row(finding.name, mark, finding.value)
        if finding.advice and finding.verdict is not Verdict.GOOD:
            table.add_row("", "", f"[dim]{finding.advice}[/]")
    Console().print(table)
