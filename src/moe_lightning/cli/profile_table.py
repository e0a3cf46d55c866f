"""A profile as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lightning.hardware.curve import TimeCurve
from moe_lightning.hardware.kernel_times import DecodeProfile, ExpertsProfile, PrefillProfile, SmallKernels
from moe_lightning.hardware.profile import (
    AttentionProfile,
    GpuProfile,
    HostProfile,
    LaneProfile,
    LinkProfile,
    Profile,
)
from moe_lightning.units import format_bytes


@dataclass(frozen=True)
class Grid:
    """One table: texts in rows under a header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(profile: Profile) -> Iterator[Grid]:
    """Everything that was measured."""
    yield _host(profile)
    yield _attention(profile.host.attention)
    if profile.gpu:
        yield _link(profile.gpu.link)
        yield _lanes(profile.gpu.lanes)
        yield _gpu(profile.gpu)
    yield from (_experts(found, "on the CPU") for found in profile.host.experts)
    if profile.gpu:
        yield from (_experts(found, "on the GPU") for found in profile.gpu.experts)
        yield from _dense(profile.gpu)
        yield from (_small(found) for found in profile.gpu.small)
        yield _prefill(profile.gpu.prefill)
        yield _decode(profile.gpu.decode)


def to_text(grid: Grid) -> str:
    """The table in plain letters."""
    rows = (grid.header, *grid.rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(grid.header))]
    lines = [
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([grid.title, *("  " + line for line in lines)])


def _host(profile: Profile) -> Grid:
    h: HostProfile = profile.host
    rows = [("memory read", _giga(h.read))]
    if h.read_under_copies:
        rows.append(("memory read beside copies", _giga(h.read_under_copies)))
    rows += [(f"products, {dtype}", f"{rate / 1e12:.2f} TFLOP/s") for dtype, rate in h.flops.items()]
    if profile.disk:
        rows.append((f"disk of {profile.disk.path}", _giga(profile.disk.read)))
    cores = f"{profile.machine.cpu}, {profile.machine.cores} cores"
    return Grid(f"Host: {cores}, attention by {profile.machine.isa}", ("", "rate"), tuple(rows))


def _attention(found: Sequence[AttentionProfile]) -> Grid:
    contexts = found[0].rate.sizes
    rows = []
    for a in found:
        name = f"{a.num_heads} heads on {a.num_kv_heads} of {a.head_dim}, {a.dtype}"
        calls = f"{a.call.seconds_at(1) * 1e6:.0f} + {_per_thousand(a.call) * 1e6:.0f}"
        rows.append((name, *(_giga(rate, "") for rate in a.rate.rates), calls))
        if a.rate_under_copies:
            rows.append(("  beside copies", *(_giga(rate, "") for rate in a.rate_under_copies.rates), ""))
    header = ("GB/s of K and V by context", *(f"{size:.0f}" for size in contexts), "call: us + us/1000 seqs")
    return Grid("Decode attention on the CPU", header, tuple(rows))


def _per_thousand(call: TimeCurve) -> float:
    return max(0.0, call.seconds_at(1001) - call.seconds_at(1))


def _link(link: LinkProfile) -> Grid:
    rows = [
        (format_bytes(size), _giga(link.h2d.rate_at(size)), _giga(link.d2h.rate_at(size)))
        for size in link.h2d.sizes
    ]
    rows.append(("both ways", _giga(link.h2d_beside_d2h), _giga(link.d2h_beside_h2d)))
    rows.append(("beside CPU attention and sweeps", _giga(link.slowest_h2d), ""))
    kind = "page-locked memory" if link.is_pinned else "memory that the system refuses to lock"
    return Grid(f"Link, {kind}", ("a copy of", "to the GPU", "to the host"), tuple(rows))


def _lanes(lanes: LaneProfile) -> Grid:
    rows = [
        ("launching a GPU task of one kernel", lanes.gpu_launch_s),
        ("  each further kernel", lanes.gpu_kernel_launch_s),
        ("launching a copy to the GPU", lanes.h2d_launch_s),
        ("launching a copy to the host", lanes.d2h_launch_s),
        ("a CPU task", lanes.cpu_launch_s),
        ("from one GPU task to the next", lanes.gpu_gap_s),
        ("from one copy to the GPU to the next", lanes.h2d_gap_s),
        ("from one copy to the host to the next", lanes.d2h_gap_s),
        ("from one stream to another", lanes.stream_handover_s),
        ("from the D2H lane over the CPU to the H2D lane", lanes.cpu_round_trip_s),
    ]
    for name, hop in (("hidden states to the GPU", lanes.h2d_hop), ("Q, K, V to the host", lanes.d2h_hop)):
        rows += [(f"{format_bytes(size)} of {name}", hop.seconds_at(size)) for size in hop.sizes]
    return Grid("Lanes", ("", "us"), tuple((name, f"{seconds * 1e6:.1f}") for name, seconds in rows))


def _gpu(gpu: GpuProfile) -> Grid:
    rows = [("memory, read plus written", _giga(gpu.memory))]
    rows += [(f"products, {dtype}", f"{rate / 1e12:.0f} TFLOP/s") for dtype, rate in gpu.flops.items()]
    return Grid("GPU", ("", "rate"), tuple(rows))


def _experts(found: ExpertsProfile, where: str) -> Grid:
    s = found.shape
    rows = []
    for tokens, seconds in zip(found.times.sizes, found.times.seconds, strict=True):
        flops = s.experts_flops_per_token * tokens / seconds
        size = 4 if found.dtype == "float32" else 2
        weights = 3 * s.hidden_size * s.intermediate_size * s.experts_met(tokens) * size
        parts = (
            f"{p.times.seconds_at(tokens) * 1e3:.3f}" if tokens in p.times.sizes else "" for p in found.parts
        )
        rates = (f"{flops / 1e12:.2f}", _giga(weights / seconds, ""))
        rows.append((f"{tokens:.0f}", f"{seconds * 1e3:.3f}", *rates, *parts))
    title = f"Experts of {s.name} {where}, {found.dtype}: one sweep of a layer"
    shares = (f"ms of {p.share:.4g} of them" for p in found.parts)
    return Grid(title, ("tokens", "ms", "TFLOP/s", "GB/s of weights", *shares), tuple(rows))


def _dense(gpu: GpuProfile) -> Iterator[Grid]:
    counts = sorted({rows for d in gpu.dense for rows in d.times.sizes})
    rows = []
    for d in gpu.dense:
        rates = (
            f"{2 * count * d.inputs * d.outputs / d.times.seconds_at(count) / 1e12:.1f}"
            if count in d.times.sizes
            else ""
            for count in counts
        )
        rows.append((f"{d.name}, [{d.outputs}, {d.inputs}]", *rates))
    if rows:
        yield Grid("Products", ("TFLOP/s by rows", *(f"{count:.0f}" for count in counts)), tuple(rows))


def _small(found: SmallKernels) -> Grid:
    rows = tuple(
        (name, *(f"{times.seconds_at(count) * 1e6:.1f}" for count in found.pre_attention.sizes))
        for name, times in (
            (f"norm, {'product, ' if found.is_whole else ''}rotation", found.pre_attention),
            (f"{'product, ' if found.is_whole else ''}norm, router, choice", found.post_attention),
        )
    )
    header = ("us by rows", *(f"{count:.0f}" for count in found.pre_attention.sizes))
    title = "Before and after attention, beside copies and the CPU's" if found.is_whole else "Small kernels"
    return Grid(f"{title}: {found.shape.name}, {found.dtype}", header, rows)


def _prefill(found: Sequence[PrefillProfile]) -> Grid:
    lengths = found[0].rate.sizes if found else ()
    rows = tuple(
        (
            f"{p.num_heads} heads on {p.num_kv_heads} of {p.head_dim}, {p.dtype}",
            *(f"{rate / 1e12:.1f}" for rate in p.rate.rates),
            (p.store and _giga(p.store.rate_at(p.store.sizes[-1]))) or "",
        )
        for p in found
    )
    header = ("TFLOP/s by a token's prompt", *(f"{n:.0f}" for n in lengths), "K and V to their blocks")
    return Grid("Prefill attention", header, rows)


def _decode(found: Sequence[DecodeProfile]) -> Grid:
    contexts = found[0].rate.sizes if found else ()
    rows = tuple(
        (
            f"{d.num_heads} heads on {d.num_kv_heads} of {d.head_dim}, {d.dtype}",
            *(_giga(rate, "") for rate in d.rate.rates),
        )
        for d in found
    )
    return Grid(
        "Decode attention in GPU memory",
        ("GB/s of K and V by context", *(f"{n:.0f}" for n in contexts)),
        rows,
    )


def _giga(rate: float, unit: str = " GB/s") -> str:
    return f"{rate / 1e9:.1f}{unit}"
