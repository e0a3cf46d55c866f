"""Cells of a table: what is measured under which memory, as text and as file names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lightning.bench.cell import Effort
from moe_lightning.bench.workloads import workload
from moe_lightning.perf.workload import Workload
from moe_lightning.units import GIB, format_bytes, parse_bytes, parse_count

KINDS = ("steady", "job", "both")
# The table of the README first, then what the cost curves need beside it.
TABLE = tuple(
    f"{gpu},{gen},{kind}"
    for gpu in ("24GiB", "16GiB")
    for gen, kind in ((128, "steady"), (32, "both"), (64, "both"), (256, "steady"), (128, "job"))
)
CURVES = (
    *(f"24GiB,128,steady,seqs={count}" for count in (500, 1000, 2000)),
    *(f"{gpu},128,steady" for gpu in ("12GiB", "20GiB", "32GiB", "48GiB")),
    *(f"24GiB,128,steady,host={host}" for host in ("96GiB", "110GiB")),
    "24GiB,512,steady",
)


@dataclass(frozen=True)
class CellSpec:
    """One cell.

    Attributes:
        gpu: bytes of GPU memory.
        gen_len: tokens of an answer.
        kind: steady state, whole job, or both.
        host: bytes of host memory; None for all.
        seqs: sequences at once at most; None for all that fit.
        workload: whose lengths.
        requests: of a job; None for twice those that fill KV memory.
    """

    gpu: int
    gen_len: int
    kind: str
    host: int | None = None
    seqs: int | None = None
    workload: str = "mtbench"
    requests: int | None = None

    @classmethod
    def parse(cls, text: str) -> CellSpec:
        """Such as ``24GiB,128,steady``, ``24GiB,128,steady,host=100GiB,seqs=1000`` or ``24GiB,32,job,requests=50``.

        Raises:
            ValueError, ConfigError: it says something else.
        """
        gpu, gen_len, kind, *more = text.split(",")
        if kind not in KINDS:
            raise ValueError(f"{text!r}: {kind!r} is none of {', '.join(KINDS)}")
        found = cls(parse_bytes(gpu), parse_count(gen_len), kind)
        for option in more:
            name, _, value = option.partition("=")
            parse = {"host": parse_bytes, "seqs": parse_count, "workload": str, "requests": parse_count}.get(
                name
            )
            if parse is None or not value:
                raise ValueError(f"{text!r}: {option!r} is no host=SIZE, seqs=N, workload=NAME or requests=N")
            if (read := parse(value)) == 0:
                raise ValueError(f"{text!r}: {name} is 1 or more")
            found = replace(found, **{name: read})
        return found

    @property
    def work(self) -> Workload:
        """Lengths, and how many requests."""
        return workload(self.workload, self.gen_len, self.requests)

    def effort(self, steady_passes: int, num_checked: int) -> Effort:
        """What `measure` is asked for."""
        steady = 0 if self.kind == "job" else steady_passes
        return Effort(steady, self.kind != "steady", num_checked)

    def file_name(self, model: str, repetition: int) -> str:
        """Of the result; the same cell has the same name in every run."""
        more = "" if self.workload == "mtbench" else f"_{self.workload}"
        more += "" if self.host is None else f"_host{_size(self.host)}"
        more += "" if self.seqs is None else f"_seqs{self.seqs}"
        more += "" if self.requests is None else f"_requests{self.requests}"
        return (
            f"cell_{model.replace('/', '-')}_gpu{_size(self.gpu)}_gen{self.gen_len}{more}_{self.kind}"
            f"_{repetition}.json"
        )

    def __str__(self) -> str:
        more = "" if self.host is None else f", host {format_bytes(self.host)}"
        more += "" if self.seqs is None else f", {self.seqs} sequences"
        more += "" if self.requests is None else f", {self.requests} requests"
        return f"{self.workload}, {format_bytes(self.gpu)}, gen {self.gen_len}, {self.kind}{more}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:g}gib"
