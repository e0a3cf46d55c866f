"""The command in a fork of a process that has made its imports: who kills many jobs waits for those once."""

from __future__ import annotations

import multiprocessing
import sys

JOBS = multiprocessing.get_context("forkserver")
IMPORTS = [  # what the command imports as it needs it
    "moe_lightning.cli.main", "moe_lightning.jobs", "moe_lightning.llm",
    "transformers.models.auto.tokenization_auto",
]  # fmt: skip


def start_job(arguments, log):
    """A process of `moe-lightning` with these arguments; what it prints goes to the log."""
    JOBS.set_forkserver_preload(IMPORTS)
    process = JOBS.Process(target=_run, args=([*map(str, arguments)], log))
    process.start()
    return process


def _run(arguments, log):
    import torch

    from moe_lightning.cli.main import main

    torch.set_num_threads(1)
    with open(log, "w", encoding="utf-8") as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(main(arguments))
