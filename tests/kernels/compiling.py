"""The kernels compiled for GPUs that are not there: a script that prints a line of JSON for each.

    python tests/kernels/compiling.py few|every 75 80 86 89 90

Launchers run as they are. In place of Triton's driver is one that names the GPU and launches nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import launches
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moe_lightning.kernels import experts

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) ")


class Cards:
    """Stands for Triton's driver; a device's number is its compute capability."""

    def __init__(self) -> None:
        self.arch = 90

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Compiler:
    """Takes the place of every launch."""

    def __init__(self, cards: Cards) -> None:
        self._cards = cards
        self._run = JITFunction.run
        self._known: dict[int, tuple[Any, dict[str, int]]] = {}
        self.case = ""

    def __call__(
        self, kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any
    ) -> Any:
        compiled = self._run(kernel, *args, grid=grid, warmup=True, **options)
        if id(compiled) not in self._known:
            number = {"variant": len(self._known)}
            self._known[id(compiled)] = compiled, number | self._usage(compiled)
        print(json.dumps({
            "arch": self._cards.arch, "kernel": kernel.__name__, "case": self.case, "grid": grid,
            **self._known[id(compiled)][1],
        }), flush=True)  # fmt: skip
        return compiled

    def _usage(self, compiled: Any) -> dict[str, int]:
        """Shared memory of a program; of a thread, registers and local memory, where they are spilled to."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, _USAGE.search(said).groups())
        return {"shared": compiled.metadata.shared, "registers": registers, "local": stack}


def main(which: str, *archs: str) -> None:
    """Compile the cases of `launches` for each GPU; one that fails is told and the next is tried."""
    cards = Cards()
    triton.runtime.driver.set_active(cards)
    experts.capability = lambda device: divmod(cards.arch, 10)
    compiler = Compiler(cards)
    JITFunction.run = lambda kernel, *args, **options: compiler(kernel, *args, **options)
    for arch in map(int, archs):
        cards.arch = arch
        for case, launch in getattr(launches, which)(arch):
            compiler.case = case
            try:
                launch()
            except Exception as error:
                print(json.dumps({"arch": arch, "case": case, "error": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    assert not knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing would be compiled"
    torch.set_default_device("meta")
    main(*sys.argv[1:])
