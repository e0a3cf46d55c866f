"""What the subjects `throughput` and `schedules` of the verb `bench` share: flags, and how they are read."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from moe_lightning.bench.workloads import WORKLOADS, workload
from moe_lightning.cli.flags import add_count, engine_config
from moe_lightning.config import EngineConfig
from moe_lightning.models.spec import ModelSpec
from moe_lightning.perf.workload import Workload


def add_workload_flags(parser: ArgumentParser) -> None:
    """Flags that say what is computed, and with which layers; and where the result goes."""
    add = parser.add_argument
    add("--workload", default="mtbench", choices=WORKLOADS, help="whose lengths (default: %(default)s)")
    add(
        "--input", type=Path, metavar="PATH",
        help="lengths of a batch file, or of MT-Bench's question.jsonl, instead",
    )  # fmt: skip
    add_count(parser, "--gen-len", "tokens of each answer (default: the workload's)")
    add_count(parser, "--num-requests", "of the job (default: what fills KV memory twice)")
    add_count(parser, "--num-layers", "only the first layers, with random weights")
    add("--json", type=Path, metavar="PATH", help="write the result there")


def setting(args: Namespace) -> tuple[EngineConfig, ModelSpec, Workload]:
    """What the flags ask for.

    Raises:
        MoELightningError: they ask for something that is not there.
    """
    from moe_lightning.bench.models import spec_of

    config = engine_config(args)
    spec = spec_of(config.model, args.num_layers, is_dummy=config.load_format == "dummy")
    if config.device != "cpu":
        from moe_lightning.bench.machine import require_gpu  # imports torch

        require_gpu()
    if args.input is None:
        return config, spec, workload(args.workload, args.gen_len, args.num_requests)
    from moe_lightning.bench.file_workload import workload_of_file

    tokenizer = config.tokenizer or (config.model if Path(config.model).is_dir() else None)
    return config, spec, workload_of_file(args.input, tokenizer, args.gen_len, args.num_requests)


def tell(line: str) -> None:
    """Progress, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A result file, its directory made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
