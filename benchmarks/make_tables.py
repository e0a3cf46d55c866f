"""The documents' tables from result files: our cells, the peers beside them, the ablation.

    python benchmarks/make_tables.py                                                  # prints them
    python benchmarks/make_tables.py --write README.md --write docs/benchmarks.md     # as `make tables` does
    python benchmarks/make_tables.py --results benchmarks/results/table

In a document the tables stand between two lines, ``<!-- tables: NAME -->`` and ``<!-- end -->``, for each NAME of
headline, throughput, agreement, peers, schedules, accuracy and neighbours; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accuracy_tables import accuracy, beside, card_of, memory_of
from headline import headline

from moe_lightning.bench.cell import turnover
from moe_lightning.bench.passes import PassRecord
from moe_lightning.bench.report import RATE_TOLERANCE
from moe_lightning.units import GIB

Values = dict[str, Any]
_RESULTS = Path(__file__).parent / "results"
# From before experts were packed; jobs that do not fill memory; plans without a profile.
_OTHER = ("table", "accuracy", "small_job", "datasheet")


def recorded() -> list[Path]:
    """The directories of results that the documents' tables are of, in the order of their profiles."""
    some = [path for path in _RESULTS.iterdir() if path.is_dir()]
    return sorted((path for path in some if not path.name.startswith(_OTHER)), key=_created)


def _created(directory: Path) -> tuple[str, str]:
    profile = directory / "profile.json"
    values = json.loads(profile.read_text(encoding="utf-8")) if profile.exists() else {}
    return values.get("created", ""), directory.name


