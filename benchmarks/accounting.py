"""Where a steady state's share of the hardware limit went: four factors, whose product is the share.

    python benchmarks/accounting.py benchmarks/results/plans_6338035/point_plan_*.json

The limit (`perf.limit`) has all GPU memory beyond the other weights full of packed experts, all host memory beyond
what streams full of KV, and copies of pages, as fast as plain ones, that never pause.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_tables import is_steady, memory_of
from headline import hardware_limit_of
from model_on_record import hashable

from moe_lightning.bench.models import spec_of
from moe_lightning.perf.page_size import page_bytes
from moe_lightning.policy import Policy

Values = dict[str, Any]


class Account(NamedTuple):
    """Of a steady state: what it reached of the limit, and by which factors that came.

    Attributes:
        share: of the limit's tokens/s.
        tokens: a pass generates, over the sequences that the limit has room for: KV blocks that are not full, more
            streamed experts, and all else in host memory.
        pages: bytes that the limit streams, over those of the policy: GPU memory for other things than experts.
        rate: of pages in passes, over plain copies.
        busy: of the time of a pass, copies of pages.
    """

    share: float
    tokens: float
    pages: float
    rate: float
    busy: float


def account(values: Values) -> Account | None:
    """Of a result with a steady state whose lanes were recorded, of packed experts that stream; else None."""
    found = next((m for m in values.get("measured", ()) if m["kind"] == "steady state" and m["lanes"]), None)
    if found is None or not values["policy"]["packed"] or not found["share_of_plain_copy"]:
        return None
    policy, spec = (
        Policy(**hashable(values["policy"])),
        spec_of(values["settings"]["model"], values["num_layers"]),
    )
    limit, copies = hardware_limit_of(values, packed=True), values["plain_copy_bytes_per_s"]
    rows = spec.experts.intermediate_size // policy.pages_per_expert
    pages = spec.num_layers * spec.experts.num_experts * policy.pages_per_expert - sum(policy.resident_pages)
    streamed = pages * page_bytes(spec.hidden_size, rows, 2, packed=True)
    pass_s = statistics.mean(each["seconds"] for each in found["passes"])
    tokens = statistics.mean(each["generated"] for each in found["passes"])
    return Account(
        found["tokens_per_s"] / limit.tokens_per_s,
        tokens / limit.num_seqs,
        limit.pass_s * copies / streamed,
        found["share_of_plain_copy"],
        streamed / (copies * found["share_of_plain_copy"] * pass_s),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON of bench throughput")
    args = parser.parse_args()
    print("| result | GPU memory | answers | of the limit | tokens a pass | pages | their rate | busy |")
    print("| --- " * 8 + "|")
    for path in args.results:
        values = json.loads(path.read_text(encoding="utf-8"))
        if found := account(values):
            shares = " | ".join(f"{share:.0%}" for share in found)
            name = (
                f"{path.parent.name}/{path.stem}{'' if is_steady(values['measured'][0]) else ', not steady'}"
            )
            print(f"| {name} | {memory_of(values)} | {values['workload']['gen_len']} | {shares} |")


if __name__ == "__main__":
    main()