def read(directory: Path) -> list[Values]:
    """All results of a directory, by file name."""
    found = []
    for path in sorted(directory.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            found.append(values | {"file": path.name})
    return found


def throughput(results: Iterable[Values]) -> str:
    """A row for each cell and kind: the median of its repetitions, with the least and the most."""
    rows = [
        "| model | GPU memory | answers | measured | tokens/s (least to most) | of the limit | predicted | "
        "H2D busy | pages, of plain copies | GPU peak | checked |",
        "| --- " * 11 + "|",
    ]
    for key, group in sorted(_groups(results).items()):
        model, gpu, gen_len, note, kind = key
        cells, found = [c for c, _ in group], [m for _, m in group]
        rates = [m["tokens_per_s"] for m in found]
        rate = statistics.median(rates)
        spread = f" ({min(rates):,.0f} to {max(rates):,.0f}, {len(rates)} runs)" if len(rates) > 1 else ""
        rows.append(
            f"| {model} | {gpu / GIB:g} GiB{note} | {gen_len} | {kind} | {rate:,.0f}{spread} | "
            f"{_share(_median(m['share_of_limit'] for m in found))} | "
            f"{_predicted(found)} | "
            f"{_share(_median(_h2d(m) for m in found))} | "
            f"{_share(_median(m['share_of_plain_copy'] for m in found))} | "
            f"{_peak(cells)} | {_checked(found)} |"
        )
    return "\n".join(rows)


def agreement(results: Iterable[Values]) -> str:
    """A row for each run of both kinds: the job, while full memory changes hands once, beside its steady state."""
    rows = [
        "| model | GPU memory | answers | steady state, tokens/s | job, memory full | of it | whole job |",
        "| --- " * 7 + "|",
    ]
    both = [
        cell for cell in results
        if len(cell.get("measured", ())) == 2 and cell["workload"].get("num_requests") is None
    ]  # fmt: skip
    for cell in sorted(both, key=lambda cell: (_model(cell), cell["gpu_memory"], cell["file"])):
        kinds, gen_len = {m["kind"]: m for m in cell["measured"]}, cell["workload"]["gen_len"]
        steady, job = kinds["steady state"]["tokens_per_s"], kinds["job"]
        full = turnover([PassRecord(**p) for p in job["passes"]], gen_len)
        rows.append(
            f"| {_model(cell)} | {memory_of(cell)} | {gen_len} | {steady:,.0f} | {full:,.0f} | "
            f"{_share(full / steady)} | {job['tokens_per_s']:,.0f} |"
        )
    return "\n".join(rows)


def _groups(results: Iterable[Values]) -> dict[tuple[Any, ...], list[tuple[Values, Values]]]:
    groups: dict[tuple[Any, ...], list[tuple[Values, Values]]] = {}
    for values in results:
        if "measured" not in values or "plain_copy_bytes_per_s" not in values or "point" in values:
            continue
        settings = values["settings"]
        host, seqs = settings["host_memory"], settings["max_num_seqs"]
        # A limit of all cells of a run is no cell of its own: the name of a cell says what is.
        note = f", {card}" if (card := card_of(values)) else ""
        note += f", host {host / GIB:g} GiB" if host and "host" in values.get("cell", "") else ""
        note += f", {seqs} sequences" if seqs else ""
        requests = values["workload"].get("num_requests")
        note += f", {requests} requests" if requests else ""
        for m in values["measured"]:
            work = values["workload"]
            key = (_model(values), values["gpu_memory"] or 0, work["gen_len"], note, m["kind"])
            groups.setdefault(key, []).append((values, m))
    return groups


def _model(values: Values) -> str:
    return Path(values["settings"]["model"]).name


def peers(results: Iterable[Values]) -> str:
    """A row for each engine and length of answers, with the best of its batch sizes."""
    rows = ["| engine | GPU memory | answers | batch | tokens/s |", "| --- " * 5 + "|"]
    best: dict[tuple[Any, ...], Values] = {}
    for values in results:
        if "engine" not in values:
            continue
        key = (values["engine"], memory_of(values), values["workload"]["gen_len"])
        for run in values["runs"]:
            if run.get("tokens_per_s", 0.0) > best.get(key, {}).get("tokens_per_s", 0.0):
                best[key] = run
    for (engine, memory, gen_len), run in sorted(best.items()):
        rows.append(f"| {engine} | {memory} | {gen_len} | {run['batch_size']} | {run['tokens_per_s']:,.1f} |")
    return "\n".join(rows)


def schedules(results: Iterable[Values]) -> str:
    """A row for each variant of the ablation."""
    rows = [
        "| variant | experts | sequences | tokens/s | ratio | predicted ratio | pass, s | predicted, s | commit |",
        "| --- " * 9 + "|",
    ]
    for values in results:
        for row in values.get("rows", ()):
            experts = "packed" if row["policy"].get("packed") else "plain"
            rows.append(
                f"| {row['what']} | {experts} | {row['num_seqs']:,} | {row['tokens_per_s']:,.0f} "
                f"| {row['ratio']:.2f} | {row['predicted_ratio']:.2f} | {row['pass_s']:.2f} "
                f"| {row['predicted_pass_s']:.2f} | {values.get('commit', '')[:7]} |"
            )
    return "\n".join(rows)


TABLES = {
    "headline": headline,
    "throughput": throughput,
    "agreement": agreement,
    "peers": peers,
    "schedules": schedules,
    "accuracy": accuracy,
    "neighbours": beside,
}


def write(document: str, results: list[Values]) -> str:
    """The document with its tables made anew.

    Raises:
        ValueError: it has no place for a table, or names one that there is none of.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is named {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n\n{TABLES[match[2]](results)}\n\n{match[3]}"

    places = r"(<!-- tables: ([\w-]+) -->)\n.*?(<!-- end -->)"
    made, count = re.subn(places, table, document, flags=re.DOTALL)
    if not count:
        raise ValueError("the document has no line <!-- tables: NAME --> with <!-- end --> after it")
    return made


def _h2d(m: Values) -> float | None:
    return m["lanes"]["use"]["h2d"]["share"] if m["lanes"] else None


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _predicted(found: Iterable[Values]) -> str:
    """Medians of what was promised, and of how far off each run was from its own promise."""
    promised = [
        (m["predicted_tokens_per_s"], m["tokens_per_s"]) for m in found if m["predicted_tokens_per_s"]
    ]
    if not promised:
        return ""
    off = statistics.median(rate / predicted - 1 for predicted, rate in promised)
    predicted = statistics.median(predicted for predicted, _ in promised)
    return f"{predicted:,.0f} ({off:+.0%}{', off' if abs(off) > RATE_TOLERANCE else ''})"


def _peak(cells: Iterable[Values]) -> str:
    memory = [cell["memory"] for cell in cells]
    if any(m["gpu"] is None for m in memory):
        return ""
    worst = max(memory, key=lambda m: m["gpu"])
    over = _some_of([not m["is_gpu_within"] for m in memory], "over")
    host = _some_of([not m["is_host_within"] for m in memory], "host over its plan")
    return f"{worst['gpu'] / GIB:.2f} GiB{over}{host}"


def _checked(found: Iterable[Values]) -> str:
    checks = [m["check"] for m in found if m["check"]]
    if not checks:
        return ""
    tokens = sum(check["num_tokens"] for check in checks)
    return f"{tokens} tokens{_some_of([not check['is_equal'] for check in checks], 'NOT EQUAL')}"


def _some_of(are: Sequence[bool], what: str) -> str:
    """In how many runs of a cell something is so; nothing where it is in none."""
    if not any(are):
        return ""
    return f", {what}" + ("" if all(are) else f" in {sum(are)} of {len(are)}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, action="append", help="may be repeated (default: all with packed experts)"
    )
    parser.add_argument("--write", type=Path, action="append", metavar="DOCUMENT", help="may be repeated")
    args = parser.parse_args()
    results = [values for directory in args.results or recorded() for values in read(directory)]
    for path in args.write or ():
        path.write_text(write(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    if args.write:
        return 0
    for name, table in TABLES.items():
        print(f"{name}\n\n{table(results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
